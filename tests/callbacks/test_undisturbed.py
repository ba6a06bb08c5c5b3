"""Whatever a step writes on its modules, inside a measurement it writes on copies."""

import functools
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import same
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.aggregation import CatMetric

import lightning_flatlora.callbacks.monitor.snapshots as undisturbed_module
from lightning_flatlora.callbacks import reachable
from lightning_flatlora.callbacks.monitor.snapshots import read_without_trace, undisturbed

CPU = torch.device("cpu")


@dataclass
class Seen:
    """What a dataclass keeps."""

    batches: int = 0
    sizes: list[int] = field(default_factory=list)


class Meter:
    """An object of the project's own, which is no module."""

    def __init__(self) -> None:
        self.total, self.seen, self.itself = np.zeros(2), Counter(a=1), self

    def add(self, x: float) -> None:
        self.total += x
        self.seen["a"] += 1
        self.new = x


class Writes(LightningModule):
    """A module whose pass leaves marks wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.norm.requires_grad_(False)
        self.frozen = nn.Dropout(0.5).eval()
        self.metrics = MetricCollection({"mean": MeanMetric(), "all": CatMetric()})
        self.register_buffer("queue", torch.zeros(3))
        self.outputs: list[Any] = [torch.ones(2)]
        self.table: dict[str, Any] = {"seen": torch.ones(1)}
        self.nested: dict[str, Any] = {"train": [torch.ones(1)], "val": ({"seen": torch.ones(1)},)}
        self.nested["itself"] = self.nested
        self.alias = self.nested["train"]
        self.recent: deque[Any] = deque([1, [1]], maxlen=3)
        self.calls = 0
        self.last = torch.zeros(2)
        self.generator = torch.Generator().manual_seed(1)
        self.random = random.Random(1)
        self.numpy = np.random.default_rng(1)
        self.old_numpy = np.random.RandomState(1)
        self.counts: Counter[str] = Counter(a=1)
        self.array = np.zeros(3)
        self.seen, self.meters, self.space = Seen(), [Meter()], SimpleNamespace(calls=0, more=[1])
        self.hidden = [nn.BatchNorm1d(3)]  # of no parent's modules

    def write(self) -> None:
        x = torch.randn(4, 3, generator=self.generator) + self.random.random() + self.numpy.random()
        x = x + self.old_numpy.rand()
        self.counts["a"] += 1
        self.counts["b"] += 1
        self.array += 1
        self.seen.batches += 1
        self.seen.sizes.append(4)
        self.meters[0].add(1.0)
        assert self.meters[0].itself is self.meters[0]
        self.space.calls += 1
        self.space.more.append(2)
        self.hidden[0](x)
        self.norm(x * torch.rand(4, 3) * random.random() * np.random.rand())
        self.norm.running_mean.add_(1)  # in eval mode too
        self.metrics.update(x.sum())
        self.queue.copy_(x[0])
        self.queue = torch.ones(3)
        self.outputs[0].add_(1)
        self.outputs.append(x)
        self.table["seen"].add_(1)
        self.table["new"] = x
        self.nested["train"][0].add_(1)
        self.alias.append(x)
        assert self.nested["train"] is self.alias
        self.nested["val"][0]["seen"].add_(1)
        self.recent[1].append(2)
        self.recent.append(2)
        self.calls += 1
        self.last.add_(1)
        self.fresh = x
        self.frozen.train()
        self.log("loss", x.sum())
        self.log_dict({"other": x.sum()})

    def state(self) -> Any:
        """All that the pass writes, by value."""
        streams = self.generator.get_state(), self.random.getstate(), str(self.numpy.bit_generator.state)
        streams += (str(self.old_numpy.get_state()),)
        streams += torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        values = []
        for metric in self.metrics.values():
            own_attributes = {k: v for k, v in vars(metric).items() if not k.startswith("__")}
            values.append({k: v for k, v in own_attributes.items() if isinstance(v, (int, torch.Tensor, list))})
        own: Any = dict(self.named_buffers()), self.outputs, self.table, list(self.recent), self.calls, self.last
        own += self.nested["train"], self.nested["val"]
        meter, space = vars(self.meters[0]), vars(self.space)
        kept = {name: str(meter[name]) for name in sorted(meter) if name != "itself"}
        objects: Any = dict(self.counts), self.array.tolist(), vars(self.seen), kept, space
        objects += (dict(self.hidden[0].named_buffers()),)
        modes = [module.training for module in self.modules()]
        return [_copy(part) for part in (streams, values, own, objects, modes, hasattr(self, "fresh"))]


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_that_a_pass_writes_is_left(fails: bool) -> None:
    module = Writes()
    module.metrics.update(torch.tensor(2.0))
    objects = {name: id(value) for name, value in module.__dict__.items()}
    before = module.state()
    try:
        with undisturbed(module):
            assert not any(part.training for part in module.modules())
            module.write()
            module.write()
            assert not same(module.state(), before)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert same(module.state(), before)
    assert {name: id(value) for name, value in module.__dict__.items()} == objects


def test_the_pass_itself_does_leave_marks() -> None:
    """Without the guard: what the test above looks at changes, part by part."""
    module = Writes()
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    before = module.state()
    module.write()
    changed = [not same(left, right) for left, right in zip(module.state(), before, strict=True)]
    assert changed == [True] * 6


def test_objects_of_other_libraries_are_left_alone() -> None:
    """A logger's connection, a registry, a trainer: what they write meanwhile stays."""
    foreign = type("Run", (), {"__module__": "elsewhere.sdk"})()
    foreign.lines = []
    module = Writes()
    module.run = foreign
    with undisturbed(module):
        foreign.lines.append("line")
    assert foreign.lines == ["line"]


# -- data sets, which may hold a lot


class Tokens(Dataset):  # type: ignore[type-arg]
    """A list of samples, as instruction tuning holds them, and what it counts while it is read."""

    def __init__(self, samples: int, length: int) -> None:
        self.samples = [
            {"ids": [1000 + i] * length, "labels": list(range(1000, 1000 + length))} for i in range(samples)
        ]
        self.generator = random.Random(1)
        self.counts = {"reads": [0]}


def test_numbers_of_a_data_set_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for generators, nor to copy them: a data set that is small enough to be copied has its lists copied."""
    looked_at = []
    held_by = reachable.held_by
    monkeypatch.setattr(reachable, "held_by", lambda value: looked_at.append(value) or held_by(value))
    copied = undisturbed_module._Copies._copied
    monkeypatch.setattr(
        undisturbed_module._Copies, "_copied", lambda self, value: looked_at.append(value) or copied(self, value)
    )
    data = Tokens(samples=10, length=100)
    with read_without_trace(data):
        data.samples[3]["ids"].append(7)
        data.generator.random()
    assert len(data.samples[3]["ids"]) == 100
    assert data.generator.random() == random.Random(1).random()
    assert len(looked_at) < 200


def test_what_a_data_set_holds_in_all_is_data() -> None:
    """No container of it is long, and it is left as it is; what it counts beside is put back."""
    data = Tokens(samples=50, length=300)
    own = data.samples
    with read_without_trace(data):
        assert data.samples is own
        assert data.samples[0]["ids"] is own[0]["ids"]
        data.counts["reads"][0] += 1
        data.generator.random()
    assert data.counts == {"reads": [0]}
    assert data.generator.random() == random.Random(1).random()


def test_generators_near_by_are_found_where_much_is_to_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search ends at some time, and begins with what is nearest."""
    monkeypatch.setattr(reachable, "_MOST_SEARCHED", 100)
    data = Tokens(samples=200, length=1)
    data.far = [[[[[[[[random.Random(2)]]]]]]]]  # type: ignore[attr-defined]
    found = reachable.generators_in([data])
    assert found == [data.generator]


GENERATOR = np.random.default_rng(0)


class Drawing(Writes):
    """Draws from a generator of its class, and from a global variable in a function that it calls."""

    rng = random.Random(0)

    def draw(self) -> tuple[float, float]:
        return self.rng.random(), drawn()


def drawn() -> float:
    return GENERATOR.random()


def test_generators_of_classes_and_of_global_variables_are_put_back() -> None:
    module = Drawing()
    with undisturbed(module):
        inside = module.draw()
    assert module.draw() == inside


def test_of_much_data_on_a_module_the_list_alone_is_copied() -> None:
    """At every measurement: what is appended is taken back, and the samples are not copied."""
    module = Writes()
    module.samples = [{"ids": [i, [i]]} for i in range(30_000)]
    own = module.samples
    with undisturbed(module):
        assert module.samples is not own
        assert module.samples[0] is own[0]
        module.samples.append({})
    assert module.samples is own
    assert len(own) == 30_000


def test_what_several_partial_functions_write_is_put_back() -> None:
    module, meters = Writes(), [Meter() for _ in range(4)]
    module.notes = [functools.partial(meter.add, x=1.0) for meter in meters]
    with undisturbed(module):
        for note in module.notes:
            note()
    assert [meter.total.tolist() for meter in meters] == [[0.0, 0.0]] * 4
