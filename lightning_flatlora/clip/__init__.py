"""open_clip models with q, k, v and output projections that LoRA can adapt one by one.

open_clip keeps q, k and v in one matrix of an ``nn.MultiheadAttention``. peft can adapt that only by merging and
unmerging the frozen weights in every forward pass, where they drift. Needs the extra ``lightning-flatlora[clip]``.
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
