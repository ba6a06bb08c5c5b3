"""DeepSpeed's ZeRO on two CPU processes: a loop equals plain PyTorch on one process as closely as plain LoRA does."""

from functools import partial
from typing import Any

import pytest
import torch
from deepspeed_runs import STEPS, alone, by_accelerate, by_fabric, calls, gathered, refused, resumed, skipped, train
from fits import difference
from launch import Results, Runs, launch

STAGES = [0, 1, 2, 3]
SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "clipped": {"clip": 0.3}, "window": {"window": 2, "clip": 0.3}}
DTYPES = ["float32", "bf16", "bf16, float32 gradients"]
REFUSED = {
    "made before": "DeepSpeed has taken the model over after EFMLoRA was made",
    "FMLoRA": "DeepSpeed adds each pass to the gradients of the step",
    "FMLoRA on the model itself": "DeepSpeed adds each pass to the gradients of the step",
    "offload": "DeepSpeed's offloading is not supported",
    "experts": "DeepSpeed's MoE is not supported",
    "Muon": "changes gradients before its step: use ZeRO stage 1, 2 or 3",
    "bf16 without ZeRO": "is not supported: use ZeRO stage 1, 2 or 3",
    # These two are last: what DeepSpeed sets for them holds for the rest of the process.
    "pipeline": "DeepSpeed's PipelineEngine is not supported",
    "tensor parallelism": "DeepSpeed's LinearLayer is not supported",
}


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {}
    for stage in STAGES:
        for name, settings in SETTINGS.items():
            for method in ("flat", "LoRA"):
                runs[f"{method} {name} {stage}"] = partial(train, "linear", stage, method=method, **settings)
        runs[f"zero {stage}"] = partial(train, "linear", stage, method="zero")
        runs[f"experts {stage}"] = partial(train, "experts", stage)
        runs[f"plain experts {stage}"] = partial(train, "experts", stage, method="LoRA")
        runs[f"resumed {stage}"] = partial(resumed, str(tmp_path_factory.mktemp("states")), stage, stage)
        if stage:
            runs[f"accelerate {stage}"] = partial(by_accelerate, str(tmp_path_factory.mktemp("accelerate")), stage)
            runs[f"Fabric {stage}"] = partial(by_fabric, str(tmp_path_factory.mktemp("fabric")), stage)
            runs[f"skipped {stage}"] = partial(skipped, stage)
            for dtype in DTYPES:
                runs[f"gathered {dtype} {stage}"] = partial(gathered, stage, dtype)
        for method in ("flat", "LoRA"):
            runs[f"calls {method} {stage}"] = partial(calls, stage, method)
    runs["persistent"] = partial(train, "linear", 3, threshold=10**6)
    for before, after in ((1, 2), (2, 1)):
        runs[f"resumed {before} {after}"] = partial(resumed, str(tmp_path_factory.mktemp("states")), before, after)
    for kind in REFUSED:
        runs[f"refused {kind}"] = partial(refused, kind)
    return launch(tmp_path_factory.mktemp("deepspeed"), runs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_equal_one_as_closely_as_for_lora(of: Results, stage: int, name: str) -> None:
    expected = alone("linear", **SETTINGS[name])
    plain = alone("linear", **SETTINGS[name], method="LoRA")
    assert difference(expected, plain) > 1e-2
    for rank, of_lora in zip(of[f"flat {name} {stage}"], of[f"LoRA {name} {stage}"], strict=True):
        assert difference(rank["weights"], expected) < 1e-6
        assert difference(of_lora["weights"], plain) < 1e-6
        assert rank["step"] == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_rho_0_is_lora_bit_for_bit(of: Results, stage: int) -> None:
    for rank, of_lora in zip(of[f"zero {stage}"], of[f"LoRA plain {stage}"], strict=True):
        assert difference(rank["weights"], of_lora["weights"]) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_experts_and_embeddings_equal_one_process(of: Results, stage: int) -> None:
    expected, plain = alone("experts"), alone("experts", method="LoRA")
    assert difference(expected, plain) > 1e-3
    for rank, of_lora in zip(of[f"experts {stage}"], of[f"plain experts {stage}"], strict=True):
        assert difference(of_lora["weights"], plain) < 1e-5
        assert difference(rank["weights"], expected) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one(of: Results, stage: int) -> None:
    for rank, whole in zip(of[f"resumed {stage}"], of[f"flat clipped {stage}"], strict=True):
        assert difference(rank["weights"], whole["weights"]) == 0
        assert rank["mine"] == 1
        # With stage 0 it is in the optimizer's state.
        assert rank["has_state"] == (stage > 0)


def test_small_parameters_that_zero_3_leaves_whole_are_perturbed_too(of: Results) -> None:
    for rank in of["persistent"]:
        assert difference(rank["weights"], alone("linear")) < 1e-6


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_step_reads_is_what_deepspeeds_own_functions_return(of: Results, stage: int, dtype: str) -> None:
    for rank in of[f"gathered {dtype} {stage}"]:
        for ours, theirs in zip(rank["ours"], rank["deepspeeds"], strict=True):
            assert theirs.any()
            assert torch.equal(ours.float(), theirs.float())
        for ours, theirs in zip(rank["our values"], rank["values"], strict=True):
            assert torch.equal(ours.float(), theirs.float())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_deepspeed_skips_moves_nothing(of: Results, stage: int) -> None:
    for rank in of[f"skipped {stage}"]:
        for part, tensors in rank["before"].items():
            assert difference(tensors, rank["after"][part]) == 0
        assert difference(rank["moved"], rank["before"]["E"]) > 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_adds_one_collective(of: Results, stage: int) -> None:
    ours, lora = (of[f"calls {method} {stage}"][0]["calls"] for method in ("flat", "LoRA"))
    assert ours - lora == (stage > 0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumed_runs_of_accelerate_equal_one_process(of: Results, stage: int) -> None:
    expected = alone("linear", window=2, clip=0.3)
    for rank in of[f"accelerate {stage}"]:
        assert rank["type"] == "DistributedType.DEEPSPEED"
        assert difference(rank["weights"], expected) < 1e-6


@pytest.mark.parametrize("stages", ["1 2", "2 1"])
def test_stages_1_and_2_resume_each_others_runs(of: Results, stages: str) -> None:
    for rank in of[f"resumed {stages}"]:
        assert difference(rank["weights"], alone("linear", clip=0.3)) < 1e-6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumed_runs_of_fabric_equal_one_process(of: Results, stage: int) -> None:
    for rank in of[f"Fabric {stage}"]:
        assert difference(rank["weights"], alone("linear")) < 1e-6


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_not_work_is_refused_by_name(of: Results, kind: str) -> None:
    for error in of.error(f"refused {kind}"):
        assert REFUSED[kind] in error
