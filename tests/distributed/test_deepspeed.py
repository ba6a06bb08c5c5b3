"""EFMLoRA with DeepSpeed's engine on two processes, ZeRO stages 0 to 2, gives what DDP gives."""

from itertools import product

import pytest
import torch
from float64_runs import RHO
from helpers import same
from launch import Results, launch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

RUNS = list(product((0, 1, 2), (1, 2)))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("deepspeed")
    runs = {}
    for window in (1, 2):
        runs[f"ddp:{window}"] = ("deepspeed_runs:ddp", {"window": window})
    for stage, window in RUNS:
        runs[f"{stage}:{window}"] = ("deepspeed_runs:train", {"stage": stage, "window": window})
    for stage in (1, 2):
        runs[f"plain:{stage}"] = ("deepspeed_runs:train", {"stage": stage, "rho": -1})
        runs[f"zero:{stage}"] = ("deepspeed_runs:train", {"stage": stage, "rho": 0})
        runs[f"resumed:{stage}"] = ("deepspeed_runs:resume", {"stage": stage, "folder": str(folder / f"stage{stage}")})
        runs[f"clean:{stage}"] = ("deepspeed_runs:clean_and_finite", {"stage": stage})
    runs["radius"] = ("deepspeed_runs:radius", {"stage": 2})
    runs["program"] = ("deepspeed_runs:program_of_the_page", {})
    runs["refused"] = ("deepspeed_runs:refused", {"folder": str(folder)})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the page's program leaves its checkpoint
        return launch(folder, runs)


@pytest.mark.parametrize(("stage", "window"), RUNS)
def test_each_stage_equals_ddp(results: Results, stage: int, window: int) -> None:
    first, second = results[f"{stage}:{window}"]
    assert same(first, second)
    reference = results[f"ddp:{window}"][0]
    for kind in ("weights", "E"):
        assert list(first[kind]) == list(reference[kind])
        for ours, theirs in zip(first[kind].values(), reference[kind].values(), strict=True):
            # By rounding: DeepSpeed adds up the gradients of a window in another order.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if window == 1 else 1e-6)
    assert all(float(E.norm()) > 0 for E in first["E"].values())


@pytest.mark.parametrize("stage", [1, 2])
def test_rho_0_is_the_plain_run(results: Results, stage: int) -> None:
    assert same(results[f"zero:{stage}"][0]["weights"], results[f"plain:{stage}"][0]["weights"])


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_is_the_whole_run(results: Results, stage: int) -> None:
    assert same(results[f"resumed:{stage}"], results[f"{stage}:1"])


@pytest.mark.parametrize("stage", [1, 2])
def test_stored_weights_stay_clean_and_a_gradient_that_is_not_finite_moves_nothing(
    results: Results, stage: int
) -> None:
    for rank in results[f"clean:{stage}"]:
        assert same(*rank["stored"])
        assert not same(rank["read"][0], rank["stored"][0])
        assert same(rank["before"], rank["after"])


def test_a_radius_follows_the_engines_learning_rate(results: Results) -> None:
    for rank in results["radius"]:
        assert rank["radii"] == pytest.approx([RHO, RHO / 2])


def test_the_program_of_the_page_runs(results: Results) -> None:
    assert [rank["step"] for rank in results["program"]] == [10, 10]


def test_what_can_not_be_exact_is_refused(results: Results) -> None:
    for rank in results["refused"]:
        stage_3, two_passes, wrapped, unannounced = rank["said"]
        assert "ZeRO-3 splits the parameters" in stage_3
        assert "use EFMLoRA, which has one pass" in two_passes
        assert "give the engine of deepspeed.initialize itself" in wrapped
        assert "without EFMLoRA's before_step" in unannounced
