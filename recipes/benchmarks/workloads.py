"""Models for the benchmarks: known sizes, random weights and data, since cost depends only on sizes."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    RobertaConfig,
    ViTConfig,
)

_CAUSAL = ("gpt2", "llama", "qwen3_moe")


@dataclass(frozen=True)
class Workload:
    """A model, the place of its adapter, and the size of a batch.

    Attributes:
        config: configuration of a transformers model.
        targets: layers that get LoRA, as peft's ``target_modules``.
        batch: sequences or images per step.
        length: tokens per sequence; images have their own.
        layers: number of blocks.
        rank: rank of the adapter; alpha is twice as large.
        full: train all weights, without an adapter.
    """

    config: PretrainedConfig
    targets: tuple[str, ...] | str
    batch: int
    length: int
    layers: int
    rank: int = 8
    full: bool = False

    @property
    def causal(self) -> bool:
        """Whether it is a causal language model, which has its own loss."""
        return self.config.model_type in _CAUSAL

    def network(self) -> nn.Module:
        """Make the model with its adapters."""
        torch.manual_seed(0)
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = self.layers
        network: Any = (AutoModelForCausalLM if self.causal else AutoModel).from_config(config)
        if not self.full:
            linears = self.config.model_type != "gpt2"  # whose Conv1D keeps weights transposed
            targets = self.targets if isinstance(self.targets, str) else list(self.targets)
            lora = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=targets, fan_in_fan_out=not linears)
            network = get_peft_model(network, lora)
        return cast("nn.Module", network)

    def example(self) -> Tensor:
        """Draw one batch: token ids (batch, length), or images (batch, channels, height, width)."""
        if self.config.model_type == "vit":
            side = self.config.image_size
            return torch.randn(self.batch, self.config.num_channels, side, side)
        return torch.randint(5, 1000, (self.batch, self.length))


@dataclass(frozen=True)
class Stack:
    """A chain of square Linear layers, each with an adapter: the cost of a layer apart from its arithmetic.

    Attributes:
        layers: number of layers.
        width: rows and columns of each.
        batch: samples per step.
        rank: rank of the adapter; alpha is twice as large.
        full: train all weights, without an adapter.
    """

    layers: int
    width: int
    batch: int
    rank: int = 8
    full: bool = False
    causal: bool = False

    def network(self) -> nn.Module:
        """Make the model with its adapters."""
        torch.manual_seed(0)
        network: Any = nn.Sequential(*(nn.Linear(self.width, self.width) for _ in range(self.layers)))
        for layer in network:
            # Without residual connections the signal would shrink to subnormal numbers, as in no real model, and
            # processors multiply those ten times more slowly.
            nn.init.orthogonal_(layer.weight)
        if not self.full:
            names = [name for name, _ in network.named_children()]
            network = get_peft_model(network, LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=names))
        return cast("nn.Module", network)

    def example(self) -> Tensor:
        """Draw one batch, shape (batch, width)."""
        return torch.randn(self.batch, self.width)


class Learner(L.LightningModule):
    """Trains a network's unfrozen weights with AdamW."""

    def __init__(self, network: nn.Module, causal: bool) -> None:
        super().__init__()
        self.network = network.train()
        self.causal = causal

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the language model's loss, or the mean square of an encoder's states or a stack's outputs."""
        if self.causal:
            loss: Tensor = self.network(input_ids=batch, labels=batch).loss
        else:
            states = self.network(batch)
            loss = getattr(states, "last_hidden_state", states).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW for the trained weights."""
        return torch.optim.AdamW(self.trained(), lr=1e-4)

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that are not frozen."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def _bert(width: int, heads: int) -> BertConfig:
    return BertConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)


def _llama(width: int, heads: int, **other: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=width, num_attention_heads=heads, **other)


_QV_VIT = ("q_proj", "v_proj", "query", "value")  # as transformers names them now and did before
_QUERY_VALUE, _QKV_GPT2, _QV_LLAMA = ("query", "value"), ("c_attn",), ("q_proj", "v_proj")
_ROBERTA: dict[str, Any] = {"hidden_size": 1024, "num_attention_heads": 16}


def _two_blocks(width: int) -> Workload:
    """Return a model that trains on 512 tokens per step, to show the engine's share at high ranks."""
    config = _llama(width, width // 64, vocab_size=1024, intermediate_size=8 * width // 3)
    return Workload(config, _QV_LLAMA, batch=4, length=128, layers=2)


def _mixture_of_experts(width: int) -> Qwen3MoeConfig:
    """Return a narrow model with Qwen3-30B-A3B's proportions and 128 experts, 8 of them per token."""
    sizes: dict[str, Any] = {"hidden_size": width, "moe_intermediate_size": 3 * width // 8, "vocab_size": 1024}
    heads: dict[str, Any] = {"num_attention_heads": width // 64, "num_key_value_heads": 1, "head_dim": 64}
    return Qwen3MoeConfig(**sizes, **heads, num_experts=128, num_experts_per_tok=8)


WORKLOADS: dict[str, Workload | Stack] = {
    "minilm": Workload(_bert(384, 12), _QUERY_VALUE, batch=16, length=40, layers=6),
    "smollm2": Workload(
        _llama(576, 9, num_key_value_heads=3, intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True),
        _QV_LLAMA,
        batch=4,
        length=25,
        layers=30,
    ),
    "roberta-large": Workload(
        RobertaConfig(**_ROBERTA, intermediate_size=4096, vocab_size=50265), _QUERY_VALUE, batch=8, length=64, layers=24
    ),
    "gpt2-medium": Workload(GPT2Config(n_embd=1024, n_head=16), _QKV_GPT2, batch=4, length=64, layers=24),
    "vit-b16": Workload(ViTConfig(), _QV_VIT, batch=4, length=0, layers=12),
    # two layers of a 7B model's shapes; all of its layers cost the same
    "llama-7b-layers": Workload(
        _llama(4096, 32, intermediate_size=11008, vocab_size=1024), _QV_LLAMA, batch=1, length=128, layers=2
    ),
    "width-768": _two_blocks(768),
    "width-1024": _two_blocks(1024),
    "width-2048": _two_blocks(2048),
    # Attention, routers, and two parameters of all experts in each layer.
    "mixture-of-experts": Workload(_mixture_of_experts(256), "all-linear", batch=4, length=512, layers=4, rank=4),
    "small-layers": Stack(layers=600, width=64, batch=16),
    "tiny": Workload(_bert(32, 2), _QUERY_VALUE, batch=4, length=8, layers=2),
}
