"""What a measurement puts back beyond what an extra pass does: the modes of all parts, and what was logged."""

from types import SimpleNamespace

import pytest
import torch
from helpers import same
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import MinMaxMetric
from torchmetrics.aggregation import MeanMetric

from lightning_flatlora.callbacks.probe_batches import ProbeBatches


class Writes(LightningModule):
    """Parts in either mode, of which a pass changes some."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Dropout(0.5).eval()
        self.scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)))
        self.wrapped = MinMaxMetric(MeanMetric())

    def write(self) -> None:
        self.frozen.train()
        self.scripted.train()
        self.scripted(torch.randn(4, 3))
        self.wrapped(1.0)
        self.log("loss", 1.0)
        self.log_dict({"other": 1.0})

    def state(self) -> list[object]:
        modes = [part.training for part in self.modules()]
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        return [modes, buffers, self.wrapped.min_val.clone(), self.wrapped._base_metric._update_count]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_put_back_and_nothing_is_logged(fails: bool) -> None:
    module = Writes()
    before = module.state()
    held = ProbeBatches(SimpleNamespace(optimizers=[]), module, 1)  # type: ignore[arg-type]
    for _ in range(2):
        try:
            with held.undisturbed():
                assert not any(part.training for part in module.modules())
                module.write()
                assert not any(same(left, right) for left, right in zip(module.state(), before, strict=True))
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails
        assert same(module.state(), before)
