"""The callback through which an FMLoRAModule starts, counts, clips and ends, so that its hooks stay the user's."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.callbacks.efmlora import EFMLoRA
from lightning_flatlora.callbacks.passes import Passes
from lightning_flatlora.callbacks.patches import put_on_instance
from lightning_flatlora.compat import MisconfigurationException, callback_of, callbacks_of
from lightning_flatlora.methods.efmlora import EFMLoRAStep
from lightning_flatlora.methods.fmlora import FMLoRAStep
from lightning_flatlora.methods.replay import Replay
from lightning_flatlora.sharding import is_sharded


class FMLoRAModuleCallback(MethodCallback):
    """Do for an FMLoRAModule what belongs into hooks.

    Next to an EFMLoRA callback the module takes the step count, rho, the perturbation and the average from that one.

    Attributes:
        replay: lets the second pass of a step begin as the first.
        has_reached_step: whether a training_step of the user's own has ever called FMLoRAModule's.
        has_reached_batch: whether it has in this batch.

    Args:
        method: with its settings.
        window: batches of an optimizer step.
    """

    def __init__(self, method: FMLoRAStep, window: int) -> None:
        self.module_window = window
        super().__init__(method)

    @override
    def _begin(self) -> None:
        super()._begin()
        self.replay = Replay(nn.Module())
        self.has_reached_step = True
        self.has_reached_batch = False
        self._efmlora: EFMLoRA | None = None
        self._is_set_up = False
        self._is_in_epoch = False
        self._setup_patches = ExitStack()

    @property
    def source(self) -> FMLoRAStep | EFMLoRAStep:
        """The method whose perturbation the module uses: that of the EFMLoRA callback, if there is one."""
        callback = self._efmlora or self
        assert isinstance(callback.method, (FMLoRAStep, EFMLoRAStep))
        return callback.method

    @override
    def works_beside(self, other: MethodCallback) -> bool:
        return isinstance(other, EFMLoRA)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # After super().setup(), which forgets the set-up of the last fit.
        self._is_set_up = True
        if stage == "fit":
            self._count_windows(trainer)

    def _count_windows(self, trainer: Trainer) -> None:
        """Let ``trainer.estimated_stepping_batches`` count optimizer steps while the optimizers are configured.

        Under manual optimization Lightning knows of no accumulation window, and would count batches.
        """
        assert self.module_window is not None
        original, window = trainer.strategy.setup_optimizers, self.module_window

        def setup_optimizers(*args: Any, **kwargs: Any) -> None:
            with counting_windows(trainer, window):
                original(*args, **kwargs)

        self._setup_patches.callback(put_on_instance(trainer.strategy, "setup_optimizers", setup_optimizers))

    @override
    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        problems = super().configuration_problems(trainer, pl_module)
        module: Any = pl_module  # an FMLoRAModule
        problems += module._subclass_problems()
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
        self._setup_patches.close()
        super().on_fit_start(trainer, pl_module)
        self.replay = Replay(pl_module, trainer.optimizers, is_sharded(trainer.strategy.model))
        module: Any = pl_module  # an FMLoRAModule
        # If nothing is overridden, training_step is FMLoRAModule's own, and there is nothing to check.
        self.has_reached_step = not module._overrides_step

    @override
    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._efmlora = callback_of(trainer, EFMLoRA)
        super().install(trainer, pl_module)

    @override
    def wrap_passes(self, kind: type[Passes], trainer: Trainer, pl_module: LightningModule) -> None:
        # The module takes the passes itself.
        super().wrap_passes(Passes, trainer, pl_module)

    @override
    def look_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_stale:
            self.replay.look_again(trainer.optimizers)
        super().look_again(trainer, pl_module)

    @override
    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Otherwise EFMLoRA finds the pairs and has their perturbation.
        if callback_of(trainer, EFMLoRA) is None:
            super()._find(trainer, pl_module)

    @override
    def uninstall(self) -> None:
        super().uninstall()
        self._setup_patches.close()
        self._is_set_up = False
        self.replay = Replay(nn.Module())

    def ascends(self, trainer: Trainer) -> bool:
        """Say whether the coming step has two passes; never while a tuner has removed our callbacks."""
        if not self._is_set_up:
            raise MisconfigurationException(
                "FMLoRAModule was not set up, so nothing would be perturbed: if you override configure_callbacks, "
                "return [*super().configure_callbacks(), ...]"
            )
        # A tuner, such as the batch size finder, removes callbacks for its trial steps, and these must be plain.
        return (self._efmlora or self) in callbacks_of(trainer) and self.source.ascends

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._check_reached(pl_module)
        if self._efmlora is None:  # otherwise that callback's hook does this
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
        # The gradient is complete and unscaled only now, and E, which clipping must not change, was taken before.
        module: Any = pl_module  # an FMLoRAModule
        # The hook, which a subclass may override as in automatic optimization; Lightning's own clips nothing for None.
        module.configure_gradient_clipping(optimizer, module.gradient_clip_val, module.gradient_clip_algorithm)

    def _check_reached(self, pl_module: LightningModule) -> None:
        """Refuse a subclass whose training_step does not call FMLoRAModule's, which takes the passes."""
        if not self.has_reached_step:
            name = type(pl_module).__name__
            raise MisconfigurationException(
                f"{name}.training_step does not call super().training_step(batch, batch_idx), which takes the two "
                "passes and the optimizer step, so nothing would be perturbed or trained: remove it, or call super()"
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._is_in_epoch = True

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        # A step that returns nothing may have skipped its batch before it called super().
        if outputs:
            self._check_reached(pl_module)
        reached, self.has_reached_batch = self.has_reached_batch, False
        if not reached and self.module_window != 1:
            # The gradients are reset in a window's first batch, and the step is taken in its last one.
            raise MisconfigurationException(
                f"{type(pl_module).__name__}: with accumulate_grad_batches={self.module_window}, every batch must "
                "reach FMLoRAModule.training_step, and one has not: a training_step of yours returned before it called "
                "super(), or the dataloader gave None. Return None from compute_loss to skip a batch"
            )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_reached(pl_module)
        # An on_train_batch_start may have left the last batch out. Not if the run was stopped within the epoch.
        if self._is_in_epoch and trainer.is_last_batch:
            self.step_schedulers(trainer, "epoch", trainer.current_epoch)
        if self._efmlora is None:
            super().on_train_epoch_end(trainer, pl_module)

    def step_schedulers(self, trainer: Trainer, interval: str, index: int) -> None:
        """Step the LR schedulers that are due, which Lightning does not do under manual optimization.

        Args:
            trainer: the running trainer.
            interval: "step" or "epoch".
            index: of the batch or epoch, from 0.
        """
        if interval == "epoch":
            self._is_in_epoch = False
        for config in trainer.lr_scheduler_configs:
            if config.interval == interval and (index + 1) % config.frequency == 0:
                trainer.lightning_module.lr_scheduler_step(config.scheduler, None)

    @override
    def state_dict(self) -> dict[str, Any]:
        # EFMLoRA saves the count and the average that both use.
        return {} if self._efmlora is not None else super().state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            super().load_state_dict(state_dict)


@contextmanager
def counting_windows(trainer: Trainer, window: int) -> Iterator[None]:
    """Inside, ``trainer.estimated_stepping_batches`` counts so many batches as one optimizer step."""
    before = trainer.accumulate_grad_batches
    trainer.accumulate_grad_batches = window
    try:
        yield
    finally:
        trainer.accumulate_grad_batches = before
