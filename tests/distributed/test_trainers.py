"""transformers' Trainer and trl's on two processes equal one, under DDP, FSDP2 and DeepSpeed's ZeRO."""

from functools import partial
from typing import Any

import pytest
from fits import difference
from launch import Results, Runs, launch
from trainer_runs import by_trainer

HOW = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
}
KINDS = ["Trainer", "SFT", "DPO"]


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {}
    for how in HOW:
        for kind in KINDS:
            for name, settings in SETTINGS.items():
                folder = str(tmp_path_factory.mktemp("out"))
                runs[f"{how} {kind} {name}"] = partial(
                    by_trainer, how, kind, folder, resumes=name == "plain", **settings
                )
        folder = str(tmp_path_factory.mktemp("out"))
        runs[f"{how} LoRA"] = partial(by_trainer, how, "SFT", folder, None)
        runs[f"{how} zero"] = partial(by_trainer, how, "SFT", folder, rho=0.0)
    return launch(tmp_path_factory.mktemp("trainers"), runs)


@pytest.mark.filterwarnings("ignore")  # of trl and DeepSpeed
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW)
def test_two_processes_equal_one(of: Results, tmp_path: Any, how: str, kind: str, name: str) -> None:
    alone = by_trainer("alone", kind, str(tmp_path), **SETTINGS[name])
    plain = by_trainer("alone", kind, str(tmp_path), None, **SETTINGS[name])
    assert difference(alone["weights"], plain["weights"]) > 1e-3
    for rank in of[f"{how} {kind} {name}"]:
        assert difference(rank["weights"], alone["weights"]) < 1e-5
        if "resumed" in rank:
            assert difference(rank["resumed"], rank["weights"]) == 0


@pytest.mark.parametrize("how", HOW)
def test_rho_0_is_lora_bit_for_bit(of: Results, how: str) -> None:
    for rank, of_lora in zip(of[f"{how} zero"], of[f"{how} LoRA"], strict=True):
        assert difference(rank["weights"], of_lora["weights"]) == 0
