"""The module's stored weights are always the clean ones, and no step allocates a tensor of the size of a full weight.

In every hook of other callbacks (before and after ours), every hook of the module, every training step and every
checkpoint, the weights must equal a shadow bit for bit. To make sure that this tests something, it is also checked that
the layers read B + E meanwhile. Nothing of the base is copied, and no full-size E exists.
"""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    FEATURES,
    FRONT_ENDS,
    ByHand,
    TwoPassClassifier,
    assert_no_trace,
    build,
    calling,
    fit,
    make_loader,
    make_net,
    needs_weight_averaging,
    same,
    weights,
)
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from shadows import Shadow, watched
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_flatlora import EFMLoRA, FlatnessMonitor

TRAINING_HOOKS = {
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_end",
    "on_save_checkpoint",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
}


@pytest.mark.parametrize("front_end", [*FRONT_ENDS, "LoRASAM", "RandomPerturbation", "BiLoRA"])
def test_stored_bits_in_every_hook(tmp_path, front_end):
    module, callbacks, kwargs, shadow = watched(front_end, accumulate=2)
    callbacks.append(ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1))
    clip = {} if isinstance(module, TwoPassClassifier) else {"gradient_clip_val": 0.5}
    start = weights(module)
    fit(tmp_path, module, callbacks, val=make_loader(2), val_check_interval=3, num_sanity_val_steps=1, **kwargs, **clip)

    manual = {"on_before_zero_grad"} if isinstance(module, TwoPassClassifier) else set()  # Lightning never calls it
    for hook in TRAINING_HOOKS - manual:
        assert {"Before", "After"} <= shadow.seen[hook], hook
    for hook in ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "backward"):
        assert "module" in shadow.seen[hook], hook
    if front_end == "efmlora":  # no callback hook runs inside the passes
        assert shadow.seen["perturbed"] == {"training_step", "backward"}
    perturbed = shadow.seen.get("perturbed", set())
    # This doesn't show what is added to outputs instead of B.
    assert ("training_step" in perturbed) is (front_end not in ("RandomPerturbation", "BiLoRA"))
    for hook in perturbed:
        assert "validation" not in hook
        assert "checkpoint" not in hook
        assert "train_batch_end" not in hook
    assert not same(weights(module), start)
    assert_no_trace(module)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_every_checkpoint_holds_clean_weights(tmp_path, front_end):
    """Saved in every training hook and inside the step, with and without the rest of the state."""
    module, callbacks, kwargs, shadow = watched(front_end)
    saved: list[tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def save(where: str, trainer: Any, *args: Any) -> None:
        for weights_only in (False, True):
            path = tmp_path / f"{len(saved)}.ckpt"
            trainer.save_checkpoint(path, weights_only=weights_only)
            held = torch.load(path, weights_only=True)["state_dict"]
            saved.append((where, {k.removeprefix("net."): v for k, v in held.items()}, dict(shadow.stored)))

    hooks = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
    in_hooks = {hook: partial(save, hook) for hook in hooks}
    module.inside.append(lambda module, _: save("step", module.trainer))
    callbacks = [calling(**in_hooks), *callbacks, calling(**in_hooks)]
    fit(tmp_path, module, callbacks, make_loader(3), max_epochs=1, **kwargs)
    assert {where for where, _, _ in saved} >= {"on_train_batch_start", "on_after_backward", "step"}
    for where, held, clean in saved:
        assert same(held, clean), where


@needs_weight_averaging
@pytest.mark.parametrize(("averaging", "ours_first"), [("mean", True), ("ema", False)])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_weight_averaging_beside_us_averages_clean_weights(tmp_path, front_end, ours_first, averaging):
    """Lightning's averages equal those over the recorded clean trajectory, at the end and in checkpoints."""
    net = make_net()
    shadow = Shadow(net)
    module, callbacks, kwargs = build(front_end, net=net)
    module.optimizer_class = shadow.optimizer_class()
    average = lightnings.WeightAveraging() if averaging == "mean" else lightnings.EMAWeightAveraging(decay=0.5)
    trajectory: list[dict[str, torch.Tensor]] = []

    notes = calling(on_train_batch_end=lambda *args: trajectory.append(dict(shadow.stored)))
    order = [*callbacks, average] if ours_first else [average, *callbacks]
    checkpoint = ModelCheckpoint(tmp_path, every_n_epochs=1, filename="last")
    fit(tmp_path, module, [*order, notes, checkpoint], val=make_loader(1), max_epochs=1, **kwargs)

    expected = trajectory[0]
    for n, clean in enumerate(trajectory[1:], start=1):
        weight = 0.5 if averaging == "ema" else 1 / (n + 1)
        expected = {name: torch.lerp(mean, clean[name], weight) for name, mean in expected.items()}
    torch.testing.assert_close(weights(net), expected, rtol=1e-5, atol=1e-6)
    file = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same({k.removeprefix("net."): v for k, v in file["current_model_state"].items()}, trajectory[-1])
    averaged = {k.removeprefix("net."): v for k, v in file["state_dict"].items()}
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-6)
    assert_no_trace(module)


class StepsByClosure(ByHand):
    """Its forward and backward pass run inside the optimizer's step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        def closure() -> Any:
            loss = self.loss(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer: Any = self.optimizers()
        optimizer.step(closure)
        optimizer.zero_grad()


def test_a_users_closure_is_perturbed_too(tmp_path):
    ends = []
    for kind, callbacks in ((ByHand, [EFMLoRA(0.5)]), (StepsByClosure, [EFMLoRA(0.5)]), (StepsByClosure, [])):
        module = kind()
        fit(tmp_path, module, callbacks, max_epochs=1)
        ends.append(weights(module))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


HIDDEN = 13


class Watch(TorchDispatchMode):
    """Notes each tensor of a given number of entries for which an operation allocates new memory."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.numels = {weight.numel() for weight in weights}
        self.memory = {weight.untyped_storage().data_ptr() for weight in weights}
        self.made: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.numel() not in self.numels:
                continue
            if tensor.untyped_storage().data_ptr() not in self.memory:
                self.made.append(str(func))
        return out


def make_small_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)]
    return get_peft_model(nn.Sequential(*layers), LoraConfig(r=2, target_modules=["0", "2"]))


def watched_fit(tmp_path: Any, net: nn.Module, module: Any, callbacks: list[Any], **more: Any) -> Watch:
    """Watch every batch, from before the first hook of other callbacks to after their last."""
    # All weights that LoRA does not train; nothing else in the step has the size of one of these.
    watch = Watch([parameter for parameter in net.parameters() if not parameter.requires_grad and parameter.dim() == 2])
    assert watch.numels == {FEATURES * HIDDEN, HIDDEN * CLASSES}
    starts = calling(on_train_batch_start=lambda *args: watch.__enter__())
    ends = calling(on_train_batch_end=lambda *args: watch.__exit__(None, None, None))
    fit(tmp_path, module, [starts, *callbacks, ends], max_epochs=1, **more)
    return watch


@pytest.mark.parametrize("monitored", [False, True])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_no_step_makes_a_tensor_of_a_frozen_weights_size(tmp_path: Any, front_end: str, monitored: bool) -> None:
    net = make_small_net()
    module, callbacks, more = build(front_end, net=net)
    monitors = [FlatnessMonitor(0.3, every_n_steps=1)] if monitored else []
    watch = watched_fit(tmp_path, net, module, [*callbacks, *monitors], **more)
    assert watch.operations > 100
    assert watch.made == []


def test_a_copy_of_a_frozen_weight_would_be_seen(tmp_path: Any) -> None:
    net = make_small_net()
    module, callbacks, more = build("plain", net=net)
    module.inside.append(lambda self, batch_idx: net.base_model.model[0].base_layer.weight.clone())
    assert len(watched_fit(tmp_path, net, module, callbacks, **more).made) == 6


@pytest.mark.parametrize("front_end", [*FRONT_ENDS, "LoRASAM"])
def test_what_runs_without_gradients_in_a_step_reads_the_clean_weights(tmp_path: Any, front_end: str) -> None:
    """A teacher's targets, or a policy's earlier probabilities."""
    read: list[bool] = []

    class Own:
        def loss(self, batch: Any, batch_idx: int) -> Any:
            clean, inputs = copy.deepcopy(self.net), batch[0]
            with torch.no_grad():
                assert same(self.net(inputs), clean(inputs))
            read.append(same(self.net(inputs), clean(inputs)))
            return super().loss(batch, batch_idx)

    module, callbacks, kwargs = build(front_end, own=Own)
    fit(tmp_path, module, callbacks, max_epochs=1, **kwargs)
    assert False in read
