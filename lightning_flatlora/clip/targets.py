"""Choose the Linear layers of an open_clip model that LoRA adapts: by projection, block and tower."""

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_flatlora.schedules import is_integer

Projection = Literal["q", "k", "v", "out", "mlp"]
Towers = Literal["both", "vision", "text"]

# The names in open_clip, timm and transformers; a fused matrix counts as each of its parts.
_LEAVES: dict[str, frozenset[str]] = {
    "q": frozenset({"q_proj", "query", "q", "q_lin", "qkv", "Wqkv"}),
    "k": frozenset({"k_proj", "key", "k", "k_lin", "kv", "qkv", "Wqkv"}),
    "v": frozenset({"v_proj", "value", "v", "v_lin", "kv", "qkv", "Wqkv"}),
    "out": frozenset({"out_proj", "o_proj", "out_lin", "o", "proj"}),
    "mlp": frozenset({"c_fc", "c_proj", "fc1", "fc2", "wi", "wo", "lin1", "lin2"}),
}
_ONLY_IN_ATTENTION = {"q_proj", "k_proj", "v_proj", "qkv", "kv", "Wqkv"}


def lora_targets(
    model: nn.Module,
    projections: Sequence[Projection] = ("q", "k", "v"),
    blocks: Literal["all"] | int | Sequence[int] = "all",
    towers: Towers = "both",
) -> str:
    """Name the Linears to adapt, for ``LoraConfig(target_modules=...)``.

    The result is a regular expression of their full names. A list would not do: peft matches its entries with the ends
    of names, and names in CLIP's text tower are ends of names in its vision tower.

    Args:
        model: an open_clip model after :func:`split_attention`.
        projections: any of q, k, v, out (of the attentions) and mlp (both matrices). If a tower fuses q, k and v into
            one Linear, as timm's do, any of them selects it.
        blocks: "all", how many of the last blocks, or a list of block numbers, from 0; for each tower. Linears outside
            of blocks, such as those in attention pooling, belong only to "all". In a tower of stages, stages count as
            blocks.
        towers: "vision", "text", or "both". CoCa's text decoder, which gives no features, is excluded.

    Raises:
        ValueError: an unknown setting, or a tower without such a Linear that LoRA could adapt.
    """
    problems = [f"projections must be of {get_args(Projection)}, got {p!r}" for p in projections if p not in _LEAVES]
    if towers not in get_args(Towers):
        problems.append(f"towers must be one of {get_args(Towers)}, got {towers!r}")
    if problems:
        raise ValueError("; ".join(problems))
    targets = []
    for tower in ("vision", "text") if towers == "both" else (towers,):
        chosen = _of_blocks([name for name in _linears(model, tower) if _is_wanted(name, projections)], blocks)
        if not chosen:
            inner = getattr(model, "visual" if tower == "vision" else "text", None) or model
            seen = sorted({name.rpartition(".")[2] for name in _linears(model, tower)})
            raise ValueError(
                f"the {tower} tower, {type(inner).__name__}, has no {list(projections)} as a Linear that LoRA could "
                f"adapt in blocks={blocks!r} (its Linears are called {seen}): choose others, or the other tower"
            )
        targets += chosen
    return "|".join(re.escape(name) for name in sorted(targets))


def check_reached(model: nn.Module, targets: str, image: Tensor, text: Tensor) -> None:
    """Raise a ValueError that names Linears which a forward pass never calls, on which LoRA would do nothing.

    Args:
        model: an open_clip model.
        targets: from :func:`lora_targets`.
        image: one preprocessed image, shape (1, 3, height, width).
        text: one tokenized text, shape (1, length).
    """
    called: set[nn.Module] = set()
    layers = {name: module for name, module in model.named_modules() if re.fullmatch(targets, name)}
    with ExitStack() as stack, torch.no_grad():
        # Noted for every module, since parts of the model may be in eval mode while the rest trains.
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        # A forward hook fires only if the layer itself is called, not if only its weight is read.
        for layer in layers.values():
            stack.enter_context(layer.register_forward_hook(lambda layer, *_: called.add(layer)))
        model.eval()
        model.encode_image(image)  # type: ignore[operator]
        model.encode_text(text)  # type: ignore[operator]
    missed = [name for name, layer in layers.items() if layer not in called]
    if missed:
        parent = model.get_submodule(missed[0].rpartition(".")[0])
        raise ValueError(
            f"the model does not call {len(missed)} of {len(layers)} layers, such as {missed[0]} in "
            f"{type(parent).__name__}, but reads their weights itself, so LoRA would change nothing: choose others"
        )


def _linears(model: nn.Module, tower: str) -> list[str]:
    """List the names of a tower's Linears."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if tower == "vision":
        return [name for name in names if name.startswith("visual.")]
    # The text tower is at the root of CLIP, or under "text": everything outside the other towers.
    return [name for name in names if not name.startswith(("visual.", "text_decoder."))]


def _is_wanted(name: str, projections: Sequence[Projection]) -> bool:
    parent, _, leaf = name.rpartition(".")
    path = parent.lower().split(".")
    in_attention = any("attn" in part or "attention" in part for part in path[-2:]) or leaf in _ONLY_IN_ATTENTION
    # All projections except the mlp's belong to an attention.
    return any(leaf in _LEAVES[each] for each in projections if in_attention == (each != "mlp"))


def _of_blocks(names: list[str], blocks: Any) -> list[str]:
    """Choose the Linears of some blocks; those outside of blocks belong only to "all"."""
    if blocks == "all" or not names:
        return names
    numbers = {name: _block_number(name) for name in names}
    count = 1 + max(numbers.values())
    given = range(count - blocks, count) if is_integer(blocks, least=1) else blocks
    wanted = set(given) if isinstance(given, Iterable) else set()
    if not wanted or not wanted <= set(range(count)):
        raise ValueError(
            f"blocks={blocks!r}: the tower has {count} blocks, so give 'all', 1 to {count}, or numbers from 0 on"
        )
    return [name for name in names if numbers[name] in wanted]


def _block_number(name: str) -> int:
    """Return the first number in a Linear's name; -1 for one outside of the blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
