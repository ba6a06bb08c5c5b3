"""The two passes of FMLoRAModule and FMLoRA: what is logged, the same dropout masks, losses that are missing."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import (
    Classifier,
    TwoPassClassifier,
    build,
    fit,
    is_perturbed,
    make_net,
    same,
)
from lightning.pytorch import Callback
from torch import nn

from lightning_flatlora import FMLoRAModule

FRONT_ENDS = ("fmlora", "module")


class Logged(Callback):
    """What the Trainer holds after each batch."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.outputs: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.outputs.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_logging_comes_from_the_clean_pass(tmp_path, front_end):
    """log and log_dict, on steps and over the epoch, and the returned loss; a module's own log works again after."""
    losses: dict[bool, list[float]] = {True: [], False: []}

    class Logs:
        def loss(self, batch: Any, batch_idx: int) -> Any:
            loss = super().loss(batch, batch_idx)
            losses[is_perturbed(self)].append(float(loss.detach()))
            self.log("one", loss, on_step=True, on_epoch=True)
            self.log_dict({"two": loss, "passes": 1.0}, on_step=False, on_epoch=True, reduce_fx="sum")
            return loss

    classes = (type("A", (Logs, Classifier), {}), type("B", (Logs, TwoPassClassifier), {}))
    module, callbacks, kwargs = build(front_end, classes=classes)
    logged = Logged()
    trainer = fit(tmp_path, module, [*callbacks, logged], max_epochs=1, **kwargs)
    clean, moved = losses[False], losses[True]
    assert len(clean) == len(moved) == 6
    assert all(there > here for here, there in zip(clean, moved, strict=True))
    assert [metrics["one_step"] for metrics in logged.metrics] == clean
    assert logged.outputs == clean
    assert float(trainer.callback_metrics["one_epoch"]) == pytest.approx(sum(clean) / 6)
    assert float(trainer.callback_metrics["two"]) == pytest.approx(sum(clean))
    assert float(trainer.callback_metrics["passes"]) == 6
    assert "log" not in module.__dict__


class Masks:
    """The dropout masks that each pass drew."""

    def __init__(self, module: Any) -> None:
        self.passes: list[list[torch.Tensor]] = []
        module.inside.append(lambda *_: None)
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.register_forward_hook(self.hook)
        module.net.register_forward_pre_hook(lambda *_: self.passes.append([]))

    def hook(self, layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.passes[-1].append(output == 0)


class Draws(Callback):
    """Another callback that draws from the generators before each step, as mixing of samples does."""

    def on_train_batch_start(self, *args: Any) -> None:
        torch.rand(3)


@pytest.mark.parametrize("others", ["alone", "drawing-before", "drawing-after", "module-draws"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_both_passes_draw_the_same_masks(tmp_path, front_end, others):
    module, callbacks, kwargs = build(front_end, net=make_net(dropout=0.5))
    masks = Masks(module)
    if others == "drawing-before":
        callbacks = [Draws(), *callbacks]
    elif others == "drawing-after":
        callbacks = [*callbacks, Draws()]
    elif others == "module-draws":
        module.on_train_batch_start = lambda batch, batch_idx: (torch.rand(3), None)[1]
    fit(tmp_path, module, callbacks, **kwargs)
    firsts, seconds = masks.passes[::2], masks.passes[1::2]
    assert len(firsts) == len(seconds) == 12
    assert same(firsts, seconds)
    assert not any(same(one, two) for one, two in pairwise(firsts))


@pytest.mark.parametrize("wrong", [3.0, "loss", {"value": 1}])
def test_compute_loss_must_return_a_loss(tmp_path, wrong):
    class Wrong(TwoPassClassifier):
        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            return wrong

    with pytest.raises(TypeError, match="compute_loss must return the loss as a tensor"):
        fit(tmp_path, Wrong(0.5), [])


def test_compute_loss_is_the_users(tmp_path):
    class Missing(TwoPassClassifier):
        compute_loss = FMLoRAModule.compute_loss

    with pytest.raises(NotImplementedError, match="Missing must define compute_loss"):
        fit(tmp_path, Missing(0.5), [])
