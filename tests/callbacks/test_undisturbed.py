"""Whatever a step writes on its module, within what is promised, a measurement leaves no trace of it."""

import random
from collections import Counter, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import same
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection, MinMaxMetric
from torchmetrics.aggregation import CatMetric

from lightning_flatlora.callbacks.probe_batches import ProbeBatches


class Writes(LightningModule):
    """A module whose pass leaves marks wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.norm.requires_grad_(False)
        self.frozen = nn.Dropout(0.5).eval()
        self.metrics = MetricCollection({"mean": MeanMetric(), "all": CatMetric()})
        self.wrapped = MinMaxMetric(MeanMetric())
        self.scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)))
        self.register_buffer("queue", torch.zeros(3))
        self.outputs: list[Any] = [1]
        self.table: dict[str, Any] = {"seen": 1}
        self.kinds, self.recent, self.counts = {1}, deque([1], maxlen=3), Counter(a=1)
        self.calls, self.mean = 0, 0.5

    def write(self) -> None:
        x = torch.randn(4, 3) + random.random() + np.random.rand()
        self.norm(self.scripted(x))
        self.norm.running_mean.add_(1)  # in eval mode too
        self.scripted.train()
        self.scripted(x)
        self.metrics.update(x.sum())
        self.wrapped(x.sum())
        self.queue.copy_(x[0])
        self.queue = torch.ones(3)
        self.register_buffer("late", torch.ones(3))
        self.outputs.append(x)
        self.table["new"] = x
        self.kinds.add(2)
        self.recent.append(2)
        self.counts["b"] += 1
        self.calls, self.mean = self.calls + 1, self.mean / 2
        self.table = {}
        self.frozen.train()
        self.log("loss", x.sum())
        self.log_dict({"other": x.sum()})

    def state(self) -> list[Any]:
        """All that the pass writes, by value."""
        streams = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        metrics = []
        for metric in (*self.metrics.values(), self.wrapped, self.wrapped._base_metric):
            own = {name: value for name, value in vars(metric).items() if isinstance(value, (int, Tensor, list))}
            metrics.append({name: _copy(value) for name, value in own.items() if name != "training"})
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        containers = [self.outputs, self.table, self.kinds, list(self.recent), dict(self.counts)]
        modes = [module.training for module in self.modules()]
        return [streams, metrics, buffers, [_copy(each) for each in containers], (self.calls, self.mean), modes]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_that_a_pass_writes_is_left(fails: bool) -> None:
    module = Writes()
    module.metrics.update(torch.tensor(2.0))
    module.wrapped.update(torch.tensor(2.0))
    objects = {name: id(value) for name, value in vars(module).items() if name not in ("calls", "mean")}
    before = module.state()
    held = ProbeBatches(SimpleNamespace(optimizers=[]), module, 1)  # type: ignore[arg-type]
    for _ in range(2):
        try:
            with held.undisturbed():
                assert not any(part.training for part in module.modules())
                module.write()
                module.write()
                changed = [not same(left, right) for left, right in zip(module.state(), before, strict=True)]
                assert changed == [True] * 6
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails
        assert same(module.state(), before)
        assert {name: id(value) for name, value in vars(module).items() if name in objects} == objects
