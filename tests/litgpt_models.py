"""litgpt's own GPT with LoRA, tiny and in float64, as a LightningModule, and references for comparison."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_flatlora import FMLoRAModule

litgpt = pytest.importorskip("litgpt", reason="litgpt is not installed: pip install --no-deps litgpt")
lora = pytest.importorskip("litgpt.lora")

VOCABULARY, LENGTH = 13, 6
SETTINGS = {
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 4,
    "block_size": 8,
    "padded_vocab_size": VOCABULARY,
    "lora_r": 2,
    "lora_alpha": 3,
}
STACKED = {
    "q, k, v": {"lora_query": True, "lora_key": True, "lora_value": True},
    "q, v": {"lora_query": True, "lora_value": True},
    "q, k, v of grouped queries": {"lora_query": True, "lora_key": True, "lora_value": True, "n_query_groups": 2},
    "all layers": {
        "lora_query": True,
        "lora_value": True,
        "lora_projection": True,
        "lora_mlp": True,
        "lora_head": True,
        "n_query_groups": 2,
        "mlp_class_name": "LLaMAMLP",
        "intermediate_size": 24,
    },
}
"""Which projections have LoRA; q, k and v share one layer."""


def gpt(which: str = "q, k, v", dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A GPT with a frozen base and nonzero B, always the same."""
    torch.manual_seed(0)
    model = lora.GPT(lora.Config(**SETTINGS, **STACKED[which], lora_dropout=dropout))
    lora.mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def batches(number: int, rows: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator) for _ in range(number)]


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class _Learner:
    model: nn.Module

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.model)


class LanguageModel(_Learner, L.LightningModule):
    """Automatic optimization."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss(self.model, batch)


class TwoPassLanguageModel(_Learner, FMLoRAModule):
    """The same on FMLoRAModule."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(**settings)
        self.model = model

    def compute_loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss(self.model, batch)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)


class SplitAttention(nn.Module):
    """The dense counterpart of litgpt's LoRAQKVLinear, with separate parameters for each of q, k and v with LoRA."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.linear, self.s, self.enabled = layer.linear, layer.scaling, layer.enable_lora
        of_keys = layer.head_size * layer.n_query_groups
        self.widths = [layer.head_size * layer.n_head, of_keys, of_keys]
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        start = 0
        for index, width in enumerate(w for w, on in zip(self.widths, self.enabled, strict=True) if on):
            self.A.append(nn.Parameter(layer.lora_A.data[2 * index : 2 * index + 2].clone()))
            self.B.append(nn.Parameter(layer.lora_B.data[start : start + width].clone()))
            start += width

    def forward(self, x: Tensor) -> Tensor:
        pairs = iter(zip(self.A, self.B, strict=True))
        updates = []
        for width, on in zip(self.widths, self.enabled, strict=True):
            if on:
                A, B = next(pairs)
                updates.append(x @ A.T @ B.T)
            else:
                updates.append(x.new_zeros(*x.shape[:-1], width))
        return self.linear(x) + self.s * torch.cat(updates, dim=-1)


def split(model: nn.Module) -> tuple[nn.Module, list[tuple[nn.Parameter, nn.Parameter, float]]]:
    """A copy of a GPT with separate factors, and all of its triples (A, B, s)."""
    model = copy.deepcopy(model)
    pairs = []
    for name, layer in list(model.named_modules()):
        if isinstance(layer, lora.LoRAQKVLinear):
            apart = SplitAttention(layer)
            model.set_submodule(name, apart)
            pairs += [(A, B, apart.s) for A, B in zip(apart.A, apart.B, strict=True)]
        elif isinstance(layer, lora.LoRALinear) and layer.r > 0:
            pairs.append((layer.lora_A, layer.lora_B, layer.scaling))
    return model, pairs


def joined(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA parameters of a split copy, under the names of the original GPT."""
    factors = {}
    for name, module in model.named_modules():
        if isinstance(module, SplitAttention):
            factors[f"{name}.lora_A"] = torch.cat(list(module.A)).detach()
            factors[f"{name}.lora_B"] = torch.cat(list(module.B)).detach()
        elif isinstance(module, lora.LoRALinear) and module.r > 0:
            factors[f"{name}.lora_A"] = module.lora_A.detach()
            factors[f"{name}.lora_B"] = module.lora_B.detach()
    return factors
