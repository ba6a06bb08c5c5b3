"""GPT-2's joint projection of q, k and v as three Linears, so that LoRA can adapt some of them, and the way back.

GPT-2 computes q, k and v in one layer, ``c_attn``, where LoRA can't adapt q and v only. Models such as Llama have
a layer for each, and stay as they are.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

_ALL_LINEAR = "all-linear"  # peft's word for every layer except the head


class SplitProjection(nn.Module):
    """Replaces a ``c_attn`` and gives the same q, k and v side by side, (..., 3 d).

    Args:
        joint: layer with weight (d, 3 d), whose columns are those of q, k and v, in this order.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def __init__(self, joint: Any) -> None:
        super().__init__()
        biases = joint.bias.chunk(3)
        for letter, weight, bias in zip("qkv", joint.weight.chunk(3, dim=1), biases, strict=True):
            # A Conv1D multiplies by its weight, a Linear by the transpose of its own.
            self.add_module(f"{letter}_proj", _linear(weight.T, bias))
        self.train(joint.training)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., 3 d)."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    def joined(self) -> Any:
        """Return the layer that was split, with the weights as they are now.

        Raises:
            ValueError: LoRA layers are still in it.
        """
        parts = [self.q_proj, self.k_proj, self.v_proj]
        if any(isinstance(part, BaseTunerLayer) for part in parts):
            raise ValueError("the model still has an adapter: merge it first, with peft's merge_and_unload()")
        width = parts[0].in_features
        joint = Conv1D(3 * width, width).requires_grad_(parts[0].weight.requires_grad)
        joint.weight.data = torch.cat([part.weight.detach().T for part in parts], dim=1)
        joint.bias.data = torch.cat([part.bias.detach() for part in parts])
        return joint.train(self.training)


def split_attention(model: nn.Module, targets: str | Sequence[str] | None) -> list[str]:
    """Replace every joint ``c_attn`` of q, k and v by a :class:`SplitProjection`, in the model itself.

    The weights are the same numbers, and outputs change only by rounding.

    Args:
        model: a model of transformers; one without such layers does not change.
        targets: peft's ``target_modules``. A ``c_attn`` that they name is adapted as a whole and stays joint; None
            means peft's default for the model, which is that layer.

    Returns:
        Names of the replaced layers.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1))
        >>> split_attention(model, ["q_proj", "v_proj"])
        ['transformer.h.0.attn.c_attn']
    """
    if targets is None:
        return []
    joint = {}
    for name, module in model.named_modules():
        # A cross-attention has a c_attn as well, of k and v.
        is_joint = isinstance(module, Conv1D) and module.nf == 3 * module.nx
        if is_joint and name.endswith("c_attn") and not _is_target(name, targets):
            joint[name] = module
    for name, module in joint.items():
        model.set_submodule(name, SplitProjection(module))
    return list(joint)


def join_attention(model: nn.Module) -> None:
    """Undo :func:`split_attention`, in the model itself, which transformers then saves and loads as a plain GPT-2.

    Args:
        model: split model, its adapters merged and unloaded.

    Raises:
        ValueError: LoRA layers are still in the split projections.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitProjection):
            model.set_submodule(name, module.joined())


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a Linear with copies of a weight (outputs, inputs) and a bias."""
    # On the meta device, so that no memory is filled with values that are replaced at once.
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), weight.requires_grad)
    linear.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return linear


def _is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Return whether peft would adapt the layer of this name."""
    if isinstance(targets, str):
        return targets != _ALL_LINEAR and re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
