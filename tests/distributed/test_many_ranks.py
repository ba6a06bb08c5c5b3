"""Eight processes, and two nodes of one process each, which two torchruns start, equal one process on the joint batch.

On eight ranks most shards of a factor are empty.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from checkpoint_runs import END, MIDDLE, train
from ddp_runs import difference, joint_batches, train_alone
from helpers import same
from launch import Results, launch, launch_on_nodes

STRATEGIES = ("ddp", "fsdp2")
FRONT_ENDS = [("ddp", "EFMLoRA"), ("ddp", "FMLoRA"), ("fsdp2", "EFMLoRA"), ("fsdp2", "FMLoRAModule")]
TOLERANCE = 1e-12
SIZE, BATCHES = 8, 6
"""Of a joint batch on eight ranks, and how many of them."""


def name_of(strategy: str, front_end: str) -> str:
    return f"{strategy}-{front_end}"


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    for strategy, front_end in FRONT_ENDS:
        settings = {"strategy": strategy, "front_end": front_end, "size": SIZE, "epochs": 1, "batches": BATCHES}
        runs[name_of(strategy, front_end)] = "fits:train", settings
    return launch(tmp_path_factory.mktemp("eight"), runs, ranks=8, timeout=200)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("nodes")
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    for strategy, front_end in FRONT_ENDS:
        runs[name_of(strategy, front_end)] = "fits:train", {"strategy": strategy, "front_end": front_end, "epochs": 1}
    runs["places"] = "strategies:places", {}
    for strategy in STRATEGIES:
        whole = folder / f"{strategy}-whole"
        runs[whole.name] = "checkpoint_runs:train", {"folder": str(whole), "strategy": strategy}
        resumed = {"folder": str(folder / f"{strategy}-resumed"), "resume": str(whole / f"step={MIDDLE}.ckpt")}
        runs[f"{strategy}-resumed"] = "checkpoint_runs:train", {"strategy": strategy, **resumed}
    return launch_on_nodes(folder, runs)


def assert_equal_to_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank, part in product(ranks, ("weights", "E")):
        assert difference(rank[part], alone[part]) < TOLERANCE
    assert all((E != 0).any() for E in alone["E"].values())


@pytest.mark.parametrize(("strategy", "front_end"), FRONT_ENDS)
def test_eight_ranks_equal_one_process(eight: Results, strategy: str, front_end: str) -> None:
    alone = train_alone(front_end, epochs=1, batches=BATCHES, loader=joint_batches(SIZE))
    assert_equal_to_one_process(eight[name_of(strategy, front_end)], alone)


@pytest.mark.parametrize(("strategy", "front_end"), FRONT_ENDS)
def test_two_nodes_equal_one_process(nodes: Results, strategy: str, front_end: str) -> None:
    assert all((rank["num_nodes"], rank["devices"]) == (2, 1) for rank in nodes["places"])
    assert_equal_to_one_process(nodes[name_of(strategy, front_end)], train_alone(front_end, epochs=1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_nodes_resume_from_one_shared_file(nodes: Results, strategy: str, tmp_path: Path) -> None:
    """As one process does, and bit for bit as if nothing had interrupted them."""
    alone = train(str(tmp_path), "single")
    for whole, resumed in zip(nodes[f"{strategy}-whole"], nodes[f"{strategy}-resumed"], strict=True):
        assert whole["steps"] == resumed["steps"] == END
        for part, value in whole.items():
            assert same(value, resumed[part]), part
        assert difference(resumed["weights"], alone["weights"]) < TOLERANCE
        assert difference(*(run["driver"]["perturbation"]["E"] for run in (resumed, alone))) < TOLERANCE
