"""rho = 0 is the base run bit for bit, dropout included, and rho > 0 is not.

The first half shows that the machinery around the steps changes nothing, the second that it is no silent no-op.
"""

from typing import Any

import pytest
import torch
from helpers import FRONT_ENDS, build, fit, make_loader, make_net, same, weights
from lightning.pytorch import Callback


class Course(Callback):
    """The weights after every batch, and the losses that the Trainer was given."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.weights.append(weights(pl_module))
        # in automatic optimization Lightning hands out the loss divided by the window
        self.losses.append(outputs["loss"] * trainer.accumulate_grad_batches)


def course(tmp_path: Any, front_end: str, accumulate: int, clip: float | None, precision: str, **settings: Any) -> Any:
    """One run with dropout and a scheduler: weights and losses batch by batch, Adam's state, the generator's state."""
    if clip is not None and "module" in front_end:
        module, callbacks, kwargs = build(front_end, net=make_net(0.3), accumulate=accumulate, **settings)
        module.gradient_clip_val = clip
    else:
        module, callbacks, kwargs = build(front_end, net=make_net(0.3), accumulate=accumulate, **settings)
        kwargs["gradient_clip_val"] = clip
    module.scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    seen = Course()
    loader = make_loader(5)
    trainer = fit(tmp_path, module, [*callbacks, seen], loader, val=make_loader(2), precision=precision, **kwargs)
    states = trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.get_last_lr()
    return seen.weights, seen.losses, states, torch.get_rng_state()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.05)])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_rho_zero_is_the_base_run(tmp_path, front_end, accumulate, clip, precision):
    base = course(tmp_path, "plain", accumulate, clip, precision)
    ours = course(tmp_path, front_end, accumulate, clip, precision, rho=0)
    for what, left, right in zip(("weights", "losses", "optimizer", "generator"), base, ours, strict=True):
        assert same(left, right), what


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_rho_above_zero_is_not(tmp_path, front_end, accumulate):
    """From the first step on that has a perturbation: FMLoRA's first, EFMLoRA's second."""
    base, *_ = course(tmp_path, "plain", accumulate, None, "32-true")
    ours, *_ = course(tmp_path, front_end, accumulate, None, "32-true", rho=0.5)
    steps = [i for i in range(10) if (i % 5 + 1) % accumulate == 0 or i % 5 == 4]
    differs = [not same(base[i], ours[i]) for i in steps]
    assert differs == [front_end != "efmlora"] + [True] * (len(steps) - 1)
