"""A job of a real SLURM on this machine, see slurm.py: `make slurm-test`.

One job does all runs, since its processes take longest to start. Two of the runs are signalled and requeue it; each of
its lives does the runs that no former one has ended.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import worker
from ddp_runs import difference, train_alone
from launch import Results
from slurm import Cluster, missing
from slurm_runs import SIGNALLED, STEPS, train

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]
FRONT_ENDS = [("ddp", "EFMLoRA"), ("ddp", "FMLoRA"), ("fsdp2", "EFMLoRA"), ("fsdp2", "FMLoRAModule")]
STRATEGIES = ("ddp", "fsdp2")
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def results(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("job")
    runs: dict[str, Any] = {"places": ("strategies:places", {})}
    for strategy, front_end in FRONT_ENDS:
        settings = {"strategy": strategy, "front_end": front_end, "epochs": 1}
        runs[f"{strategy}-{front_end}"] = "fits:train", settings
    for strategy in STRATEGIES:
        settings = {"strategy": strategy, "folder": str(folder / strategy)}
        runs[f"{strategy}-requeued"] = "slurm_runs:train", settings
    (folder / "runs.json").write_text(json.dumps(runs))
    ended = cluster.work(worker.__file__, folder, output=folder / "output.txt", timeout=300)
    assert ended == f"COMPLETED {len(STRATEGIES)}", (folder / "output.txt").read_text()[-6000:] + cluster.logs()
    return Results(folder, 2)


@pytest.mark.parametrize(("strategy", "front_end"), FRONT_ENDS)
def test_srun_on_two_nodes_equals_one_process(results: Results, strategy: str, front_end: str) -> None:
    assert all((rank["num_nodes"], rank["devices"]) == (2, 1) for rank in results["places"])
    alone = train_alone(front_end, epochs=1)
    for rank in results[f"{strategy}-{front_end}"]:
        assert difference(rank["weights"], alone["weights"]) < TOLERANCE
        assert difference(rank["E"], alone["E"]) < TOLERANCE


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_requeued_run_ends_as_an_uninterrupted_one(results: Results, strategy: str, tmp_path: Path) -> None:
    alone = train(str(tmp_path), "single")
    for rank in results[f"{strategy}-requeued"]:
        assert SIGNALLED < rank["began"] < rank["steps"] == alone["steps"] == STEPS
        assert difference(rank["weights"], alone["weights"]) < TOLERANCE
        assert difference(rank["E"], alone["E"]) < TOLERANCE
