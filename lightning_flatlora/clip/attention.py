"""Attention with a Linear for each of q, k and v, to replace that of open_clip's models."""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from typing_extensions import override


class SplitAttention(nn.Module):
    """Attention with a Linear for each of q, k, v, computed by ``scaled_dot_product_attention``.

    It takes the weights, and ``out_proj`` itself, from an attention that keeps q, k and v in one matrix.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        joint, bias = original.in_proj_weight, original.in_proj_bias
        # For joined_state_dict: open_clip's names for three separate matrices differ from those for a joint one.
        self.fused = joint is not None
        apart = (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight) if joint is None else ()
        biases = [None] * 3 if bias is None else bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, apart or joint.chunk(3), biases)
        self.out_proj = original.out_proj
        self.num_heads = int(original.num_heads)
        self.train(original.training)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Project inputs (N, L, C) to q, k and v, (N, heads, L, C / heads)."""
        projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        return [x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in projected]

    def _added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a mask as a term of the logits; True means masked out, as for nn.MultiheadAttention."""
        if mask.ndim == 3:
            mask = mask.view(-1, self.num_heads, *mask.shape[1:])
        if mask.dtype == torch.bool:
            return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
        return mask.to(dtype)


class SplitMultiheadAttention(SplitAttention):
    """Replacement of an ``nn.MultiheadAttention``; it returns no attention weights."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__(original)
        self.dropout = original.dropout
        self.batch_first = original.batch_first

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Compute nn.MultiheadAttention's output for batches: (N, L, C), or (L, N, C) without ``batch_first``.

        Raises:
            ValueError: ``need_weights`` is True.
        """
        if need_weights:
            raise ValueError("SplitMultiheadAttention gives no attention weights: call it with need_weights=False")
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._heads(query, key, value)
        mask = None if attn_mask is None else self._added(attn_mask, q.dtype)
        if key_padding_mask is not None:
            padding = self._added(key_padding_mask[:, None, None], q.dtype)
            mask = padding if mask is None else mask + padding
        x = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


class SplitOpenClipAttention(SplitAttention):
    """Replacement of open_clip's own ``Attention``, with its norms and head scales."""

    def __init__(self, original: Attention) -> None:
        super().__init__(original)
        self.ln_q, self.ln_k, self.ln_inner = original.ln_q, original.ln_k, original.ln_inner
        self.head_scale = original.head_scale
        self.attn_drop, self.out_drop = original.attn_drop, original.out_drop

    @override
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map (N, L, C) to (N, L, C)."""
        q, k, v = self._heads(x, x, x)
        mask = None if attn_mask is None else self._added(attn_mask, q.dtype)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, mask, dropout)
        if self.head_scale is not None:
            x = x * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(x.transpose(1, 2).flatten(2))))  # type: ignore[no-any-return]


def split_attention(model: nn.Module) -> list[str]:
    """Replace every attention that keeps q, k and v in one matrix by a :class:`SplitAttention`, in place.

    Outputs change only by rounding, and each weight keeps its ``requires_grad``.

    Returns:
        Names of the replaced modules.

    Raises:
        ValueError: an attention has an unsupported feature, which open_clip's models do not use.
    """
    kinds = {nn.MultiheadAttention: SplitMultiheadAttention, Attention: SplitOpenClipAttention}
    attentions = {name: module for name, module in model.named_modules() if type(module) in kinds}
    # All are checked before any is replaced, so that an error leaves the model unchanged.
    for name, module in attentions.items():
        # open_clip's own code for it calls bmm on 4-D tensors, which raises: there is no result to reproduce.
        if getattr(module, "scaled_cosine", False):
            raise ValueError(f"{name} can't be split: it has scaled cosine attention")
        if getattr(module, "add_zero_attn", False) or getattr(module, "bias_k", None) is not None:
            raise ValueError(f"{name} can't be split: it has add_bias_kv or add_zero_attn")
    for name, module in attentions.items():
        model.set_submodule(name, kinds[type(module)](module))
    return list(attentions)


def joined_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a split model's state under open_clip's names, as before :func:`split_attention`.

    Args:
        model: a split model, its adapters merged and unloaded; otherwise a ValueError.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model still has an adapter: merge it first, with peft's merge_and_unload()")
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if not isinstance(module, SplitAttention):
            continue
        weights = [state.pop(f"{name}.{letter}_proj.weight") for letter in "qkv"]
        if module.fused:
            state[f"{name}.in_proj_weight"] = torch.cat(weights)
        else:
            state |= {f"{name}.{letter}_proj_weight": weight for letter, weight in zip("qkv", weights, strict=True)}
        if module.q_proj.bias is not None:
            state[f"{name}.in_proj_bias"] = torch.cat([state.pop(f"{name}.{letter}_proj.bias") for letter in "qkv"])
    return state


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a Linear with copies of a weight and a bias; a chunk inherits the whole's requires_grad."""
    # On the meta device, so as not to fill memory with values that are replaced at once.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return linear
