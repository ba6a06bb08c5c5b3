"""The precision in which the device is fast: what is chosen, what overrides it, and that a run's file keeps it."""

from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.command_line import precision
from recipes.command_line.cli import RecipeCLI
from recipes.command_line.configs import RECIPES
from recipes.command_line.precision import fast_precision
from recipes.instruction_tuning.module import InstructionTuning


@pytest.fixture(autouse=True)
def _ask_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with only a CPU, and without the setting."""
    monkeypatch.setattr("sys.argv", ["test"])  # LightningCLI warns if there are arguments besides those it is given
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # caused by Lightning
    monkeypatch.delenv(precision.SETTING, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_fast_bfloat16", lambda: False)


@pytest.fixture
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_fast_bfloat16", lambda: True)


# -- what is chosen


@pytest.mark.parametrize(("answer", "chosen"), [(True, "bf16-mixed"), (False, "32-true"), (None, "32-true")])
def test_a_cpu_is_asked_for_its_instructions(answer: bool | None, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if answer is None:  # as in another release of PyTorch
        monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    else:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: answer)
    # The answer doesn't depend on how busy the machine is.
    assert {fast_precision("cpu") for _ in range(20)} == {fast_precision()} == {chosen}


@pytest.mark.parametrize(
    ("bfloat16", "capability", "chosen"),
    [(True, (8, 0), "bf16-mixed"), (False, (7, 5), "16-mixed"), (False, (6, 1), "32-true")],
)
def test_a_gpu_is_asked(
    bfloat16: bool, capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch, slow_bfloat16: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert fast_precision("auto") == fast_precision("gpu") == chosen
    assert fast_precision("cpu") == "32-true"  # whatever other devices there are


def test_the_setting_overrides(monkeypatch: pytest.MonkeyPatch, slow_bfloat16: None) -> None:
    monkeypatch.setenv(precision.SETTING, "bf16-mixed")
    assert fast_precision() == "bf16-mixed"
    monkeypatch.setenv(precision.SETTING, "float7")
    with pytest.raises(MisconfigurationException, match=r"FLATLORA_PRECISION must hold one of 32-true, .*got 'float7'"):
        fast_precision()


# -- recipes


def cli(*more: str) -> RecipeCLI:
    given = ["--model=test_cli.Tiny", "--data=test_cli.Numbers", "--trainer.accelerator=cpu"]
    return RecipeCLI([*given, "--trainer.logger=false", *more], run=False)


def test_null_is_filled_in_and_kept(fast_bfloat16: None) -> None:
    chosen = cli("--trainer.precision=null")
    assert chosen.trainer.precision == "bf16-mixed"
    (saver,) = [each for each in chosen.trainer.callbacks if isinstance(each, SaveConfigCallback)]  # type: ignore[attr-defined]
    assert saver.config.trainer.precision == "bf16-mixed"  # a run resumed with its config.yaml keeps it
    assert cli("--trainer.precision=32-true").trainer.precision == "32-true"
    plugin = "lightning.pytorch.plugins.DoublePrecision"
    assert cli(f"--trainer.plugins=[{{class_path: {plugin}}}]").trainer.precision == "64-true"


def test_processes_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their collectives would wait for each other, or receive tensors of an unexpected size."""
    monkeypatch.setattr("recipes.command_line.cli.gathered", lambda own: [own, "bf16-mixed"])
    chosen = cli("--trainer.precision=32-true", "--trainer.max_epochs=1")
    with pytest.raises(MisconfigurationException, match=r"\(32-true, bf16-mixed\).*one by --trainer.precision"):
        chosen.trainer.fit(chosen.model, chosen.datamodule)


def test_every_base_leaves_it_open() -> None:
    for base in RECIPES.glob("*/configs/base.yaml"):
        assert yaml.safe_load(base.read_text())["trainer"]["precision"] is None, base


@pytest.mark.parametrize(("trained_in", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_frozen_weights_are_as_the_trainer_computes(tiny: str, trained_in: Any, dtype: torch.dtype) -> None:
    trainer = L.Trainer(accelerator="cpu", precision=trained_in, logger=False, enable_checkpointing=False)
    for given, expected in ((None, dtype), ("float16", torch.float16)):
        module = InstructionTuning(model=tiny, dtype=given)
        module.trainer = trainer
        module.configure_model()
        frozen = {parameter.dtype for parameter in module.parameters() if not parameter.requires_grad}
        trained = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
        assert frozen == {expected}
        assert trained == {torch.float32}
