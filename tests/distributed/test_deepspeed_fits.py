"""Lightning's DeepSpeedStrategy on two CPU processes equals one process, and refuses by name what can't work."""

from functools import partial
from typing import Any

import pytest
from deepspeed_fits import STEPS, fit, fit_manually, refused, refused_offloading, resumed
from fits import difference
from float64_runs import network, trained
from launch import Results, Runs, launch
from peft import PeftModel

STAGES = [1, 2, 3]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip": 0.3},
    "window": {"window": 2, "clip": 0.1},
    "follows": {"method": "follows"},
}
REFUSED = {
    "FMLoRA": "DeepSpeed adds each pass to the gradients of the step",
    "SAM": "leaves each rank a part of every weight",
    "AdapterCheckpoint": "DeepSpeed stores weights in its own format: use Lightning's ModelCheckpoint",
    "FlatnessMonitor": "the strategy LightningOnCPU is not supported",
}


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {}
    for stage in STAGES:
        for name, settings in SETTINGS.items():
            runs[f"{name} {stage}"] = partial(fit, stage, **settings)
        runs[f"LoRA {stage}"] = partial(fit, stage, "LoRA")
        runs[f"zero {stage}"] = partial(fit, stage, "zero")
        runs[f"manual {stage}"] = partial(fit_manually, stage)
        runs[f"resumed {stage}"] = partial(resumed, stage, str(tmp_path_factory.mktemp(f"folder{stage}")))
    for name in REFUSED:
        runs[f"refused {name}"] = partial(refused, name)
    runs["refused offloading"] = partial(refused_offloading)
    return launch(tmp_path_factory.mktemp("deepspeed"), runs)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(of: Results, stage: int, name: str) -> None:
    alone = fit(None, **SETTINGS[name])
    assert difference(alone["weights"], fit(None, "LoRA")["weights"]) > 1e-3
    for rank in of[f"{name} {stage}"]:
        assert difference(rank["weights"], alone["weights"]) < 1e-6
        assert rank["step"] == alone["step"] == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_rho_0_is_lora_bit_for_bit(of: Results, stage: int) -> None:
    for rank, of_lora in zip(of[f"zero {stage}"], of[f"LoRA {stage}"], strict=True):
        assert difference(rank["weights"], of_lora["weights"]) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_manual_optimization_equals_one_process(of: Results, stage: int) -> None:
    for rank in of[f"manual {stage}"]:
        assert difference(rank["weights"], fit_manually(None)["weights"]) < 1e-6
        assert rank["step"] == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_fit_equals_an_uninterrupted_one(of: Results, stage: int) -> None:
    for rank in of[f"resumed {stage}"]:
        assert difference(rank["resumed"], rank["whole"]) == 0
        assert not [name for name in rank["saved"] if ".base_layer." in name]
        assert rank["step"] == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_the_trained_adapter_is_a_folder_that_peft_loads(of: Results, stage: int) -> None:
    rank = of[f"resumed {stage}"][0]
    model = PeftModel.from_pretrained(network().float().unload(), f"{rank['folder']}/adapter", is_trainable=True)
    assert difference(trained(model), rank["resumed"]) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_callbacks_that_can_not_work_are_refused(of: Results, name: str) -> None:
    for error in of.error(f"refused {name}"):
        assert REFUSED[name] in error


def test_offloading_is_refused(of: Results) -> None:
    for error in of.error("refused offloading"):
        assert "DeepSpeed's offloading is not supported" in error
