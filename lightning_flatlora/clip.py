"""open_clip models with q, k, v and output projections that LoRA can adapt one by one.

open_clip keeps q, k and v in one matrix of an ``nn.MultiheadAttention``, which peft can only adapt by merging and
unmerging the frozen weights in every forward pass, where they drift. Needs the extra ``lightning-flatlora[clip]``.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from typing_extensions import override

Projection = Literal["q", "k", "v", "out", "mlp"]
Towers = Literal["both", "vision", "text"]

# What open_clip, timm and transformers call them; a fused matrix counts as each of its parts.
_LEAVES: dict[str, frozenset[str]] = {
    "q": frozenset({"q_proj", "query", "q", "q_lin", "qkv", "Wqkv"}),
    "k": frozenset({"k_proj", "key", "k", "k_lin", "kv", "qkv", "Wqkv"}),
    "v": frozenset({"v_proj", "value", "v", "v_lin", "kv", "qkv", "Wqkv"}),
    "out": frozenset({"out_proj", "o_proj", "out_lin", "o", "proj"}),
    "mlp": frozenset({"c_fc", "c_proj", "fc1", "fc2", "wi", "wo", "lin1", "lin2"}),
}
_ONLY_IN_ATTENTION = {"q_proj", "k_proj", "v_proj", "qkv", "kv", "Wqkv"}


class SplitAttention(nn.Module):
    """Attention with a Linear for each of q, k, v, computed by ``scaled_dot_product_attention``.

    Takes over the weights, and ``out_proj`` itself, of an attention that keeps q, k and v together.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        weights, bias = _projections(original), original.in_proj_bias
        biases = [None] * 3 if bias is None else bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = original.out_proj
        self.num_heads = int(original.num_heads)
        self.fused = original.in_proj_weight is not None
        self.train(original.training)

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, C) as (N, heads, L, C / heads)."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _mask(self, mask: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the logits; in a boolean mask True means masked out, as for nn.MultiheadAttention."""
        if mask is None:
            return None
        if mask.ndim == 3:
            mask = mask.view(batch, self.num_heads, *mask.shape[1:])
        if mask.dtype == torch.bool:
            return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
        return mask.to(dtype)


class SplitMultiheadAttention(SplitAttention):
    """In the place of an ``nn.MultiheadAttention``; it gives no attention weights."""

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
        """As nn.MultiheadAttention's, for batches: (N, L, C), or (L, N, C) without ``batch_first``.

        Raises:
            ValueError: attention weights are asked for.
        """
        if need_weights:
            raise ValueError("SplitMultiheadAttention keeps no attention weights: call it with need_weights=False")
        inputs = (query, key, value) if self.batch_first else [x.transpose(0, 1) for x in (query, key, value)]
        q, k, v = (self._heads(p(x)) for p, x in zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=True))
        mask = self._mask(attn_mask, len(q), q.dtype)
        padding = self._mask(key_padding_mask, len(q), q.dtype)
        if padding is not None:
            mask = padding[:, None, None] if mask is None else mask + padding[:, None, None]
        x = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


class SplitOpenClipAttention(SplitAttention):
    """In the place of open_clip's own ``Attention``, with its norms and head scales."""

    def __init__(self, original: Attention) -> None:
        super().__init__(original)
        self.ln_q, self.ln_k, self.ln_inner = original.ln_q, original.ln_k, original.ln_inner
        self.head_scale = original.head_scale
        self.attn_drop, self.out_drop = original.attn_drop, original.out_drop

    @override
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        mask = self._mask(attn_mask, len(q), q.dtype)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, mask, dropout)
        if self.head_scale is not None:
            x = x * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(x.transpose(1, 2).flatten(2))))  # type: ignore[no-any-return]


def split_attention(model: nn.Module) -> list[str]:
    r"""Put a :class:`SplitAttention` in the place of every attention that keeps q, k, v in one; in place.

    Outputs stay the same up to rounding, and each weight keeps its ``requires_grad``.

    Returns:
        Names of what was replaced.

    Raises:
        ValueError: an attention has a feature that open_clip's models do not use, and that is not supported.

    Example:
        >>> import open_clip
        >>> model = open_clip.create_model("ViT-B-32", device="meta")
        >>> split_attention(model)[0]
        'visual.transformer.resblocks.0.attn'
        >>> lora_targets(model, ["v"], blocks=1, towers="text")
        'transformer\\.resblocks\\.11\\.attn\\.v_proj'
    """
    kinds: dict[type, type[SplitAttention]] = {
        nn.MultiheadAttention: SplitMultiheadAttention,
        Attention: SplitOpenClipAttention,
    }
    found = [(name, module) for name, module in model.named_modules() if type(module) in kinds]
    for name, module in found:
        if (unusual := _unusual(module)) is not None:
            raise ValueError(f"{name} can't be split: it has {unusual}")
    for name, module in found:
        model.set_submodule(name, kinds[type(module)](module))
    return [name for name, _ in found]


def joined_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as :func:`split_attention` found it, under open_clip's names.

    Args:
        model: split, its adapters merged and unloaded.

    Returns:
        What an unmodified open_clip model of the same configuration loads.

    Raises:
        ValueError: there are LoRA layers in the model still.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model has an adapter still: merge it first, with peft's merge_and_unload()")
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, SplitAttention):
            weights = [state.pop(f"{name}.{letter}_proj.weight") for letter in "qkv"]
            if module.fused:
                state[f"{name}.in_proj_weight"] = torch.cat(weights)
            else:
                state |= {f"{name}.{letter}_proj_weight": w for letter, w in zip("qkv", weights, strict=True)}
            if module.q_proj.bias is not None:
                state[f"{name}.in_proj_bias"] = torch.cat([state.pop(f"{name}.{letter}_proj.bias") for letter in "qkv"])
    return state


def lora_targets(
    model: nn.Module,
    projections: Sequence[Projection] = ("q", "k", "v"),
    blocks: Literal["all"] | int | Sequence[int] = "all",
    towers: Towers = "both",
) -> str:
    """The Linears to adapt, for ``LoraConfig(target_modules=...)``.

    A regular expression of their whole names: peft takes a list's entries for ends of names, and the names in CLIP's
    text tower are ends of those in its vision tower.

    Args:
        model: an open_clip model after :func:`split_attention`.
        projections: any of q, k, v, out (of the attentions) and mlp (both matrices). Where a tower fuses q, k and v
            into one Linear, as timm's do, that one is adapted for any of them.
        blocks: "all", how many of the last blocks, or the numbers of blocks, from 0; in each of the towers. Linears
            outside of blocks, as in attention pooling, count among all. In a tower of stages these are counted.
        towers: "vision", "text", or "both". CoCa's text decoder, which gives no features, is not among them.

    Raises:
        ValueError: a setting is not one of these, or a tower has no such Linear that LoRA could reach.
    """
    problems = [f"projections must be of {get_args(Projection)}, got {p!r}" for p in projections if p not in _LEAVES]
    if towers not in get_args(Towers):
        problems.append(f"towers must be one of {get_args(Towers)}, got {towers!r}")
    if not projections:
        problems.append(f"projections must name at least one of {get_args(Projection)}")
    if problems:
        raise ValueError("; ".join(problems))
    leaves = frozenset[str]().union(*(_LEAVES[p] for p in projections if p != "mlp"))
    mlp = _LEAVES["mlp"] if "mlp" in projections else frozenset[str]()
    targets = []
    for tower in ("vision", "text") if towers == "both" else (towers,):
        names = [name for name in _linears(model, tower) if _is_wanted(name, leaves, mlp)]
        chosen = _of_blocks(names, blocks)
        if not chosen:
            raise ValueError(_nothing(model, tower, list(projections), blocks, names))
        targets += chosen
    return "|".join(re.escape(name) for name in sorted(targets))


def check_reached(model: nn.Module, targets: str, image: Tensor, text: Tensor) -> None:
    """Raise an error if a forward pass goes past some Linears, reading their weights alone: LoRA would do nothing.

    Args:
        model: an open_clip model.
        targets: of :func:`lora_targets`.
        image: one preprocessed image, shape (1, 3, height, width).
        text: one tokenised text, shape (1, length).

    Raises:
        ValueError: it names them.
    """
    called: set[str] = set()
    names = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    modes = [(module, module.training) for module in model.modules()]
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in names
    ]
    try:
        with torch.no_grad():
            model.eval()
            model.encode_image(image)  # type: ignore[operator]
            model.encode_text(text)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if missed := [name for name in names if name not in called]:
        raise ValueError(
            f"{len(missed)} of {len(names)} layers, as {missed[0]} in {_parent_kind(model, missed[0])}, are not called "
            "by the model, which reads their weights itself, so LoRA would change nothing: choose other projections, "
            "blocks or towers"
        )


def _projections(original: Any) -> Sequence[Tensor]:
    """The weights of q, k, v, wherever an attention keeps them."""
    if original.in_proj_weight is not None:
        chunks: tuple[Tensor, ...] = original.in_proj_weight.chunk(3)
        return chunks
    return original.q_proj_weight, original.k_proj_weight, original.v_proj_weight


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear with copies of a weight and a bias; a chunk's requires_grad is that of the whole."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return linear


def _unusual(attention: Any) -> str | None:
    if isinstance(attention, Attention):
        # open_clip's own code for it multiplies 4-D tensors with bmm, which raises: there is nothing to be equal to
        return "scaled cosine attention" if attention.scaled_cosine else None
    if attention.bias_k is not None or attention.add_zero_attn:
        return "add_bias_kv or add_zero_attn"
    return None


def _linears(model: nn.Module, tower: str) -> list[str]:
    """Names of a tower's Linears. The text tower is all but the others: it is at CLIP's root, else under "text"."""
    others = ("visual.", "text_decoder.")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [n for n in names if (n.startswith("visual.") if tower == "vision" else not n.startswith(others))]


def _is_wanted(name: str, leaves: frozenset[str], mlp: frozenset[str]) -> bool:
    parent, _, leaf = name.rpartition(".")
    path = parent.lower().split(".")
    in_attention = any("attn" in part or "attention" in part for part in path[-2:]) or leaf in _ONLY_IN_ATTENTION
    return leaf in (leaves if in_attention else mlp)


def _of_blocks(names: list[str], blocks: Literal["all"] | int | Sequence[int]) -> list[str]:
    if blocks == "all":
        return names
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in names}
    count = 1 + max((number for number in numbers.values() if number is not None), default=-1)
    wanted = set(range(count - blocks, count)) if isinstance(blocks, int) else set(blocks)
    if unknown := wanted - set(range(count)):
        raise ValueError(f"blocks={blocks!r}: a tower with {count} blocks has no {sorted(unknown)}")
    return [name for name in names if numbers[name] in wanted]


def _nothing(model: nn.Module, tower: str, projections: list[str], blocks: object, names: list[str]) -> str:
    inner = getattr(model, "visual" if tower == "vision" else "text", None) or model
    if names:
        return f"the {tower} tower has no {projections} in blocks={blocks!r}"
    seen = sorted({name.rpartition(".")[2] for name in _linears(model, tower)})
    return (
        f"the {tower} tower, {type(inner).__name__}, has no {projections} as a Linear that LoRA could adapt "
        f"(its Linears are called {seen}): choose the other tower or other projections"
    )


def _parent_kind(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__
