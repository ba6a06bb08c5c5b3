"""A BERT encoder cut in two: lower layers that are computed once for each text, and upper ones that are trained."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from typing_extensions import override

from recipes.offline import packaged


class UpperLayers(nn.Module):
    """The layers that are trained, on rows of tokens that several texts may share.

    Args:
        layers: a BERT's, with eager attention.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    @override
    def forward(self, hidden: Tensor, owners: Tensor) -> Tensor:
        """Return hidden states after the last layer.

        Args:
            hidden: states before these layers (R, T, d).
            owners: which text a token belongs to (R, T); -1 for padding. Tokens attend only to their own text.

        Returns:
            (R, T, d).
        """
        is_other = (owners[:, :, None] != owners[:, None, :])[:, None]  # (R, 1, T, T)
        # Added to the attention's scores.
        mask = torch.zeros(is_other.shape, dtype=hidden.dtype, device=hidden.device)
        mask.masked_fill_(is_other, torch.finfo(hidden.dtype).min)
        for layer in self.layer:
            hidden = layer(hidden, attention_mask=mask)
        return hidden


class CutEncoder:
    """An encoder whose lower layers are computed once for each text and kept.

    They are frozen and have no dropout. Each text is computed by itself, so that its states depend on nothing else.

    Args:
        model: a BERT with eager attention and without dropout, see :func:`load_encoder`.
        tokenizer: its own.
        frozen_layers: number of its layers that are not trained.
        length: tokens kept of a text.
    """

    def __init__(self, model: Any, tokenizer: Any, frozen_layers: int, length: int) -> None:
        self.width: int = model.config.hidden_size
        self.length = length
        self._tokenizer = tokenizer
        self._upper = UpperLayers(list(model.encoder.layer[frozen_layers:]))
        # A copy, since the caller's model keeps all of its layers.
        self._lower = copy.deepcopy(model).eval()
        self._lower.encoder.layer = self._lower.encoder.layer[:frozen_layers]
        # Short texts take little memory, and each is read again in every epoch.
        self._states: dict[str, Tensor] = {}

    def upper(self) -> UpperLayers:
        """Return a copy of the pretrained upper layers, in training mode."""
        # A run trains its copy in place; the next one has to begin with the pretrained weights.
        return copy.deepcopy(self._upper).train()

    @torch.no_grad()
    def states(self, text: str) -> Tensor:
        """Return hidden states of a text after the frozen layers, (tokens, d)."""
        if text not in self._states:
            inputs = self._tokenizer(text, truncation=True, max_length=self.length, return_tensors="pt")
            self._states[text] = self._lower(**inputs).last_hidden_state[0]
        return self._states[text]


def load_encoder(frozen_layers: int, length: int) -> CutEncoder:
    """Load all-MiniLM-L6-v2, in float32; the arguments are those of :class:`CutEncoder`."""
    folder = packaged.minilm()
    # Without the pooler, which the mean over the tokens replaces. Eager attention is the fastest on such short
    # texts: on a CPU the fused backward pass takes longer than all the rest of a layer.
    model = AutoModel.from_pretrained(
        folder,
        add_pooling_layer=False,
        attn_implementation="eager",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return CutEncoder(model, AutoTokenizer.from_pretrained(folder), frozen_layers, length)


def pooled(hidden: Tensor, owners: Tensor, texts: int) -> Tensor:
    """Return the mean over the tokens of each text: (R, T, d) and (R, T) give (texts, d), in float32 or wider."""
    belongs = owners.flatten()[None] == torch.arange(texts, device=owners.device)[:, None]
    hidden = hidden.flatten(0, 1)
    # A mean in bfloat16 would lose digits.
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = belongs.to(hidden.dtype)
    return weights @ hidden / weights.sum(dim=1, keepdim=True)
