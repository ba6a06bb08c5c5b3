"""The callback through which an FMLoRAModule starts, counts, clips and ends, so that its hooks stay the user's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.callbacks.efmlora import EFMLoRA
from lightning_flatlora.callbacks.patches import put_on
from lightning_flatlora.callbacks.training_step import window_of
from lightning_flatlora.compat import callback_of, callbacks_of
from lightning_flatlora.methods.efmlora import EFMLoRAStep
from lightning_flatlora.methods.step_method import StepMethod


class FMLoRAModuleCallback(MethodCallback):
    """Do for an FMLoRAModule what belongs into hooks.

    Next to an EFMLoRA callback the module takes rho, the perturbation and the average from that one. Hooks whose
    pl_module is Any use what an FMLoRAModule has and a LightningModule has not.

    Args:
        method: with its settings.
    """

    @override
    def _begin(self) -> None:
        super()._begin()
        self._efmlora: EFMLoRA | None = None
        self._is_set_up = False

    @property
    @override
    def source(self) -> StepMethod:
        return self.method if self._efmlora is None else self._efmlora.method

    @override
    def works_beside(self, other: MethodCallback) -> bool:
        return isinstance(other, EFMLoRA)

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._is_set_up = True
            original = trainer.strategy.setup_optimizers

            def setup_optimizers(trainer: Trainer) -> None:
                with counting_windows(trainer):
                    original(trainer)

            self._patches.enter_context(put_on(trainer.strategy, {"setup_optimizers": setup_optimizers}))

    @override
    def configuration_problems(self, trainer: Trainer, pl_module: Any) -> list[str]:
        problems = super().configuration_problems(trainer, pl_module)
        problems += pl_module._subclass_problems()
        if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs):
            problems.append(
                "ReduceLROnPlateau waits for a metric, which FMLoRAModule does not give it: leave it out of "
                "configure_optimizers and step it yourself, as in on_validation_epoch_end, or subclass "
                "LightningModule and use the FMLoRA callback"
            )
        if len(trainer.optimizers) != 1:
            problems.append(
                f"configure_optimizers must return one optimizer, got {len(trainer.optimizers)}: for several, use "
                "manual optimization and the EFMLoRA callback"
            )
        if sum(isinstance(callback, EFMLoRA) for callback in callbacks_of(trainer)) > 1:
            problems.append("one EFMLoRA can schedule the module's passes: keep one")
        efmlora = callback_of(trainer, EFMLoRA)
        if efmlora is not None:
            problems += self._problems_beside(efmlora, trainer)
        return problems

    def _problems_beside(self, efmlora: EFMLoRA, trainer: Trainer) -> list[str]:
        """List what can't work with the EFMLoRA callback that schedules the passes."""
        problems = []
        for name in ("rho", "estimator", "norm_scope", "adapter_name", "finder"):
            own, other = getattr(self, name), getattr(efmlora, name)
            if own != other:
                problems.append(
                    f"{name} must be the same in the module and in EFMLoRA beside it, got {own!r} and {other!r}"
                )
        if (self.start_step, self.every_n_steps) != (0, 1):
            problems.append("EFMLoRA beside the module schedules the passes: give start_step and every_n_steps to it")
        if not self.sync_ascent and trainer.world_size > 1:
            problems.append(
                "sync_ascent=False leaves each rank its own E, and EFMLoRA beside it keeps one average for all: "
                "leave it True"
            )
        return problems

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._efmlora = callback_of(trainer, EFMLoRA)
        # EFMLoRA finds the pairs and has their perturbation.
        self.fit_methods.needs_pairs = self._efmlora is None
        super().on_fit_start(trainer, pl_module)
        if self._efmlora is not None:
            method = self._efmlora.method
            assert isinstance(method, EFMLoRAStep)
            method.schedules_module = True

    @override
    def look_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Its pairs say whether the step ascends, and it may have wrapped the strategy's methods inside of ours.
        if self._efmlora is not None:
            self._efmlora.look_again(trainer, pl_module)
        super().look_again(trainer, pl_module)

    def check_set_up(self) -> None:
        """Refuse a module that does not give this callback to the Trainer."""
        if not self._is_set_up:
            raise MisconfigurationException(
                "FMLoRAModule was not set up, so nothing would be perturbed: if you override configure_callbacks, "
                "return [*super().configure_callbacks(), ...]"
            )

    @override
    def uninstall(self) -> None:
        super().uninstall()
        self._is_set_up = False

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        # The gradient is complete and unscaled only now, and E, which clipping must not change, was taken before.
        # The hook, which a subclass may override as in automatic optimization; Lightning's own clips nothing for None.
        pl_module.configure_gradient_clipping(optimizer, pl_module.gradient_clip_val, pl_module.gradient_clip_algorithm)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An on_train_batch_start may have left the last batch out. Not if the run was stopped within the epoch.
        batches = trainer.fit_loop.epoch_loop.batch_progress
        if batches.is_last_batch and batches.current.completed < batches.current.ready:
            self.step_schedulers(trainer, "epoch", trainer.current_epoch)
        super().on_train_epoch_end(trainer, pl_module)

    def step_schedulers(self, trainer: Trainer, interval: str, index: int) -> None:
        """Step the LR schedulers that are due, which Lightning does not do under manual optimization.

        Args:
            trainer: the running trainer.
            interval: "step" or "epoch".
            index: of the batch or epoch, from 0.
        """
        for config in trainer.lr_scheduler_configs:
            if config.interval == interval and (index + 1) % config.frequency == 0:
                trainer.lightning_module.lr_scheduler_step(config.scheduler, None)


@contextmanager
def counting_windows(trainer: Trainer) -> Iterator[None]:
    """Inside, ``trainer.estimated_stepping_batches`` counts optimizer steps.

    In manual optimization Lightning knows of no windows, and counts batches.
    """
    before = trainer.accumulate_grad_batches
    trainer.accumulate_grad_batches = window_of(trainer)
    try:
        yield
    finally:
        trainer.accumulate_grad_batches = before
