"""Eight processes, and two nodes of one process each, started by two torchruns, equal one process on the joint batch.

On eight ranks most shards of a factor are empty.
"""

from functools import partial
from pathlib import Path

import fits
import pytest
from checkpoint_runs import END, MIDDLE, train
from fits import assert_equal_to_one_process, difference, joint_batches, places, train_alone
from helpers import same
from launch import Results, Runs, launch, launch_on_nodes
from tensor_runs import refused

STRATEGIES = ("ddp", "fsdp2")
FRONT_ENDS = [("ddp", "EFMLoRA"), ("ddp", "FMLoRA"), ("fsdp2", "EFMLoRA"), ("fsdp2", "FMLoRAModule")]
TOLERANCE = 1e-12
SIZE, BATCHES = 8, 6
"""Of a joint batch on eight ranks, and how many of them."""
SEVERAL = "a model split over two dimensions (HSDP, FSDP2 with tensor parallelism) is not supported"
REFUSED = {
    "HSDP": SEVERAL,
    "FSDP2 and tensor parallelism": SEVERAL,
    "some of the ranks": "tensor parallelism over some of the ranks is not supported",
    "Lightning": "tensor_parallel_size must be 1 or all 8 processes, got 2",
}


def name_of(strategy: str, front_end: str) -> str:
    return f"{strategy}-{front_end}"


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {}
    for case in FRONT_ENDS:
        runs[name_of(*case)] = partial(fits.train, *case, size=SIZE, epochs=1, batches=BATCHES)
    runs |= {kind: partial(refused, kind) for kind in REFUSED}
    return launch(tmp_path_factory.mktemp("eight"), runs, ranks=8, timeout=200)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("nodes")
    runs: Runs = {name_of(*case): partial(fits.train, *case, epochs=1) for case in FRONT_ENDS}
    runs["places"] = partial(places)
    for strategy in STRATEGIES:
        whole = folder / f"{strategy}-whole"
        resumed = folder / f"{strategy}-resumed"
        runs[whole.name] = partial(train, str(whole), strategy)
        runs[resumed.name] = partial(train, str(resumed), strategy, resume=str(whole / f"step={MIDDLE}.ckpt"))
    return launch_on_nodes(folder, runs)


@pytest.mark.parametrize(("strategy", "front_end"), FRONT_ENDS)
def test_eight_ranks_equal_one_process(eight: Results, strategy: str, front_end: str) -> None:
    alone = train_alone(front_end, epochs=1, batches=BATCHES, loader=joint_batches(SIZE))
    assert_equal_to_one_process(eight[name_of(strategy, front_end)], alone, TOLERANCE)


@pytest.mark.parametrize("kind", REFUSED)
def test_models_split_in_two_ways_are_refused_on_every_rank(eight: Results, kind: str) -> None:
    for error in eight.error(kind):
        assert REFUSED[kind] in error


@pytest.mark.parametrize(("strategy", "front_end"), FRONT_ENDS)
def test_two_nodes_equal_one_process(nodes: Results, strategy: str, front_end: str) -> None:
    assert all((rank["num_nodes"], rank["devices"]) == (2, 1) for rank in nodes["places"])
    alone = train_alone(front_end, epochs=1)
    assert_equal_to_one_process(nodes[name_of(strategy, front_end)], alone, TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_nodes_resume_from_one_shared_file(nodes: Results, strategy: str, tmp_path: Path) -> None:
    """The result is that of one process and, bit for bit, that of an uninterrupted run."""
    alone = train(str(tmp_path), "single")
    for whole, resumed in zip(nodes[f"{strategy}-whole"], nodes[f"{strategy}-resumed"], strict=True):
        assert whole["steps"] == resumed["steps"] == END
        for part, value in whole.items():
            assert same(value, resumed[part]), part
        assert difference(resumed["weights"], alone["weights"]) < TOLERANCE
        assert difference(*(run["driver"]["perturbation"]["E"] for run in (resumed, alone))) < TOLERANCE
