"""open_clip models with q, k, v and output projections that LoRA can adapt one by one.

open_clip keeps q, k and v in one matrix of an ``nn.MultiheadAttention``. peft can adapt that only by merging and
unmerging the frozen weights in every forward pass, where they drift. Needs the extra ``lightning-flatlora[clip]``.
"""

from lightning_flatlora.clip.attention import (
    SplitAttention,
    SplitMultiheadAttention,
    SplitOpenClipAttention,
    joined_state_dict,
    split_attention,
)
from lightning_flatlora.clip.targets import Projection, Towers, check_reached, lora_targets

__all__ = [
    "Projection",
    "SplitAttention",
    "SplitMultiheadAttention",
    "SplitOpenClipAttention",
    "Towers",
    "check_reached",
    "joined_state_dict",
    "lora_targets",
    "split_attention",
]
