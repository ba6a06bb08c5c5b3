"""FMLoRAModule steps learning-rate schedulers when automatic optimization would."""

from typing import Any

import lightning as L
import pytest
import torch
from helpers import Classifier, TwoPassClassifier, build, fit, make_loader
from module_runs import whole_run
from torch.optim import lr_scheduler


def scheduled(kind: str) -> Any:
    """Scheduler configurations by name."""
    interval, frequency, monitor = kind.split("/")

    def make(optimizer: Any) -> dict[str, Any]:
        if monitor == "-":
            scheduler: Any = lr_scheduler.StepLR(optimizer, 1, 0.8)
        else:
            scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.02)
        config = {"scheduler": scheduler, "interval": interval, "frequency": int(frequency)}
        return config | ({} if monitor == "-" else {"monitor": monitor})

    return make


class Logging:
    """Logs what plateau schedulers may monitor: in the step, over the epoch, and in the module's own hook."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().loss(batch, batch_idx)  # type: ignore[misc]
        if self.training:  # type: ignore[attr-defined]
            self.log("train_loss", loss)  # type: ignore[attr-defined]
            self.log("epoch_loss", loss, on_step=False, on_epoch=True)  # type: ignore[attr-defined]
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("hook", float(self.current_epoch % 2))  # type: ignore[attr-defined]


class LoggingClassifier(Logging, Classifier):
    pass


class LoggingTwoPass(Logging, TwoPassClassifier):
    pass


class EndsEarly:
    """Leaves out the last two batches of each epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self.log("count", 1.0)  # type: ignore[attr-defined]
        return -1 if batch_idx == 4 else None


class EndsEarlyClassifier(EndsEarly, Classifier):
    pass


class EndsEarlyTwoPass(EndsEarly, TwoPassClassifier):
    pass


@pytest.mark.parametrize("settings", [{}, {"max_steps": 6}], ids=["ended", "stopped"])
@pytest.mark.parametrize("kind", ["epoch/1/-", "epoch/2/-", "epoch/1/count"])
def test_an_epoch_that_a_hook_ends_early_is_one(tmp_path, kind, settings):
    """Or is none, where the run was stopped within it, as under automatic optimization."""
    rates = []
    for module in (EndsEarlyClassifier(), EndsEarlyTwoPass(rho=0.0)):
        module.scheduler = scheduled(kind)
        trainer = fit(tmp_path, module, [], max_epochs=4, **settings)
        rates.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))
    assert rates[0] == rates[1]
    # Lightning 2.5 itself takes such an epoch for one that was stopped.
    assert settings or rates[0][1] < module.lr or L.__version__.startswith("2.5")


@pytest.mark.parametrize(
    "kind",
    [
        "step/1/-",
        "step/2/-",
        "step/3/-",
        "epoch/1/-",
        "epoch/2/-",
        "step/1/train_loss",
        "step/2/train_loss",
        "step/1/val_loss",
        "epoch/1/train_loss",
        "epoch/1/epoch_loss",
        "epoch/1/val_loss",
        "epoch/2/val_loss",
        "epoch/1/hook",
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedulers_step_when_the_callback_s_do(tmp_path, accumulate, kind):
    """The learning rate of each batch is that of automatic optimization."""
    settings = {
        "accumulate": accumulate,
        "scheduler": scheduled(kind),
        "val": make_loader(1, seed=5, dtype=torch.float64),
        "val_check_interval": 1 if kind.startswith("step") else 1.0,
        "num_sanity_val_steps": 1,
        "classes": (LoggingClassifier, LoggingTwoPass),
    }
    _, watch, _ = whole_run(tmp_path, "fmlora", **settings)
    _, other, _ = whole_run(tmp_path, "module", **settings)
    assert len(set(watch.rates)) > 1
    assert other.rates == watch.rates


def test_a_plateau_scheduler_without_its_metric(tmp_path):
    """The error names what is monitored and what was logged."""
    with pytest.raises(Exception, match=r"'nothing'.*was not logged.*strict=False"):
        whole_run(tmp_path, "module", scheduler=scheduled("epoch/1/nothing"))


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_epochs": 2, "max_steps": 3}], ids=["epochs", "steps"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_schedule_is_as_long_as_the_run(tmp_path: Any, accumulate: int, limits: dict[str, int]) -> None:
    """Lightning's own estimate counts optimizer steps, in the module's windows too."""
    lengths = []
    for front_end in ("fmlora", "module"):
        module, callbacks, more = build(front_end, accumulate=accumulate)
        optimizers = module.configure_optimizers

        def configure_optimizers(module: Any = module, optimizers: Any = optimizers) -> Any:
            lengths.append(module.trainer.estimated_stepping_batches)
            return optimizers()

        module.configure_optimizers = configure_optimizers
        trainer = fit(tmp_path, module, callbacks, make_loader(6), **limits, **more)
        assert trainer.global_step == lengths[-1]
    assert lengths[0] == lengths[1]
    assert trainer.accumulate_grad_batches == 1
