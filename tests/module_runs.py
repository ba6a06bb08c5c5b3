"""Whole runs of FMLoRAModule and of the FMLoRA callback, watched step by step."""

from typing import Any

import torch
from helpers import (
    Classifier,
    TwoPassClassifier,
    build,
    driver_of,
    fit,
    make_loader,
    make_net,
    weights,
)
from lightning.pytorch import Callback


class Watch(Callback):
    """Learning rate at each batch's end, and rho of each step in which a perturbation is taken."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.radii: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        callback = driver_of(trainer)
        self.radii.append((callback.step, callback.current_rho))


def whole_run(
    tmp_path: Any,
    front_end: str,
    *,
    batches: int = 7,
    accumulate: int = 1,
    clip: tuple[str, float] | None = None,
    scheduler: Any = None,
    val: Any = None,
    classes: Any = (Classifier, TwoPassClassifier),
    loader: Any = None,
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[dict[str, torch.Tensor], Watch, Any]:
    """One run in float64 with dropout; the settings go to the Trainer or to the module, where each belongs."""
    net = make_net(dropout=0.2).double()
    module, callbacks, more = build(front_end, net=net, accumulate=accumulate, classes=classes, **(settings or {}))
    module.scheduler = scheduler
    if clip is not None and front_end == "fmlora":
        more |= {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    elif clip is not None:
        module.gradient_clip_algorithm, module.gradient_clip_val = clip
    watch = Watch()
    loader = make_loader(batches, dtype=torch.float64) if loader is None else loader
    kwargs = {"max_epochs": 5, **kwargs}
    trainer = fit(tmp_path, module, [*callbacks, watch], loader, val=val, **more, **kwargs)
    return weights(module), watch, trainer
