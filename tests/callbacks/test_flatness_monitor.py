"""FlatnessMonitor: it doesn't change a bit of the run, can be used again, and refuses what it can't measure."""

import copy
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    FEATURES,
    FRONT_ENDS,
    ByHand,
    Classifier,
    FromIterator,
    assert_no_trace,
    build,
    fit,
    make_loader,
    make_net,
    same,
    weights,
    with_own,
)
from hostile_modules import Teaches, by_data
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from monitored_runs import ALL_BUT_EMA, Recorder, measured
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_flatlora import EFMLoRA, FlatnessMonitor, FMLoRA, find_pairs

pytestmark = pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode at the start of training")


class Rich:
    """All that a measurement could disturb: BatchNorm, dropout, a metric, noise of every generator, lists, logging."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        torch.manual_seed(0)
        self.norm, self.scripted = nn.BatchNorm1d(FEATURES), torch.jit.script(nn.Sequential(nn.BatchNorm1d(FEATURES)))
        self.frozen = nn.Dropout(0.5).eval()
        self.mean = MeanMetric()
        self.losses: list[Tensor] = []
        self.calls = 0

    def loss(self, batch: Any, batch_idx: int) -> Any:
        inputs, *rest = batch
        inputs.mul_(1.5)  # a step may change its batch
        inputs = self.frozen(self.scripted(inputs))
        inputs = self.norm(inputs + 0.1 * torch.randn_like(inputs) + 0.1 * random.random() + 0.1 * np.random.rand())
        loss = super().loss((inputs, *rest), batch_idx)  # type: ignore[misc]
        if self.trainer.validating:  # type: ignore[attr-defined]
            return loss
        self.mean.update(loss.detach())
        self.losses.append(loss.detach())
        self.calls += 1
        self.log("loss", loss.detach(), on_step=True, on_epoch=True)  # type: ignore[attr-defined]
        self.log("mean", self.mean, on_step=False, on_epoch=True)  # type: ignore[attr-defined]
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("sum", torch.stack(self.losses).sum())  # type: ignore[attr-defined]
        self.losses.clear()


class Course(Callback):
    """All training state after each batch and epoch."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        streams = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        gradients = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        kept = pl_module.calls, list(pl_module.losses), pl_module.mean.mean_value.clone(), pl_module.mean._update_count
        buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
        modes = [module.training for module in pl_module.modules()]
        self.states.append([weights(pl_module), gradients, streams, kept, buffers, optimizer, modes, outputs])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states.append(own_metrics(trainer))


def own_metrics(trainer: Any) -> dict[str, Tensor]:
    """The metrics that the module itself has logged."""
    metrics = {**trainer.callback_metrics, **trainer.logged_metrics}
    return {name: torch.as_tensor(value).clone() for name, value in metrics.items() if "flatness" not in name}


def run(
    tmp_path: Any, front_end: str, monitors: list[FlatnessMonitor], first: bool = True, **settings: Any
) -> tuple[Course, Any, Recorder]:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    module, callbacks, kwargs = build(front_end, net=make_net(0.3), own=Rich, **settings)
    course, logger = Course(), Recorder()
    callbacks = [*monitors, *callbacks, course] if first else [*callbacks, *monitors, course]
    loader = torch.utils.data.DataLoader(make_loader(5).dataset, batch_size=4, shuffle=True)
    fit(tmp_path, module, callbacks, loader, val=make_loader(2), logger=logger, log_every_n_steps=1, **kwargs)
    assert_no_trace(module)
    return course, module, logger


BEFORE_OTHERS = [(front_end, 1, True) for front_end in ("plain", *FRONT_ENDS)]


@pytest.mark.parametrize(("front_end", "accumulate", "first"), [*BEFORE_OTHERS, ("efmlora", 2, False)])
def test_a_run_with_it_is_the_run_without_it(tmp_path: Any, front_end: str, accumulate: int, first: bool) -> None:
    measures = [*ALL_BUT_EMA, "ema"] if "efmlora" in front_end else list(ALL_BUT_EMA)
    if front_end != "plain":  # it takes longer than all others together, and runs the same passes
        measures.remove("top_eigenvalue")
    monitors = [
        FlatnessMonitor(0.3, every_n_steps=1, batches=2, measures=measures, samples=2, per_layer=True),
        FlatnessMonitor(0.7, every_n_epochs=1, batches=1, data="val"),
    ]
    without, _, quiet = run(tmp_path, front_end, [], accumulate=accumulate)
    with_it, _, logger = run(tmp_path, front_end, monitors, first, accumulate=accumulate)
    assert len(without.states) == len(with_it.states) > 5
    for left, right in zip(without.states, with_it.states, strict=True):
        assert same(left, right)
    assert len(logger.measured) == 2 * (5 if accumulate == 1 else 3) + 2
    others = [row for row in logger.rows if "flatness/loss" not in row[1]]
    assert str(others) == str(quiet.rows)


def test_checkpoints_can_follow_a_measure(tmp_path: Any) -> None:
    best = ModelCheckpoint(tmp_path, monitor="flatness/sharpness", save_on_train_epoch_end=True)
    rows = measured(tmp_path, Classifier(), [FlatnessMonitor(0.5), best], max_epochs=3)
    assert math.isclose(float(best.best_model_score), min(row["sharpness"] for row in rows), rel_tol=1e-6)


def test_it_can_be_used_for_another_run(tmp_path: Any) -> None:
    monitor, rows = FlatnessMonitor(every_n_steps=3), []
    for callback in (EFMLoRA(0.5), FMLoRA(0.3)):
        rows += measured(tmp_path, Classifier(), [callback, monitor], max_epochs=1)
    assert ["ema_gap" in row for row in rows] == [True, True, False, False]


# -- what it refuses, and what it leaves out


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(MisconfigurationException) as error:
        FlatnessMonitor(
            -1, every_n_steps=0, every_n_epochs=True, batches=1.5, data="test", measures=["flat"], sigma=0, samples=1
        )
    lines = str(error.value).splitlines()
    assert lines[0] == "FlatnessMonitor: 9 problems"
    assert "  - every_n_steps and every_n_epochs can't both be given: leave one out" in lines
    for name in ("rho", "every_n_steps", "every_n_epochs", "batches", "samples", "data", "sigma"):
        assert any(line.startswith(f"  - {name} must be ") for line in lines)
    assert lines[-1].startswith("  - measures holds 'flat', which is not one of sharpness, lora_sharpness, ema")


@pytest.mark.parametrize("measures", ["sharpness", [], 3])
def test_measures_are_a_list_of_names(measures: Any) -> None:
    with pytest.raises(MisconfigurationException, match="measures must be None or a list of names among sharpness"):
        FlatnessMonitor(1.0, measures=measures)


def test_scipy_is_asked_for_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_flatlora.flatness.measures.find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r"needs scipy: pip install 'lightning-flatlora\[flatness\]'"):
        FlatnessMonitor(1.0, measures=["top_eigenvalue"])


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy, XLAStrategy])
def test_sharded_models_are_refused_at_the_start(strategy: Any) -> None:
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy), callbacks=[])
    with pytest.raises(MisconfigurationException, match=f"{strategy.__name__} is not supported.*use one device or"):
        FlatnessMonitor(1.0).on_fit_start(trainer, Classifier())


def test_a_start_that_lacks_everything_says_so_at_once(tmp_path: Any) -> None:
    module = Classifier(net=nn.Linear(FEATURES, 3))
    with pytest.raises(MisconfigurationException) as error:
        fit(tmp_path, module, [FlatnessMonitor(measures=["ema", "expected_sharpness"])])
    lines = str(error.value).splitlines()
    assert lines[0] == "FlatnessMonitor: 3 problems"
    assert "rho must be given without an EFMLoRA, FMLoRA or FMLoRAModule" in lines[1]
    assert "the measure 'ema' needs an EFMLoRA callback" in lines[2]
    assert "no LoRA pair to perturb" in lines[3]


def test_a_finder_of_its_own_takes_the_place_of_the_methods_adapter(tmp_path: Any) -> None:
    monitor = FlatnessMonitor(0.5, finder=lambda model: find_pairs(model).pairs)
    fit(tmp_path, Classifier(), [EFMLoRA(0.5, adapter_name="default"), monitor], max_epochs=1)


class DetectsInEvalMode(Classifier):
    """Returns its losses in training mode only, as torchvision's detection models do."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        if not self.training:
            return {"boxes": []}["losses"]
        return super().loss(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (DetectsInEvalMode, "training_step fails in eval mode.*KeyError: 'losses'"),
        (
            with_own(FromIterator)[0],
            "training_step fails in eval mode.*TypeError: 'NoneType' object is not an iterator",
        ),
    ],
)
def test_a_step_that_fails_in_eval_mode_is_not_measured_and_trains_on(tmp_path: Any, kind: Any, reason: str) -> None:
    module, plain = kind(), kind()
    with pytest.warns(UserWarning, match=f"nothing is measured in this run: {reason}"):
        trainer = fit(tmp_path, module, [FlatnessMonitor(0.5)])
    fit(tmp_path, plain, [])
    assert same(weights(module), weights(plain))
    assert not [name for name in trainer.callback_metrics if name.startswith("flatness")]


# -- at the start


class TeachesInTraining(Teaches):
    """A momentum encoder that each step updates, in training mode only."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        if self.training:
            by_data(self)
        return super().loss(batch, batch_idx)


class TeachesAlways(Teaches):
    def loss(self, batch: Any, batch_idx: int) -> Any:
        by_data(self)
        return super().loss(batch, batch_idx)


OF_A_FINDER: dict[str, Any] = {"measures": ["expected_sharpness"], "finder": lambda model: find_pairs(model).pairs}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a finder's pairs": (Classifier, OF_A_FINDER, "the finder does not name a plain Linear as their base"),
    "no validation": (Classifier, {"data": "val"}, "data='val', but this fit has no validation"),
    "manual optimization": (ByHand, {}, "compute the loss of a batch in a method compute_loss"),
    "a momentum encoder": (
        with_own(TeachesAlways)[0],
        {},
        r"writes the parameter teacher\.weight in eval mode.*if self.training",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_measured_is_refused(tmp_path: Any, what: str) -> None:
    make, settings, message = REFUSED[what]
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, make(), [FlatnessMonitor(1.0, **settings)], max_steps=1)


def test_what_is_written_in_training_mode_alone_is_measured(tmp_path: Any) -> None:
    trainer = fit(tmp_path, with_own(TeachesInTraining)[0](), [FlatnessMonitor(0.5)])
    assert "flatness/sharpness" in trainer.callback_metrics
