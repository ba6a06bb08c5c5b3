"""rho = 0 is the base run bit for bit, with accumulation, clipping and 16 bits: weights, losses, states and draws.

That another rho is not, and other modules, are in tests/test_hostile_modules.py, and for the baselines in
tests/baselines/test_baselines_exactness.py.
"""

from functools import cache
from typing import Any

import pytest
import torch
from helpers import BASELINES, FRONT_ENDS, build, fit, make_loader, make_net, same, weights
from lightning.pytorch import Callback


class Course(Callback):
    """The weights after every batch, and the losses that the Trainer was given."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.weights.append(weights(pl_module))
        # In automatic optimization Lightning hands out the loss divided by the window.
        divisor = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self.losses.append(outputs["loss"] * divisor)


@cache
def course(front_end: str, accumulate: int, clip: float | None, precision: str) -> Any:
    """One run with dropout and a scheduler: weights and losses batch by batch, Adam's state, the generator's state."""
    module, callbacks, kwargs = build(front_end, rho=0, net=make_net(0.3), accumulate=accumulate)
    if "module" in front_end:
        module.gradient_clip_val = clip
    else:
        kwargs["gradient_clip_val"] = clip
    module.scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    seen = Course()
    loader = make_loader(5)
    trainer = fit(None, module, [*callbacks, seen], loader, val=make_loader(2), precision=precision, **kwargs)
    states = trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.get_last_lr()
    return seen.weights, seen.losses, states, torch.get_rng_state()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.05)])
@pytest.mark.parametrize("front_end", [*FRONT_ENDS, *BASELINES])
def test_rho_zero_is_the_base_run(front_end, accumulate, clip, precision):
    base = course("plain", accumulate, clip, precision)
    ours = course(front_end, accumulate, clip, precision)
    for what, left, right in zip(("weights", "losses", "optimizer", "generator"), base, ours, strict=True):
        assert same(left, right), what
