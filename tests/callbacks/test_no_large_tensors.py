"""A step makes no tensor of the size of a frozen weight: nothing of the base is copied, and no full-size E exists."""

from typing import Any

import pytest
import torch
from helpers import CLASSES, FEATURES, FRONT_ENDS, build, calling, fit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_flatlora import FlatnessMonitor

HIDDEN = 13


class Watch(TorchDispatchMode):
    """Notes each tensor of a given number of entries that an operation puts into memory of its own."""

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
    # All that LoRA does not train, and nothing else in the step has the size of one of these.
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
