"""A job of a real SLURM on this machine, see slurm.py: `make slurm-test`.

One job does all runs, since its processes take longest to start. Two of the runs are signalled and requeue the job;
after each start it does the runs that no earlier start has finished.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fits
import launch
import lightning as L
import pytest
from checkpoint_runs import BATCHES, loader, trainer_of
from fits import ShardedAutomatic, assert_equal_to_one_process, difference, full_weights, places, train_alone
from float64_runs import BETA, RHO, network
from slurm import Cluster, missing

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, Requeue

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]
FRONT_ENDS = [("ddp", "EFMLoRA"), ("ddp", "FMLoRA"), ("fsdp2", "EFMLoRA"), ("fsdp2", "FMLoRAModule")]
STRATEGIES = ("ddp", "fsdp2")
TOLERANCE = 1e-12
EPOCHS, SIGNALLED = 17, 8
STEPS = EPOCHS * BATCHES


class Signals(L.Callback):
    """Has SLURM signal the job at a step of a run's first start; further steps are slow, so that it arrives in time."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.began or trainer.global_step < SIGNALLED:
            return
        if trainer.global_step == SIGNALLED and trainer.is_global_zero:
            subprocess.run(["scancel", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)
        time.sleep(0.05)


def train(folder: str, strategy: str) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; "single" means one process without a signal."""
    signals, driver, module = Signals(), EFMLoRA(RHO, beta=BETA), ShardedAutomatic(network())
    saver = AdapterCheckpoint(Path(folder), save_top_k=0, save_last=True)
    callbacks: list[L.Callback] = [driver, saver]
    if strategy != "single":
        callbacks += [Requeue(), signals]
    trainer = trainer_of(strategy, callbacks, max_epochs=EPOCHS)
    trainer.fit(module, loader(), ckpt_path="last")
    weights, E = full_weights(trainer.strategy, module.net), driver.perturbation.state_dict()["E"]
    return {"weights": weights, "E": E, "steps": trainer.global_step, "began": getattr(signals, "began", 0)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def results(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> launch.Results:
    folder = tmp_path_factory.mktemp("job")
    runs: launch.Runs = {"places": partial(places)}
    for strategy, front_end in FRONT_ENDS:
        runs[f"{strategy}-{front_end}"] = partial(fits.train, strategy, front_end, epochs=1)
    for strategy in STRATEGIES:
        runs[f"{strategy}-requeued"] = partial(train, str(folder / strategy), strategy)
    launch.plan(folder, runs)
    ended = cluster.work(launch.__file__, folder, output=folder / "output.txt", timeout=300)
    assert ended == f"COMPLETED {len(STRATEGIES)}", (folder / "output.txt").read_text()[-6000:] + cluster.logs()
    return launch.Results(folder, 2)


@pytest.mark.parametrize(("strategy", "front_end"), FRONT_ENDS)
def test_srun_on_two_nodes_equals_one_process(results: launch.Results, strategy: str, front_end: str) -> None:
    assert all((rank["num_nodes"], rank["devices"]) == (2, 1) for rank in results["places"])
    assert_equal_to_one_process(results[f"{strategy}-{front_end}"], train_alone(front_end, epochs=1), TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_requeued_run_ends_as_an_uninterrupted_one(results: launch.Results, strategy: str, tmp_path: Path) -> None:
    alone = train(str(tmp_path), "single")
    for rank in results[f"{strategy}-requeued"]:
        assert SIGNALLED < rank["began"] < rank["steps"] == alone["steps"] == STEPS
        assert difference(rank["weights"], alone["weights"]) < TOLERANCE
        assert difference(rank["E"], alone["E"]) < TOLERANCE
