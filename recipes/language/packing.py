"""Several conversations in one row, each of which reads only itself."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import nn

from recipes.language.chat import IGNORED
from recipes.training.modes import evaluating

_PROBE = 8  # tokens of each conversation that the check makes up


def fill_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return which conversations or texts share a row: the longest first, each in the first row with room for it.

    Args:
        lengths: tokens of each.
        room: tokens of a row; a longer text gets its own row.

    Returns:
        The indices of the texts in each row.

    Example:
        >>> fill_rows([3, 7, 4, 2], room=8)
        [[1], [2, 0], [3]]
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = next((row for row, room_left in enumerate(left) if room_left >= lengths[index]), len(rows))
        if fitting == len(rows):
            rows.append([])
            left.append(room)
        rows[fitting].append(index)
        left[fitting] -= lengths[index]
    return rows


def packed(columns: dict[str, list[Any]], room: int) -> dict[str, list[Any]]:
    """Return encoded conversations, one option each, packed into rows.

    Positions start again with each conversation; transformers tells conversations apart by them.

    Args:
        columns: ``input_ids`` and ``labels`` of each conversation's options, and its ``length``.
        room: tokens of a row.
    """
    made: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": [], "length": []}
    for indices in fill_rows(columns["length"], room):
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for index in indices:
            ids += columns["input_ids"][index][0]
            # One conversation's last token must not predict the next one's first.
            labels += [IGNORED, *columns["labels"][index][0][1:]]
            positions += range(columns["length"][index])
        made["input_ids"].append([ids])
        made["labels"].append([labels])
        made["position_ids"].append(positions)
        made["length"].append(len(ids))
    return made


@torch.no_grad()
def check_packing(net: nn.Module, rows: int, device: torch.device) -> None:
    """Check that a model keeps the conversations of a row apart, with the attention that it was loaded with.

    Args:
        net: the model, as it is trained.
        rows: rows per batch. FlashAttention tells conversations apart only in batches of one row.
        device: device of the weights.

    Raises:
        MisconfigurationException: an earlier conversation changes a later one, or the later one is not what it is in
            its own row.
    """
    base: Any = net.get_base_model() if isinstance(net, PeftModel) else net
    config = base.config.get_text_config()
    attention = getattr(config, "_attn_implementation", None)
    generator = torch.Generator().manual_seed(0)
    first, other, last = torch.randint(config.vocab_size, (3, rows, _PROBE), generator=generator).to(device)
    logits = []
    with evaluating(net):
        for conversations in ([first, last], [other, last], [last]):
            positions = torch.arange(_PROBE, device=device).repeat(len(conversations)).expand(rows, -1)
            output = net(input_ids=torch.cat(conversations, dim=1), position_ids=positions, use_cache=False)
            logits.append(output.logits[:, -_PROBE:])
    after_first, after_other, alone = logits
    # What is masked contributes exactly nothing, but sums of another length round differently.
    rounding = 1e-4 if alone.dtype in (torch.float32, torch.float64) else 3e-2
    scale = alone.abs().max()
    is_apart = (after_first - after_other).abs().max() <= 1e-2 * rounding * scale
    is_itself = (after_first - alone).abs().max() <= rounding * scale
    if not (is_apart and is_itself):
        raise MisconfigurationException(
            f"packing: {type(base).__name__} with attn_implementation={attention!r} does not keep the conversations of "
            "a row apart. Set attn_implementation to 'sdpa' or 'eager' (FlashAttention needs batch_size=1, with "
            "accumulate_grad_batches), or packing to false"
        )
