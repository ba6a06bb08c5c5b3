"""Schedules of rho: their values, what is refused, and schedules among a module's hyperparameters."""

import math
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Classifier, TwoPassClassifier, fit, make_loader, trainer_of
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatlora import (
    AdapterCheckpoint,
    ConstantRho,
    CosineRho,
    InverseSqrtRho,
    LearningRateRho,
    LinearRho,
    RhoSchedule,
)


def test_values() -> None:
    assert [ConstantRho(2.0)(t) for t in (0, 5)] == [2.0, 2.0]
    assert [LinearRho(1.0, 3.0)(t, horizon=4) for t in range(6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert [round(CosineRho(2.0, 1.0)(t, horizon=2), 12) for t in range(4)] == [2.0, 1.5, 1.0, 1.0]
    assert [InverseSqrtRho(6.0)(t) for t in (0, 3, 8)] == [6.0, 3.0, 2.0]
    assert [LearningRateRho(2.0)(9, learning_rate=lr) for lr in (0.0, 0.5, 1.0)] == [0.0, 1.0, 2.0]


def test_total_steps_takes_the_place_of_the_runs_length() -> None:
    assert LinearRho(1.0, 3.0, total_steps=4)(2, horizon=100) == 2.0
    assert LinearRho(1.0, 3.0, total_steps=4)(2, horizon=math.inf) == 2.0


@pytest.mark.parametrize("kind", [ConstantRho, InverseSqrtRho, LearningRateRho])
@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), "1", True, None])
def test_bad_radius_is_refused(kind: type[RhoSchedule], bad: object) -> None:
    with pytest.raises(ValueError, match=r"rho must be a finite number >= 0, got"):
        kind(bad)  # type: ignore[call-arg]


def test_all_bad_values_in_one_message() -> None:
    with pytest.raises(ValueError, match=r"start must be .* got -1; end must be .* got nan; total_steps must be .* 0"):
        CosineRho(-1, float("nan"), total_steps=0)


def test_numbers_of_numpy_are_numbers() -> None:
    assert ConstantRho(np.float32(0.5))(0) == 0.5  # type: ignore[arg-type]
    assert LinearRho(np.int64(1), 0.0, total_steps=np.int64(4))(2) == 0.5  # type: ignore[arg-type]


@dataclass(frozen=True)
class Halved(RhoSchedule):
    """A user-defined schedule, whose fields need not be radii."""

    rho: float
    every: int
    milestones: tuple[int, ...] = ()
    offset: float = -3.0

    def __call__(self, step: int, horizon: float = float("inf"), learning_rate: float = 1.0) -> float:
        return self.rho / 2 ** (step // self.every)


class Plain(RhoSchedule):
    """A user-defined schedule that is not a dataclass."""

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


class OfModules(Classifier):
    """As in project templates, whose configuration creates the network."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


@dataclass
class Settings:
    rate: float


@pytest.mark.skipif("weights_only" not in signature(Trainer.fit).parameters, reason="this Lightning loads anything")
def test_hyperparameters_that_pytorch_would_not_load_are_named_at_the_start(tmp_path: Path) -> None:
    saver, last = AdapterCheckpoint(tmp_path, save_last=True), tmp_path / "last.ckpt"
    with pytest.warns(UserWarning, match=r"PyTorch loads test_schedules.Settings only from a file .*. Leave"):
        fit(tmp_path, OfModules(Settings(0.1)), [saver], max_epochs=1)
    module = OfModules({"rate": 0.1})
    saver = AdapterCheckpoint(tmp_path / "other")
    with pytest.raises(MisconfigurationException, match="Weights only load failed"):
        fit(tmp_path, module, [saver], ckpt_path=last)
    trainer = trainer_of(tmp_path, [saver], max_epochs=2, limit_val_batches=0)
    trainer.fit(module, make_loader(), make_loader(1), ckpt_path=last, weights_only=False)
    assert trainer.global_step == 12


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
def test_a_schedule_is_loaded_from_a_file_that_nobody_trusts(tmp_path, schedule):
    torch.save({"rho": schedule}, tmp_path / "file")
    assert torch.load(tmp_path / "file", weights_only=True)["rho"] == schedule


def test_a_checkpoint_with_a_schedule_loads(tmp_path):
    """With load_from_checkpoint, and to resume."""
    schedule, file = Plain([0.5, 0.2]), tmp_path / "file.ckpt"
    fit(tmp_path, Module(schedule), [ModelCheckpoint(tmp_path, filename="file")], max_epochs=1)
    assert Module.load_from_checkpoint(file, weights_only=True).hparams["rho"] == schedule
    again = Module(schedule)
    fit(tmp_path, again, [], ckpt_path=file)
    assert again._callback.step == 12


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_loggers_take_a_schedule(tmp_path, logger):
    kind: Any = logger(tmp_path, name="run", version=0)
    fit(tmp_path, Module(LinearRho(1.0, 0.5)), [], max_epochs=1, logger=kind, log_every_n_steps=1)
    kind.save()
    text = (tmp_path / "run" / "version_0" / "hparams.yaml").read_text()
    # Lightning writes only the fields if omegaconf is installed, and otherwise the class as well.
    assert "start: 1.0" in text
    assert "end: 0.5" in text
