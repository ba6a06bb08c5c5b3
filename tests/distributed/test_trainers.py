"""transformers' Trainer and trl's on two processes equal one, under DDP, FSDP2, DeepSpeed's ZeRO and a split model."""

from functools import cache, partial
from typing import Any

import pytest
from fits import difference
from launch import Results, Runs, launch
from trainer_runs import TARGETS, by_trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
}
KINDS = ["Trainer", "SFT", "DPO"]
HOW = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
CASES = [(how, kind, name) for how in HOW for kind in KINDS for name in SETTINGS]
# "loaded" and "tensor" split the model by from_pretrained.
CASES += [(how, kind, "window") for how in ("loaded", "tensor") for kind in KINDS]
# FMLoRA by a TwoPassTrainer; FSDP2 must synchronize each micro-batch for it.
TWO_PASSES = {"ddp": "window", "fsdp2": "plain", "loaded": "window", "tensor": "window"}
# In peft 0.21 the forward pass of a layer whose A is split by columns raises an error.
SPLIT_BY_ROWS = ["v_proj", "up_proj"]


@cache
def alone(folder: str, kind: str, name: str, targets: tuple[str, ...], method: str | None = "EFMLoRA") -> Any:
    return by_trainer("alone", kind, folder, method, targets=list(targets), **SETTINGS[name])["weights"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {}
    for how, kind, name in CASES:
        folder = str(tmp_path_factory.mktemp("out"))
        own = {"targets": SPLIT_BY_ROWS} if how == "tensor" else {"resumes": name == "plain"}
        runs[f"{how} {kind} {name}"] = partial(by_trainer, how, kind, folder, **own, **SETTINGS[name])
    for how, name in TWO_PASSES.items():
        folder = str(tmp_path_factory.mktemp("out"))
        targets = {"targets": SPLIT_BY_ROWS} if how == "tensor" else {}
        runs[f"{how} FMLoRA"] = partial(by_trainer, how, "SFT", folder, "FMLoRA", **targets, **SETTINGS[name])
    for how in HOW:
        folder = str(tmp_path_factory.mktemp("out"))
        runs[f"{how} LoRA"] = partial(by_trainer, how, "SFT", folder, None)
        runs[f"{how} zero"] = partial(by_trainer, how, "SFT", folder, rho=0.0)
    return launch(tmp_path_factory.mktemp("trainers"), runs)


@pytest.mark.filterwarnings("ignore")  # of trl and DeepSpeed
@pytest.mark.parametrize(("how", "kind", "name"), CASES)
def test_two_processes_equal_one(of: Results, folder: str, how: str, kind: str, name: str) -> None:
    targets = tuple(SPLIT_BY_ROWS if how == "tensor" else TARGETS)
    expected = alone(folder, kind, name, targets)
    assert difference(expected, alone(folder, kind, name, targets, None)) > 1e-3
    for rank in of[f"{how} {kind} {name}"]:
        assert difference(rank["weights"], expected) < 1e-5
        if "resumed" in rank:
            assert difference(rank["resumed"], rank["weights"]) == 0


@pytest.mark.filterwarnings("ignore")  # of trl
@pytest.mark.parametrize("how", TWO_PASSES)
def test_fmloras_two_passes_equal_one_process(of: Results, folder: str, how: str) -> None:
    targets = tuple(SPLIT_BY_ROWS if how == "tensor" else TARGETS)
    expected = alone(folder, "SFT", TWO_PASSES[how], targets, "FMLoRA")
    assert difference(expected, alone(folder, "SFT", TWO_PASSES[how], targets, None)) > 1e-3
    for rank in of[f"{how} FMLoRA"]:
        assert difference(rank["weights"], expected) < 1e-5


@pytest.mark.parametrize("how", HOW)
def test_rho_0_is_lora_bit_for_bit(of: Results, how: str) -> None:
    for rank, of_lora in zip(of[f"{how} zero"], of[f"{how} LoRA"], strict=True):
        assert difference(rank["weights"], of_lora["weights"]) == 0
