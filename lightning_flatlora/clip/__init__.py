"""open_clip models with q, k, v and output projections that LoRA can adapt one by one.

open_clip keeps q, k and v in one matrix of an ``nn.MultiheadAttention``. peft can adapt that only by merging into and
unmerging from the frozen weights in every forward pass, which makes them drift. Needs the extra
``lightning-flatlora[clip]``.

Example:
    >>> import open_clip
    >>> import torch
    >>> towers = {"vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 64}}
    >>> towers["text_cfg"] = {"context_length": 4, "vocab_size": 9, "width": 64, "heads": 1, "layers": 2}
    >>> model = open_clip.CLIP(embed_dim=8, **towers)
    >>> names = set(model.state_dict())
    >>> split_attention(model)[0]
    'visual.transformer.resblocks.0.attn'
    >>> targets = lora_targets(model, ["v"], blocks=1, towers="text")
    >>> print(targets)
    transformer\\.resblocks\\.1\\.attn\\.v_proj
    >>> check_reached(model, targets, torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, dtype=torch.long))
    >>> set(joined_state_dict(model)) == names
    True
"""

from lightning_flatlora.clip.attention import SplitAttention as SplitAttention
from lightning_flatlora.clip.attention import SplitMultiheadAttention as SplitMultiheadAttention
from lightning_flatlora.clip.attention import SplitOpenClipAttention as SplitOpenClipAttention
from lightning_flatlora.clip.attention import joined_state_dict as joined_state_dict
from lightning_flatlora.clip.attention import split_attention as split_attention
from lightning_flatlora.clip.targets import Projection as Projection
from lightning_flatlora.clip.targets import Towers as Towers
from lightning_flatlora.clip.targets import check_reached as check_reached
from lightning_flatlora.clip.targets import lora_targets as lora_targets
