"""What FlatnessMonitor refuses: values, measures, strategies and loaders that can't be held."""

from types import SimpleNamespace
from typing import Any

import pytest
from helpers import FEATURES, Classifier, fit
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_flatlora import EFMLoRA, FlatnessMonitor, find_pairs
from lightning_flatlora.callbacks import flatness_monitor


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(MisconfigurationException) as error:
        FlatnessMonitor(
            -1, every_n_steps=0, every_n_epochs=True, batches=1.5, data="test", measures=["flat"], sigma=0, samples=1
        )
    lines = str(error.value).splitlines()
    assert lines[0] == "FlatnessMonitor: 9 problems"
    for line in (
        "rho must be a finite number > 0, or None to take that of the method beside it, got -1",
        "every_n_steps and every_n_epochs can't both be given: leave one out",
        "every_n_steps must be an integer >= 1, got 0",
        "every_n_epochs must be an integer >= 1, got True",
        "batches must be an integer >= 1, got 1.5",
        "samples must be an integer >= 2, got 1",
        "data must be 'train' or 'val', got 'test'",
        "sigma must be a finite number > 0, got 0",
    ):
        assert f"  - {line}" in lines
    assert lines[-1].startswith("  - measures holds 'flat', which is none of sharpness, lora_sharpness, ema")


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
    assert "rho must be given where no EFMLoRA, FMLoRA or FMLoRAModule has one" in lines[1]
    assert "the measure 'ema' needs an EFMLoRA callback" in lines[2]
    assert "no LoRA pair to perturb" in lines[3]


def test_expected_sharpness_needs_the_base_of_a_finders_pairs(tmp_path: Any) -> None:
    monitor = FlatnessMonitor(1.0, measures=["expected_sharpness"], finder=lambda model: find_pairs(model).pairs)
    with pytest.raises(MisconfigurationException, match="the finder names no plain Linear as their base"):
        fit(tmp_path, Classifier(), [monitor])


def test_a_finder_of_its_own_takes_the_place_of_the_methods_adapter(tmp_path: Any) -> None:
    monitor = FlatnessMonitor(0.5, finder=lambda model: find_pairs(model).pairs)
    fit(tmp_path, Classifier(), [EFMLoRA(0.5, adapter_name="default"), monitor], max_epochs=1)


def test_a_measurement_that_a_finder_prevents_is_left_out_with_its_reason(tmp_path: Any) -> None:
    calls = []

    def finder(model: nn.Module) -> Any:
        calls.append(model)
        if len(calls) == 2:  # in the first measurement; the first call is at the start of the fit
            raise ValueError("the layers have changed")
        return find_pairs(model).pairs

    with pytest.warns(UserWarning, match="a measurement was left out: ValueError: the layers have changed"):
        fit(tmp_path, Classifier(), [FlatnessMonitor(0.5, every_n_steps=2, batches=1, finder=finder)], max_epochs=1)
    assert len(calls) == 4


class DetectsInEvalMode(Classifier):
    """Gives its losses in training mode alone, as torchvision's detection models do."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        if not self.training:
            return {"boxes": []}["losses"]
        return super().loss(batch, batch_idx)


class WritesItsGraph(Classifier):
    """Has a loss in eval mode, and no gradient, as RWKV and the RNNs of cuDNN."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().loss(batch, batch_idx)
        assert loss is not None
        if not self.training:
            square = loss.square()
            root = square.sqrt()
            root.mul_(1)
            return root
        return loss


class TakesTheLoader(Classifier):
    """Takes batches itself, so none can be kept."""

    def training_step(self, dataloader_iter: Any) -> Any:
        batch, batch_idx, _ = next(dataloader_iter)
        return self.loss(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (DetectsInEvalMode, "KeyError: 'losses'"),
        (WritesItsGraph, "RuntimeError: .* inplace operation"),
        (TakesTheLoader, "TypeError: 'NoneType' object is not an iterator"),
    ],
)
def test_a_step_that_fails_in_eval_mode_is_not_measured_and_trains_on(tmp_path: Any, kind: Any, reason: str) -> None:
    monitor = FlatnessMonitor(0.5)
    with pytest.warns(
        UserWarning, match=f"nothing is measured in this run: training_step fails in eval mode.*{reason}"
    ):
        trainer = fit(tmp_path, kind(), [monitor])
    assert trainer.global_step == 12
    assert not [name for name in trainer.callback_metrics if name.startswith("flatness")]


def test_a_measurement_that_fails_is_left_out(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise ZeroDivisionError("no pass")

    monkeypatch.setattr(flatness_monitor, "measure", failing)
    with pytest.warns(UserWarning, match="FlatnessMonitor: a measurement was left out: ZeroDivisionError: no pass"):
        trainer = fit(tmp_path, Classifier(), [FlatnessMonitor(0.5)])
    assert trainer.global_step == 12


def test_validation_data_needs_a_validation(tmp_path: Any) -> None:
    with pytest.raises(MisconfigurationException, match="data='val' gives no batch to hold"):
        fit(tmp_path, Classifier(), [FlatnessMonitor(1.0, data="val")])


class Teaches(Classifier):
    """A momentum encoder that a step updates, in training mode alone or always."""

    def __init__(self, only_in_training: bool) -> None:
        super().__init__()
        self.only_in_training = only_in_training
        self.head, self.teacher = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.teacher.requires_grad_(False)

    def loss(self, batch: Any, batch_idx: int) -> Any:
        if self.training or not self.only_in_training:
            for own, other in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
                own.data = own.data * 0.5 + other.data * 0.5
        return super().loss((self.head(batch[0]), *batch[1:]), batch_idx)


def test_a_momentum_encoder_that_is_written_in_eval_mode_is_refused(tmp_path: Any) -> None:
    monitor = FlatnessMonitor(0.5, every_n_steps=4)
    with pytest.raises(
        MisconfigurationException, match=r"writes the parameter teacher\.weight in eval mode.*behind `if self.training`"
    ):
        fit(tmp_path, Teaches(only_in_training=False), [monitor], max_steps=1)  # before the first measurement
    trainer = fit(tmp_path, Teaches(only_in_training=True), [monitor])
    assert "flatness/sharpness" in trainer.callback_metrics
