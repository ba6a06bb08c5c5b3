"""What FlatnessMonitor refuses: values, measures, strategies and loaders that can't be held."""

from types import SimpleNamespace
from typing import Any

import pytest
from helpers import FEATURES, ByHand, Classifier, fit, with_own
from hostile_modules import Teaches, by_data
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_flatlora import EFMLoRA, FlatnessMonitor, find_pairs


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(MisconfigurationException) as error:
        FlatnessMonitor(
            -1, every_n_steps=0, every_n_epochs=True, batches=1.5, data="test", measures=["flat"], sigma=0, samples=1
        )
    lines = str(error.value).splitlines()
    assert lines[0] == "FlatnessMonitor: 9 problems"
    for line in (
        "rho must be a finite number > 0, or None to take that of the training method, got -1",
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
        (DetectsInEvalMode, "training_step fails in eval mode.*KeyError: 'losses'"),
        (WritesItsGraph, "training_step fails in eval mode.*RuntimeError: .* inplace operation"),
        (TakesTheLoader, "training_step fails in eval mode.*TypeError: 'NoneType' object is not an iterator"),
    ],
)
def test_a_step_that_fails_in_eval_mode_is_not_measured_and_trains_on(tmp_path: Any, kind: Any, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"nothing is measured in this run: {reason}"):
        trainer = fit(tmp_path, kind(), [FlatnessMonitor(0.5)])
    assert trainer.global_step == 12
    assert not [name for name in trainer.callback_metrics if name.startswith("flatness")]


# -- at the start


class TeachesInTraining(Teaches):
    """A momentum encoder that a step updates in training mode alone, or always."""

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
    "a finder's pairs": (Classifier, OF_A_FINDER, "the finder names no plain Linear as their base"),
    "no validation": (Classifier, {"data": "val"}, "data='val' gives no batch to hold"),
    "manual optimization": (ByHand, {}, "put the loss of a batch into a method compute_loss"),
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
