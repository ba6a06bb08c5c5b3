"""Front ends and baselines that take two passes a step, with modules that have methods of a test's own."""

from typing import Any

import torch
from helpers import FRONT_ENDS, Classifier, TwoPassClassifier, build, fit
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.wrappers import MetricTracker, MinMaxMetric, Running

from lightning_flatlora.baselines import SAM, LoRASAM

TWO_PASSES = ("fmlora", "module", "lora_sam", "sam")


def two_passes(kind: str, own: type[Any], rho: float = 0.5, **kwargs: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    """A front end with two passes, whose module has the methods of a class of the test's own."""
    classes = type("Own", (own, Classifier), {}), type("Own", (own, TwoPassClassifier), {})
    front_end = kind if kind in FRONT_ENDS else "plain"
    module, callbacks, more = build(front_end, rho, classes=classes, **kwargs)
    if kind in ("lora_sam", "sam"):
        callbacks.append(LoRASAM(rho) if kind == "lora_sam" else SAM(rho))
    return module, callbacks, more


def beside_a_plain_run(tmp_path: Any, kind: str, own: type[Any]) -> tuple[Any, Any]:
    """The modules of a plain run and of one with two passes, over six steps at rate 0, where the clean passes agree."""
    modules = []
    for each in ("plain", kind):
        module, callbacks, more = two_passes(each, own, lr=0.0)
        module.optimizer_class = torch.optim.SGD
        fit(tmp_path, module, callbacks, max_epochs=1, **more)
        modules.append(module)
    return modules[0], modules[1]


class LoggedLoss(nn.Module):
    """Logs by a method that it was given, as before anything could take that method's place."""

    def __init__(self, log: Any) -> None:
        super().__init__()
        self.log = log

    def forward(self, loss: Tensor) -> Tensor:
        self.log("stored", loss, on_step=True, on_epoch=True, batch_size=4)
        return loss


class Keeping:
    """torchmetrics' wrappers, one that grows with each epoch, and values logged around the module's own ``log``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last, self.range = Running(SumMetric(), window=20), MinMaxMetric(MeanMetric())
        self.tracked = MetricTracker(SumMetric(), maximize=True)
        self.criterion = LoggedLoss(self.log)  # type: ignore[has-type]

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().log(f"own/{name}", *args, **kwargs)  # type: ignore[misc]

    def loss(self, batch: Any, batch_idx: int) -> Any:
        loss = self.criterion(super().loss(batch, batch_idx))  # type: ignore[misc]
        self.last(1.0)
        self.range(loss.detach())
        self.tracked.update(1.0)
        super().log("around", loss, on_step=False, on_epoch=True, batch_size=4)  # type: ignore[misc]
        return loss

    def on_train_epoch_start(self) -> None:
        self.tracked.increment()

    def found(self) -> dict[str, Any]:
        """What all of them hold."""
        logged = self.trainer.callback_metrics  # type: ignore[attr-defined]
        return {
            "sums": [self.last.compute(), self.tracked.compute()],
            "range": self.range.compute(),
            "logged": {name: value for name, value in logged.items() if not name.startswith("flatness/")},
        }
