"""Two passes are one step, beyond what tests/test_hostile_modules.py says: gradients, logging, and what is refused."""

from typing import Any

import pytest
import torch
from helpers import FRONT_ENDS, TWO_PASSES, build, driver_of, fit, make_loader, make_net, same, weights
from hostile_modules import TEACHERS, Teaches
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_flatlora import EFMLoRA, FMLoRA, LinearRho
from lightning_flatlora.baselines import SAM, LoRASAM
from lightning_flatlora.methods import put_back


class Counts:
    """In buffers of floats and of integers, and one level deeper than what is put back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("floats", torch.zeros(100))
        self.register_buffer("packed", torch.zeros(10, dtype=torch.int32))
        self.counts = {"batches": [0]}

    def loss(self, batch: Any, batch_idx: int) -> Any:
        self.floats += 1
        self.packed += 1
        self.counts["batches"][0] += 1
        return super().loss(batch, batch_idx)


@pytest.mark.parametrize(
    ("limits", "counted"),
    [({}, (6, 6)), ({"_MOST_BYTES": 40}, (12, 6)), ({"_MOST_BYTES_OF_INTEGERS": 39}, (6, 12))],
)
def test_large_buffers_and_what_lies_deeper_see_both_passes(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], counted: tuple[int, int]
) -> None:
    """The documented limits: such counts belong in on_train_batch_end."""
    for name, limit in limits.items():
        monkeypatch.setattr(put_back, name, limit)
    module, callbacks, more = build("fmlora", own=Counts)
    fit(tmp_path, module, callbacks, max_epochs=1, **more)
    assert (int(module.floats[0]), int(module.packed[0])) == counted
    assert module.counts == {"batches": [12]}


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("kind", TWO_PASSES)
def test_a_momentum_encoder_is_refused_inside_of_a_step(tmp_path: Any, kind: str, name: str) -> None:
    class Inside(Teaches):
        def loss(self, batch: Any, batch_idx: int) -> Any:
            TEACHERS[name](self)
            return super().loss(batch, batch_idx)

    module, callbacks, more = build(kind, own=Inside)
    message = rf"writes the parameter {name}\..* no optimizer trains.*on_train_batch_end"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, module, callbacks, max_epochs=1, **more)


class Logs(Callback):
    """Logs around the backward pass, by the method that Lightning gives to callbacks, and what the step returned."""

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.log("before", loss.detach(), on_step=False, on_epoch=True, batch_size=4)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.log("after", float(trainer.global_step), on_step=False, on_epoch=True, batch_size=4)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.log("returned", outputs["loss"], on_step=False, on_epoch=True, batch_size=4)


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_what_is_returned_and_logged_around_the_backward_pass_is_that_of_the_first(tmp_path: Any, kind: str) -> None:
    """At a learning rate of 0, where the clean passes of all runs agree."""
    logged = []
    for each in ("plain", kind):
        module, callbacks, more = build(each, lr=0.0)
        module.optimizer_class = torch.optim.SGD
        logged.append(fit(tmp_path, module, [*callbacks, Logs()], **more).callback_metrics)
    assert set(logged[0]) == {"before", "after", "returned"}
    assert same(*logged)


class HalvesGradients:
    """In a hook after backward; notes the norm of each step's gradient."""

    norms: tuple[Tensor, ...] = ()

    def on_after_backward(self) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad *= 0.5

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms += (nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]),)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [EFMLoRA, FMLoRA, LoRASAM, SAM])
def test_a_modules_own_hook_changes_each_gradient_once(tmp_path: Any, make: Any, accumulate: int) -> None:
    """At rho near 0 the step is plain LoRA's, whatever the hooks around backward do to its gradient."""
    norms = []
    for callbacks in ([], [make(1e-6)]):
        module, _, more = build("plain", own=HalvesGradients, accumulate=accumulate)
        module.optimizer_class = torch.optim.SGD  # Adam would make steps of 1e-6's gradients, too
        fit(tmp_path, module, callbacks, max_epochs=1, **more)
        norms.append(torch.stack(module.norms))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)


class FreeWeights:
    """Loss weights in a plain list, which no module lists as parameters; one joins the optimizer in mid-fit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.free = [nn.Parameter(torch.ones(3, dtype=torch.float64))]
        self.seen: list[list[Tensor]] = []

    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        weighted = sum((weight * batch_idx).sum() for weight in self.free)
        return super().loss(batch, batch_idx) + weighted

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.add_param_group({"params": self.free[:]})
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.net.late = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.free.append(self.net.late)
            self.trainer.optimizers[0].add_param_group({"params": [self.free[-1]]})

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append([weight.grad.clone() for weight in self.free if weight.grad is not None])


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_parameters_outside_the_module_have_one_gradient(tmp_path: Any, kind: str) -> None:
    module, callbacks, more = build(kind, own=FreeWeights, net=make_net().double(), accumulate=2)
    fit(tmp_path, module, callbacks, make_loader(4, dtype=torch.float64), max_epochs=1, **more)
    for mean, grads, expected in zip([0.5, 2.5], module.seen, [1, 2], strict=True):
        assert len(grads) == expected
        for grad in grads:
            torch.testing.assert_close(grad, torch.full_like(grad, mean))


class Wrapping(torch.optim.Optimizer):
    """An optimizer around another one, as Lookahead is."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.optimizer = torch.optim.AdamW(parameters, lr=lr)
        super().__init__(self.optimizer.param_groups, {})
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_an_optimizer_around_another_one_takes_the_same_steps(tmp_path: Any, front_end: str) -> None:
    runs = []
    for optimizer in (torch.optim.AdamW, Wrapping):
        module, callbacks, more = build(front_end, LinearRho(0.5, 0.1))
        module.optimizer_class = optimizer
        trainer = fit(tmp_path, module, callbacks, **more)
        runs.append((driver_of(trainer).step, weights(module)))
    assert runs[0][0] == 12
    assert same(*runs)
