"""Two passes are one step; and a batch that is called off, is skipped or fails leaves the clean weights behind.

For what a step may write, see tests/test_hostile_modules.py.
"""

import copy
import signal
from itertools import product
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import (
    FRONT_ENDS,
    TWO_PASSES,
    E_hat,
    assert_copies_are_plain,
    assert_no_trace,
    build,
    calling,
    driver_of,
    fit,
    is_installed,
    is_perturbed,
    make_loader,
    same,
    trainer_of,
    weights,
)
from hostile_modules import TEACHERS, Teaches
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from shadows import shown, watched
from torch import Tensor, nn

from lightning_flatlora import EFMLoRA, FMLoRA
from lightning_flatlora.baselines import SAM, LoRASAM
from lightning_flatlora.callbacks.training_step import leave_batch_out
from lightning_flatlora.methods import put_back


@pytest.mark.parametrize("hook_of", ["module", "callback"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_batch_start_returns_minus_one(tmp_path, front_end, hook_of):
    """The rest of the epoch is skipped after E was switched on; the next epoch runs as usual."""
    module, callbacks, kwargs, _ = watched(front_end)
    answer = lambda *args: -1 if args[-1] == 2 else None  # noqa: E731
    if hook_of == "module":
        module.on_train_batch_start = answer
    else:
        callbacks.append(calling(on_train_batch_start=answer))
    ends: list[bool] = []

    def look(trainer: Any, pl_module: Any, *args: Any) -> None:
        ends.append(is_perturbed(pl_module))

    at_ends = calling(on_train_epoch_start=look, on_train_end=look, on_validation_batch_start=look)
    trainer = fit(tmp_path, module, [*callbacks, at_ends], val=make_loader(1), **kwargs)
    assert trainer.global_step == (4 if hook_of == "module" else 12)
    assert not any(ends)
    assert_no_trace(module)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("front_end", ["fmlora", "module"])
def test_a_second_pass_without_a_loss_leaves_the_batch_out(tmp_path, front_end, accumulate):
    """Just as if the first pass had none: the weights end up the same."""

    def trained(pass_number: int) -> Any:
        module, callbacks, kwargs = build(front_end, accumulate=accumulate)
        calls: list[int] = []

        def guard(module: Any, batch_idx: int) -> str | None:
            calls.append(batch_idx)
            return "skip" if batch_idx == 3 and is_perturbed(module) is (pass_number == 2) else None

        module.inside.append(guard)
        fit(tmp_path, module, callbacks, max_epochs=1, **kwargs)
        assert calls.count(3) == pass_number
        assert_no_trace(module)
        return weights(module)

    with pytest.warns(UserWarning, match="returned None in the second pass .* the batch is left out.*rho may be too"):
        second = trained(2)
    assert same(second, trained(1))


def test_a_second_pass_without_a_loss_is_refused_where_it_would_break_the_step(tmp_path):
    module, callbacks, kwargs = build("fmlora")
    module.inside.append(lambda module, batch_idx: "skip" if is_perturbed(module) else None)
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    with pytest.raises(RuntimeError, match=r"second pass of a step.*the loss scaler would wait.*0 \* output.sum\(\)"):
        fit(tmp_path, module, callbacks, plugins=[scaled], **kwargs)
    with pytest.raises(RuntimeError, match=r"second pass of a step.*Other ranks or the loss scaler would wait"):
        leave_batch_out(Mock(world_size=2), "training_step")


ONE_PASS = ("efmlora", "RandomPerturbation", "BiLoRA")
EXCEPTIONS = [
    *product(ONE_PASS, [RuntimeError], [1]),
    *product(["fmlora", "efmlora+module"], [RuntimeError], [1, 2]),
    *product(["module", "LoRASAM"], [RuntimeError], [2]),
    *product(["efmlora", "fmlora", "module"], [KeyboardInterrupt], [1]),
]


@pytest.mark.parametrize(("front_end", "error", "pass_number"), EXCEPTIONS)
def test_exception_in_a_step(tmp_path, front_end, error, pass_number):
    """In the first or second pass of the third batch: clean weights, plain classes, and Ê in the file saved then."""
    module, callbacks, kwargs, shadow = watched(front_end)
    calls = []

    def interrupt(module: Any, batch_idx: int) -> None:
        calls.append(batch_idx)
        if batch_idx == 2 and calls.count(2) == pass_number:
            assert bool(shown(module.net)) is (front_end == "efmlora" or pass_number == 2)
            raise error("stop here")

    module.inside.append(interrupt)
    seen: list[bool] = []
    look = calling(on_exception=lambda trainer, pl_module, exception: seen.append(is_perturbed(pl_module)))
    before = signal.getsignal(signal.SIGINT)
    callbacks = [*callbacks, look, OnExceptionCheckpoint(tmp_path, "crash")]
    trainer = trainer_of(tmp_path, callbacks, **kwargs)
    try:
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            trainer.fit(module, make_loader(), make_loader(1))
    finally:
        signal.signal(signal.SIGINT, before)

    assert seen == [False]
    assert same(weights(module.net), shadow.stored)
    assert_no_trace(module)
    assert_copies_are_plain(module.net)
    assert "log" not in module.__dict__
    assert {"Before", "After"} <= shadow.seen["on_exception"]
    file = torch.load(tmp_path / "crash.ckpt", weights_only=True)
    assert same({k.removeprefix("net."): v for k, v in file["state_dict"].items()}, shadow.stored)
    if "efmlora" in front_end:
        state = file["callbacks"]["EFMLoRA"]["perturbation"]
        assert same(state["E"], E_hat(driver_of(trainer)))
        assert all(E.any() for E in state["E"].values())


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_copies_made_during_training_are_plain(tmp_path, front_end, monkeypatch):
    """deepcopy, pickle and torch.save give plain classes, clean weights and no Trainer, in each pass and hook."""

    def never(trainer: Any, memo: Any) -> None:
        raise AssertionError("a copy of the module copies the Trainer")

    monkeypatch.setattr(Trainer, "__deepcopy__", never, raising=False)
    module, callbacks, kwargs = build(front_end)
    states: list[bool] = []

    def look(module: LightningModule, *_: Any) -> None:
        states.append(is_perturbed(module))
        assert is_installed(module)
        assert_copies_are_plain(module.net)
        inside, module.inside = module.inside, []
        twin = copy.deepcopy(module)
        module.inside = inside
        assert_no_trace(twin)
        assert same(twin.state_dict(), module.state_dict())

    hooks = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end")
    copies = calling(**dict.fromkeys(hooks, lambda trainer, pl_module, *args: look(pl_module)))
    module.inside.append(look)
    fit(tmp_path, module, [*callbacks, copies], make_loader(3), max_epochs=1, **kwargs)
    assert any(states)
    assert not all(states)


class Counts:
    """Counts in buffers of floats and of integers, and one level deeper than what is restored between the passes."""

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
    """These are the documented limits: such counts belong in on_train_batch_end."""
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


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_the_loss_of_the_first_pass_is_returned(tmp_path: Any, kind: str) -> None:
    """At a learning rate of 0, at which the clean passes of all runs agree."""
    returned: dict[str, list[Tensor]] = {"plain": [], kind: []}
    for each, losses in returned.items():
        module, callbacks, more = build(each, lr=0.0)
        module.optimizer_class = torch.optim.SGD
        notes = calling(on_train_batch_end=lambda trainer, module, outputs, *_: losses.append(outputs["loss"]))  # noqa: B023
        fit(tmp_path, module, [*callbacks, notes], **more)
    assert same(returned["plain"], returned[kind])


class HalvesGradients:
    """Halves gradients in a hook after backward; notes the gradient's norm in each step."""

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
    """At rho near 0 the step equals plain LoRA's, whatever the hooks around backward do to its gradient."""
    norms = []
    for callbacks in ([], [make(1e-6)]):
        module, _, more = build("plain", own=HalvesGradients, accumulate=accumulate)
        module.optimizer_class = torch.optim.SGD  # Adam would turn even gradients of 1e-6 into full steps
        fit(tmp_path, module, callbacks, max_epochs=1, **more)
        norms.append(torch.stack(module.norms))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)
