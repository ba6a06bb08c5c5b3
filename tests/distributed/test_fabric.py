"""Loops under Fabric on two processes, DDP and FSDP2, give what the callbacks give, bit for bit."""

import fabric_runs
import pytest
from helpers import same
from launch import Results, launch

from lightning_flatlora.loops.loop_method import STATE_KEY

RUNS = [("ddp", "EFMLoRA", 1), ("ddp", "EFMLoRA", 4), ("ddp", "FMLoRA", 4)]
RUNS += [("fsdp2", "EFMLoRA", 1), ("fsdp2", "EFMLoRA", 4), ("fsdp2", "FMLoRA", 4)]
OF_DDP = ("plain", "zero", "unused")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs = {}
    for strategy, method, window in RUNS:
        arguments = {"strategy": strategy, "method": method, "window": window}
        runs[f"{strategy}:{method}:{window}"] = ("fabric_runs:train", arguments)
    runs["resumed"] = ("fabric_runs:resumed", {"folder": str(tmp_path_factory.mktemp("saved") / "run")})
    for kind in OF_DDP:
        runs[kind] = ("fabric_runs:of_ddp", {"kind": kind})
    runs["accelerate"] = ("fabric_runs:by_accelerate", {})
    runs["sharded later"] = ("fabric_runs:sharded_later", {})
    runs["refused"] = ("fabric_runs:refused", {})
    runs["unsynchronized"] = ("fabric_runs:unsynchronized", {})
    return launch(tmp_path_factory.mktemp("fabric"), runs)


@pytest.mark.parametrize(("strategy", "method", "window"), RUNS)
def test_two_ranks_equal_the_callback(results: Results, strategy: str, method: str, window: int) -> None:
    first, second = results[f"{strategy}:{method}:{window}"]
    assert same(first["loop"], second["loop"])
    for kind in ("weights", "E"):
        ours, theirs = list(first["loop"][kind].values()), list(first["callback"][kind].values())
        if (strategy, method, window) == ("fsdp2", "EFMLoRA", 4):
            # Fabric sends the sum of a window's gradients, Lightning's Trainer each one.
            assert max(float((one - other).norm()) for one, other in zip(ours, theirs, strict=True)) < 1e-12
        else:
            assert same(ours, theirs)
    assert all(float(E.norm()) > 0 for E in first["loop"]["E"].values())


def test_a_distributed_checkpoint_resumes_a_run(results: Results) -> None:
    """It keeps nothing of ours in the optimizer's state, and fabric.save keeps the object's own."""
    for rank in results["resumed"]:
        assert same(rank["whole"], rank["resumed"])


@pytest.mark.parametrize("kind", OF_DDP)
def test_ddp_equals_one_process(results: Results, kind: str) -> None:
    """Also with PyTorch's ZeroRedundancyOptimizer, and with layers that a batch leaves out."""
    first, second = results[kind]
    assert same(first["weights"], second["weights"])
    for name, value in fabric_runs.of_ddp(kind, ranks=1)["weights"].items():
        assert float((value - first["weights"][name]).abs().max()) < 1e-12, name
    assert kind != "zero" or STATE_KEY in first["keys"]


def test_fsdp2_by_accelerate_equals_one_process(results: Results) -> None:
    first, second = results["accelerate"]
    assert first["is_sharded"]
    assert same(first, second)
    for name, value in fabric_runs.of_ddp("plain", ranks=1)["weights"].items():
        assert float((value - first["weights"][name]).abs().max()) < 1e-12, name


def test_a_model_that_is_sharded_later_is_refused(results: Results) -> None:
    assert all("make it after the model is sharded" in error for error in results.error("sharded later"))


def test_an_ascent_without_gradients_and_other_layouts_are_refused(results: Results) -> None:
    assert all("leave no_backward_sync" in error for error in results.error("unsynchronized"))
    for rank in results["refused"]:
        assert "static_graph=True crashes" in rank["said"][0]
        assert "as by tensor parallelism or HSDP" in rank["said"][1]
