"""Modules that do what other people's modules do, by name: they write, count, draw, empty batches, and hold odd layers.

At a learning rate of 0 the clean passes of all runs agree, so a step must write exactly what a plain run writes.
"""

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import CLASSES, FEATURES, FRONT_ENDS, make_net
from imitated_layers import BY_NAME, Bare, OfNeMo, OfTorchtune, OnHuggingFace
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.aggregation import CatMetric
from torchmetrics.wrappers import MetricTracker, MinMaxMetric, Running
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lightning_flatlora.pairs.finders import litgpt_pairs, nemo_pairs, torchtune_pairs


class Hostile:
    """Added to the classifiers of helpers.py.

    Each pass adds to the tuple ``seen`` the batch's number and what the loss depends on besides the weights.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: tuple[tuple[float, ...], ...] = ()
        torch.manual_seed(0)
        self.prepare()

    def prepare(self) -> None:
        """Create what the module holds besides its network."""

    @property
    def own(self) -> list[Any]:
        """The module's own numbers and containers, which must match."""
        return []

    def saw(self, batch_idx: int, *values: Any) -> None:
        self.seen += ((batch_idx, *map(float, values)),)


class Registering(nn.Module):
    """Registers its first buffer in its first forward pass."""

    def forward(self) -> float:
        if not self._buffers:
            self.register_buffer("count", torch.zeros(()), persistent=False)
        self.count += 1
        return float(self.count)


class WritesBuffers(Hostile):
    """By name, through ``.data``, in place; grown, registered late, expanded, and of a dtype without arithmetic."""

    def prepare(self) -> None:
        module: Any = self
        module.register_buffer("average", torch.zeros(FEATURES))
        module.register_buffer("queue", torch.ones(FEATURES))
        module.register_buffer("bank", torch.empty(0), persistent=False)
        module.register_buffer("small", torch.zeros(4).to(torch.float8_e4m3fn))
        module.register_buffer("mask", torch.ones(1, FEATURES).expand(4, FEATURES), persistent=False)
        module.register_buffer("last", torch.zeros(FEATURES))
        self.part = Registering()

    def loss(self, batch: Any, batch_idx: int) -> Any:
        self.saw(batch_idx, self.average.sum(), self.queue.sum(), self.small.float().sum(), self.last.sum())
        self.saw(batch_idx, self.part(), len(self.bank))
        # The input is changed before it is stored.
        raw = batch[0].mul_(0.5)
        inputs = raw * self.mask + self.average + self.queue + self.last
        self.average.data.lerp_(raw.mean(0), 0.5)
        self.queue[0] += 1
        self.queue = nn.functional.normalize(self.queue, dim=0)
        self.small.data = (self.small.float() + 1).to(torch.float8_e4m3fn)
        self.last.copy_(raw.mean(dim=0))
        loss = super().loss((inputs, *batch[1:]), batch_idx)
        self.bank = torch.cat([self.bank, loss.detach()[None]])
        return loss


class KeepsAttributes(Hostile):
    """Its own numbers, lists, dicts and sets, some of them private; it also draws from all generators."""

    def prepare(self) -> None:
        self.steps, self.rate, self._private = 0, 1.0, [0]
        self.losses: list[float] = []
        self.table: dict[str, float] = {}
        self.kinds, self.recent, self.tally = {0}, deque([0], maxlen=2), Counter(a=1)
        self.objects = self.kinds, self.recent, self._private

    @property
    def own(self) -> list[Any]:
        kept = zip(self.objects, (self.kinds, self.recent, self._private), strict=True)
        assert all(one is other for one, other in kept)
        containers = [self._private, self.losses, self.table, self.kinds, list(self.recent), dict(self.tally)]
        return [self.steps, self.rate, *containers]

    def loss(self, batch: Any, batch_idx: int) -> Any:
        drawn = float(torch.rand(())), random.random(), np.random.rand()
        self.saw(batch_idx, self.steps, len(self.losses), sum(self.kinds), self.rate, *drawn)
        self.steps, self.rate = self.steps + 1, self.rate * 0.5
        self._private.append(self.steps)
        self.kinds.add(self.steps)
        self.recent.append(self.steps)
        self.tally["a"] += 1
        self.table[str(self.steps)] = self.rate
        loss = super().loss((batch[0] * sum(drawn), *batch[1:]), batch_idx)
        # First changed in place, then replaced.
        self.losses.append(0.0)
        self.losses = [*self.losses, loss.item()]
        return loss


class Normalizes(Hostile):
    """BatchNorm, a lazy one, a scripted one, and InstanceNorm, whose kernel leaves no mark on its buffers."""

    def prepare(self) -> None:
        self.norm, self.lazy = nn.BatchNorm1d(FEATURES, affine=False), nn.LazyBatchNorm1d(affine=False)
        self.instances = nn.InstanceNorm1d(3, track_running_stats=True)
        self.scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(FEATURES, affine=False), nn.Tanh()))
        self.mean = self.norm.running_mean

    def loss(self, batch: Any, batch_idx: int) -> Any:
        assert self.norm.running_mean is self.mean
        inputs = self.scripted(self.lazy(self.norm(batch[0])))
        return super().loss((self.instances(inputs.view(-1, 3, 2)).view(-1, 6), *batch[1:]), batch_idx)


class LoggedValue(nn.Module):
    """Logs with a method that it received before anything could replace that method."""

    def __init__(self, log: Any) -> None:
        super().__init__()
        self.log = log

    def forward(self, value: Tensor) -> None:
        self.log("stored", value, on_step=True, on_epoch=True, batch_size=4)


class Measures(Hostile):
    """torchmetrics, their collections and wrappers, one that grows with each epoch; its own ``log`` around ours."""

    def prepare(self) -> None:
        self.metrics = MetricCollection([MeanMetric(), CatMetric()])
        self.last, self.range = Running(SumMetric(), window=20), MinMaxMetric(MeanMetric())
        self.tracked = MetricTracker(SumMetric(), maximize=True)
        self.stored = LoggedValue(self.log)

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().log(f"own/{name}", *args, **kwargs)

    def loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().loss(batch, batch_idx)
        value = loss.detach()
        self.metrics.update(value)
        if self.training:
            super().log("mean", self.metrics["MeanMetric"], on_epoch=True, on_step=False)
        super().log("around", value, on_step=False, on_epoch=True, batch_size=4, reduce_fx="sum")
        self.stored(value)
        self.last(1.0)
        self.range(value)
        self.tracked.update(1.0)
        return loss

    def on_train_epoch_start(self) -> None:
        self.tracked.increment()

    @property
    def own(self) -> list[Any]:
        return [self.last.compute(), self.range.compute(), self.tracked.compute(), self.metrics["CatMetric"].compute()]


class FreezesLate(Hostile):
    """Decides only in configure_optimizers what is trained, as NeMo's speech language models do."""

    def prepare(self) -> None:
        self.encoder = nn.Linear(FEATURES, FEATURES)
        self.net.requires_grad_(True)

    def loss(self, batch: Any, batch_idx: int) -> Any:
        return super().loss((self.encoder(batch[0]), *batch[1:]), batch_idx)

    def configure_optimizers(self) -> Any:
        self.encoder.requires_grad_(False)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return super().configure_optimizers()


class Teaches(Hostile):
    """Momentum encoders of a head, updated after the step; their copies may require gradients, but get none."""

    def prepare(self) -> None:
        self.head, self.teacher = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.average = AveragedModel(self.head)
        self.teacher.requires_grad_(False)
        # The very first update would just copy, which shows nothing.
        self.average.update_parameters(self.teacher)

    def loss(self, batch: Any, batch_idx: int) -> Any:
        # A trained weight may be changed inside a step, for instance to keep it in a range.
        with torch.no_grad():
            self.head.weight.clamp_(-0.1, 0.1)
        return super().loss((self.head(batch[0]), *batch[1:]), batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        for update in TEACHERS.values():
            update(self)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.net.parameters() if p.requires_grad]
        return self.optimizer_class([*trained, *self.head.parameters()], lr=self.lr)


def by_data(module: Any) -> None:
    for own, other in zip(module.teacher.parameters(), module.head.parameters(), strict=True):
        own.data = own.data * 0.5 + other.data * 0.5


def by_average(module: Any) -> None:
    module.average.update_parameters(module.head)


TEACHERS: dict[str, Callable[[Any], None]] = {"teacher": by_data, "average.module": by_average}
"""How the parameters of each of these names are written."""


# -- batches that a step writes to or empties; for other kinds of batches, see test_replay.py


class Adds(Hostile):
    """Writes into the tensors of its batch."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels, factor = batch
        return super().loss((inputs.add_(1), labels, factor), batch_idx)


class Pops(Hostile):
    """Takes everything out of its batch."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        inputs, more = batch.pop("inputs"), batch.pop("more")
        return super().loss((inputs + 1, more.pop(0), more.pop()), batch_idx)


# -- networks


class IsQuantized(Hostile):
    """Its state dict has more entries than a new module can load."""

    def prepare(self) -> None:
        self.strict_loading = False


class Logits(nn.Module):
    """Any network on the classifier's inputs; its outputs are one row per sample."""

    def __init__(self, net: nn.Module, prepared: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.net, self.prepared = net, prepared

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if self.prepared is None else self.prepared(x)).reshape(len(x), -1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[None], x[None], x[None])[0]


class Experts(nn.Module):
    """Each batch uses only one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(FEATURES, CLASSES) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x.sum() > 0)](x)


class FusedExperts(nn.Module):
    """The experts of transformers 5: one parameter holds them all, and peft parametrizes it during the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, CLASSES, FEATURES) / FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", x, self.weight)


class BesideFusedExperts(nn.Module):
    """A Linear followed by experts whose parameter is also read by another module, without their adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.tied, self.experts = nn.Linear(FEATURES, FEATURES), FusedExperts(), FusedExperts()
        self.tied.weight = self.experts.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x))
        return self.tied(x) + self.experts(x)


def pictures(x: Tensor) -> Tensor:
    return x[:, None, None, :].expand(-1, 1, 2, -1)


def series(x: Tensor) -> Tensor:
    return x[:, None, :]


def two_channels(x: Tensor) -> Tensor:
    return x.view(len(x), 2, -1)


def tokens(x: Tensor) -> Tensor:
    return (x.abs() * 3).long()


def padded(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, 32 - FEATURES))


def under_peft(base: Callable[[], nn.Module], *targets: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(base(), LoraConfig(r=2, lora_alpha=3, target_modules=list(targets), **settings))


def two_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))


def tied() -> nn.Module:
    net = under_peft(two_linear, "0", "2")
    first, second = net.base_model.model[0], net.base_model.model[2]
    for factors, others in ((first.lora_A, second.lora_A), (first.lora_B, second.lora_B)):
        others["default"].weight = factors["default"].weight
    return net


def frozen_A() -> nn.Module:
    net = make_net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".2.lora_A" not in name)
    return net


def two_adapters() -> nn.Module:
    net = make_net()
    net.add_adapter("other", LoraConfig(r=3, lora_alpha=4, target_modules=["0", "2"]))
    net.base_model.set_adapter(["default", "other"])
    return net


def imitated(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(kind(), nn.Tanh(), kind())


class Bert(nn.Module):
    """LoRA by transformers' own add_adapter, without a PeftModel; the new head is trained, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        self.bert = BertForSequenceClassification(BertConfig(vocab_size=16, num_labels=CLASSES, **sizes))
        # transformers may require a peft that is not released yet.
        with patch("transformers.integrations.peft.check_peft_version"):
            self.bert.add_adapter(LoraConfig(r=2, target_modules=["query", "value"]))
        self.bert.classifier.requires_grad_(True)
        self.bert.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.bert(input_ids=(x.abs() * 5).long().clamp(max=15)).logits


def of_hydra() -> nn.Module:
    """Its LoraConfig holds a configuration library's lists, which are not Python lists."""
    torch.manual_seed(0)
    node = OmegaConf.create({"r": 2, "target_modules": ["0", "2"], "rank_pattern": {"0": 3}})
    return get_peft_model(two_linear(), LoraConfig(**node))


def of_litgpt() -> nn.Module:
    models = pytest.importorskip("litgpt_models")
    return Logits(models.gpt("q, k, v of grouped queries", dtype=torch.float32), tokens)


def quantized(kind: str) -> nn.Module:
    bases = pytest.importorskip("quantized_bases")
    return Logits(bases.network(getattr(bases, kind)), padded)


class ByAnotherLibrary(torch.autograd.Function):
    """Reentrant checkpointing as other libraries implement it."""

    @staticmethod
    def forward(ctx: Any, net: nn.Module, x: Tensor) -> Tensor:
        ctx.net = net
        ctx.save_for_backward(x)
        with torch.no_grad():
            return net(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.net(x)
        torch.autograd.backward(output, gradient)
        return None, x.grad


class Checkpointed(nn.Module):
    """Its forward pass runs a second time during the backward pass."""

    def __init__(self, net: nn.Module, how: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.net, x.clone().requires_grad_())


CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "to the end": partial(checkpoint, use_reentrant=False, early_stop=False),
    # It doesn't restore the random state for dropout.
    "another library's": ByAnotherLibrary.apply,
}


def make_dropout_net() -> nn.Module:
    return make_net(dropout=0.2)


EVERYWHERE = (*FRONT_ENDS, "loops.EFMLoRA", "loops.FMLoRA")
BY_TRAINER = (*FRONT_ENDS, "LoRASAM")
"""For what stands on hooks, on logging, or on batches that a loop's author would copy."""
OF_LAYERS = ("efmlora", "loops.EFMLoRA")
"""For what is special in its layers alone: read by a switch, and by the forward gate."""


@dataclass
class Kind:
    """How a module is hostile.

    Attributes:
        own: the class that is added to a classifier.
        net: makes its network.
        as_batch: turns a tuple of the loader into a batch.
        settings: additional settings of the method.
        front_ends: the front ends that train it.
        saves_adapters: whether AdapterCheckpoint writes the files instead of ModelCheckpoint.
        like: the kind whose run it must equal bit for bit.
    """

    own: type[Any] = Hostile
    net: Callable[[], nn.Module] = make_dropout_net
    as_batch: Callable[[Any], Any] = tuple
    settings: dict[str, Any] = field(default_factory=dict)
    front_ends: tuple[str, ...] = (*EVERYWHERE, "LoRASAM")
    saves_adapters: bool = False
    like: str | None = None


by_trainer = partial(Kind, front_ends=BY_TRAINER)
layers = partial(Kind, front_ends=OF_LAYERS)
KINDS: dict[str, Kind] = {
    "dropout": Kind(),
    "writes buffers": Kind(WritesBuffers, saves_adapters=True),
    "keeps attributes": Kind(KeepsAttributes),
    "normalizes": Kind(Normalizes),
    "measures": by_trainer(Measures),
    "teaches": by_trainer(Teaches),
    "freezes late": by_trainer(FreezesLate, saves_adapters=True),
    "writes into a tuple": by_trainer(Adds),
    "pops from a dict": by_trainer(
        Pops, as_batch=lambda batch: {"inputs": batch[0], "more": batch[1:]}, like="writes into a tuple"
    ),
    "add_adapter": layers(net=Bert, saves_adapters=True),
    "Hydra": layers(net=of_hydra, saves_adapters=True),
    "DoRA": layers(net=lambda: under_peft(two_linear, "0", "2", use_dora=True)),
    "DoRA of a convolution": layers(
        net=lambda: Logits(
            under_peft(lambda: nn.Sequential(nn.Conv2d(1, CLASSES, 2)), "0", use_dora=True, init_lora_weights=False),
            pictures,
        )
    ),
    "convolution": layers(net=lambda: Logits(under_peft(lambda: nn.Sequential(nn.Conv1d(1, CLASSES, 2)), "0"), series)),
    "GPT-2": layers(net=lambda: under_peft(lambda: nn.Sequential(Conv1D(CLASSES, FEATURES)), "0", fan_in_fan_out=True)),
    "rslora": layers(net=lambda: under_peft(two_linear, "0", "2", use_rslora=True)),
    "MultiheadAttention": layers(net=lambda: Logits(under_peft(Attention, "attention"))),
    "tied": layers(net=tied),
    "frozen A": layers(net=frozen_A),
    "several adapters": layers(net=two_adapters),
    "experts": layers(net=lambda: under_peft(Experts, "0", "1")),
    "fused experts": Kind(net=lambda: under_peft(BesideFusedExperts, "linear", target_parameters=["experts.weight"])),
    "embedding": Kind(net=lambda: Logits(under_peft(lambda: nn.Sequential(nn.Embedding(32, CLASSES)), "0"), tokens)),
    "grouped convolution": layers(
        net=lambda: Logits(under_peft(lambda: nn.Sequential(nn.Conv1d(2, 4, 1, groups=2)), "0"), two_channels)
    ),
    "torchtune": layers(net=lambda: imitated(OfTorchtune), settings={"finder": torchtune_pairs}),
    "NeMo": layers(net=lambda: imitated(OfNeMo), settings={"finder": nemo_pairs}),
    "NeMo on Hugging Face": layers(net=lambda: imitated(OnHuggingFace), settings={"finder": nemo_pairs}),
    "bare parameters": layers(net=lambda: imitated(Bare), settings={"finder": litgpt_pairs}),
    "by name": layers(net=lambda: imitated(Bare), settings={"finder": BY_NAME}),
    "stacked q, k and v": layers(net=of_litgpt, settings={"finder": litgpt_pairs}),
    "4 bits": layers(IsQuantized, net=lambda: quantized("four_bits")),
    "8 bits": layers(IsQuantized, net=lambda: quantized("eight_bits")),
    "not checkpointed": Kind(net=make_net),
}
for title, how in CHECKPOINTS.items():
    dropout, like = (0.0, "not checkpointed") if title == "another library's" else (0.2, "dropout")
    makes = partial(lambda how, dropout: Checkpointed(make_net(dropout), how), how, dropout)
    # loops.EFMLoRA refuses those whose forward pass records no graph: see test_loop_reads.py.
    front_ends = ("fmlora", "module", "loops.FMLoRA", "efmlora")
    if "to the end" in title or "not" in title:
        front_ends = (*front_ends, "loops.EFMLoRA")
    KINDS[f"checkpointed, {title}"] = Kind(net=makes, like=like, front_ends=front_ends)
