"""Schedules among a module's hyper-parameters: checkpoints load with weights_only, and loggers take them."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import TwoPassClassifier, fit, make_loader, trainer_of
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_flatlora import (
    ConstantRho,
    CosineRho,
    EFMLoRA,
    FMLoRA,
    InverseSqrtRho,
    LearningRateRho,
    LinearRho,
    RhoSchedule,
)


@dataclass(frozen=True)
class Halved(RhoSchedule):
    """A user's own."""

    rho: float
    every: int

    def __call__(self, step: int, horizon: float = float("inf"), learning_rate: float = 1.0) -> float:
        return self.rho / 2 ** (step // self.every)


class Plain(RhoSchedule):
    """A user's own, without a dataclass."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __call__(self, step: int, horizon: float = float("inf"), learning_rate: float = 1.0) -> float:
        return self.values[min(step, len(self.values) - 1)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and self.values == other.values


class Module(TwoPassClassifier):
    def __init__(self, rho: RhoSchedule, name: str = "any") -> None:
        super().__init__(rho)
        self.save_hyperparameters()


SCHEDULES = [
    ConstantRho(0.5),
    LinearRho(1.0, 0.5),
    CosineRho(1.0, 0.5, total_steps=7),
    InverseSqrtRho(1.0),
    LearningRateRho(1.0),
    Halved(1.0, 3),
    Plain([0.5, 0.2]),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_checkpoint_with_a_schedule_loads(tmp_path, schedule):
    """By torch.load, by load_from_checkpoint, and to resume."""
    module = Module(schedule)
    fit(tmp_path, module, [ModelCheckpoint(tmp_path, filename="file")], max_epochs=1)
    file = tmp_path / "file.ckpt"
    assert torch.load(file, weights_only=True)["hyper_parameters"]["rho"] == schedule
    assert Module.load_from_checkpoint(file, weights_only=True).hparams["rho"] == schedule
    again = Module(schedule)
    trainer = trainer_of(tmp_path, [], max_epochs=2)
    trainer.fit(again, make_loader(), make_loader(1), ckpt_path=file)
    assert again._driver.step == 12


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_loggers_take_a_schedule(tmp_path, logger):
    kind: Any = logger(tmp_path, name="run", version=0)
    fit(tmp_path, Module(LinearRho(1.0, 0.5)), [], max_epochs=1, logger=kind, log_every_n_steps=1)
    kind.save()
    text = (tmp_path / "run" / "version_0" / "hparams.yaml").read_text()
    # Lightning writes the fields alone where omegaconf is installed, and the class beside them where it is not.
    assert "start: 1.0" in text
    assert "end: 0.5" in text


@pytest.mark.parametrize("callback", [EFMLoRA, FMLoRA])
def test_the_radius_may_be_read_and_set(callback: Any) -> None:
    method = callback(0.5)
    assert method.rho(0) == 0.5
    method.rho = 0.1
    assert method.size(0) == 0.1
    method.rho = LinearRho(0.2, 0.2)
    assert method.size(3, 10.0) == pytest.approx(0.2)
