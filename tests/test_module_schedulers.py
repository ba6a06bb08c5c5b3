"""FMLoRAModule steps learning-rate schedulers when automatic optimization would."""

from typing import Any

import lightning as L
import pytest
from helpers import Classifier, TwoPassClassifier, build, fit, make_loader
from module_runs import whole_run
from torch.optim import lr_scheduler


def scheduled(kind: str) -> Any:
    """Scheduler configurations by name."""
    interval, frequency = kind.split("/")

    def make(optimizer: Any) -> dict[str, Any]:
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.8)
        return {"scheduler": scheduler, "interval": interval, "frequency": int(frequency)}

    return make


class EndsEarly:
    """Leaves out the last two batches of each epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 4 else None


class EndsEarlyClassifier(EndsEarly, Classifier):
    pass


class EndsEarlyTwoPass(EndsEarly, TwoPassClassifier):
    pass


@pytest.mark.parametrize("settings", [{}, {"max_steps": 6}], ids=["ended", "stopped"])
@pytest.mark.parametrize("kind", ["epoch/1", "epoch/2"])
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


@pytest.mark.parametrize("kind", ["step/1", "step/2", "step/3", "epoch/1", "epoch/2"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedulers_step_when_the_callback_s_do(tmp_path, accumulate, kind):
    """The learning rate of each batch is that of automatic optimization."""
    settings = {
        "accumulate": accumulate,
        "scheduler": scheduled(kind),
    }
    _, watch, _ = whole_run(tmp_path, "fmlora", **settings)
    _, other, _ = whole_run(tmp_path, "module", **settings)
    assert len(set(watch.rates)) > 1
    assert other.rates == watch.rates


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
