"""A signal to any rank saves and ends all of them at one step; the resumed run ends like an uninterrupted one."""

import os
import signal
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checkpoint_runs import loader, local_optimizer, trainer_of
from fits import ShardedAutomatic, full_weights
from float64_runs import BETA, RHO, loss, network
from helpers import Send, same
from launch import Results, Runs, launch
from torch.utils.data import DataLoader

from lightning_flatlora import AdapterCheckpoint, CosineRho, EFMLoRA, Requeue

STRATEGIES = ("ddp", "fsdp2")
RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "first rank": {"send": (0, "on_train_batch_start", 2)},
    "other rank between the average and the optimizer": {"send": (1, "on_before_optimizer_step", 8)},
    "last batch": {"send": (1, "on_after_backward", 5)},
    "validation": {"send": (1, "on_validation_batch_start", 1)},
}
UNEVEN: dict[str, dict[str, Any]] = {
    "uneven": {"sizes": (3, 2), "send": (0, "on_validation_batch_start", 2)},
    "uneven whole": {"sizes": (3, 2)},
}
STEP_OF_END = {"first rank": 3, "other rank between the average and the optimizer": 9, "uneven": 6}


class Validated(ShardedAutomatic):
    """With a validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss(self.net, batch), sync_dist=True)


def train(
    folder: str, strategy: str, send: tuple[int, str, int] | None = None, sizes: tuple[int, ...] = (3, 3)
) -> dict[str, Any]:
    """Train, restarting until the end; returns the final state, and the order of batches and validations."""
    os.environ["SLURM_JOB_ID"] = "77"
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    rank = int(os.environ["RANK"])
    own = loader().batches[: sizes[rank]]
    validation: DataLoader[Any] = DataLoader(own, batch_size=None)
    ends: list[Any] = []
    done: list[str] = []
    resume: str | None = None
    while True:
        driver, module = EFMLoRA(CosineRho(RHO, 0.1), beta=BETA), Validated(network())
        saver = AdapterCheckpoint(Path(folder, "saved"), monitor="val_loss", save_last=True)
        callbacks = [Requeue(), driver, Counts(done), saver]
        if send and send[0] == rank and not ends:
            callbacks.append(Send(*send[1:]))
        trainer = trainer_of(strategy, callbacks, num_sanity_val_steps=0)
        try:
            trainer.fit(module, loader(), validation, ckpt_path=resume)
            break
        except SystemExit as end:
            ends.append((end.code, trainer.global_step))
            resume = "last"
    return {
        "weights": full_weights(trainer.strategy, module.net),
        "optimizer": local_optimizer(trainer.optimizers[0]),
        "driver": driver.state_dict(),
        "steps": trainer.global_step,
        "ends": ends,
        "done": done,
        "best": Path(saver.best_model_path).name,
        "val_loss": torch.as_tensor(trainer.callback_metrics["val_loss"]),
    }


class Counts(L.Callback):
    """Notes batches and validations, over all starts."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def on_train_batch_end(self, *args: Any) -> None:
        self.done.append("batch")

    def on_validation_epoch_end(self, *args: Any) -> None:
        self.done.append("validation")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("requeue")
    runs = {f"{strategy} {name}": (strategy, RUNS[name]) for strategy, name in product(STRATEGIES, RUNS)}
    runs |= {f"ddp {name}": ("ddp", UNEVEN[name]) for name in UNEVEN}
    launched: Runs = {}
    for name, (strategy, settings) in runs.items():
        place = folder / name
        place.mkdir()
        scontrol = place / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{place}/calls"\n')
        scontrol.chmod(0o755)
        launched[name] = partial(train, str(place), strategy, **settings)
    return folder, launch(folder, launched)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name in RUNS if name != "whole"])
def test_all_ranks_end_at_one_step_and_come_back(results: tuple[Path, Results], strategy: str, name: str) -> None:
    """Bit for bit, with each batch and validation exactly once, and requeued by one rank."""
    assert_comes_back(results, f"{strategy} {name}", f"{strategy} whole", STEP_OF_END.get(name, 6))


def test_ranks_that_validate_unequally_end_after_the_validation(results: tuple[Path, Results]) -> None:
    """They could not agree in each batch."""
    assert_comes_back(results, "ddp uneven", "ddp uneven whole", 6)


def assert_comes_back(results: tuple[Path, Results], name: str, whole: str, step: int) -> None:
    folder, runs = results
    codes = []
    for rank, (ended, expected) in enumerate(zip(runs[name], runs[whole], strict=True)):
        ((code, at),) = ended.pop("ends")
        codes.append(code)
        assert at == step
        assert expected.pop("ends") == []
        assert same(ended, expected), rank
    assert sorted(codes) == [128 + signal.SIGUSR1, 128 + signal.SIGTERM]
    assert (folder / name / "calls").read_text() == "requeue 77\n"
