"""One pass a step at perturbed weights, which only training_step and its backward see."""

from abc import abstractmethod
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.methods.method_callback import MethodCallback
from lightning_flatlora.callbacks.methods.module_passes import module_passes_of, window_of
from lightning_flatlora.callbacks.methods.pair_groups import PairGroup
from lightning_flatlora.callbacks.methods.training_step import takes_no_step
from lightning_flatlora.callbacks.patches import at_training_step


class OnePassCallback(MethodCallback):
    """Base of the callbacks that perturb inside a step: from the start of training_step to the end of its backward.

    In manual optimization the perturbation lasts until the end of training_step, and after each optimizer step
    :meth:`on` renews it. Subclasses say what is switched on and off.
    """

    @override
    def begin(self) -> None:
        super().begin()
        self._waiting = ExitStack()

    @abstractmethod
    def perturbs(self, trainer: Trainer) -> bool:
        """Whether the coming optimizer step takes its gradient at perturbed weights."""

    @abstractmethod
    def on(self, trainer: Trainer) -> None:
        """Let the forward pass see perturbed weights."""

    @abstractmethod
    def off(self) -> None:
        """Let the forward pass see the clean weights."""

    def before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, pair_group: PairGroup) -> None:
        """Use the gradients of a pair group's coming step, before the step is counted."""

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if takes_no_step(trainer):
            return
        begins_window = batch_idx % window_of(trainer) == 0
        if begins_window and self._is_sharded:
            # Here and not in begin_pass: inside its forward a sharded model shows other parameters.
            self.follow(trainer, pl_module)

        def begin_pass() -> None:
            if begins_window and not self._is_sharded:
                self.follow(trainer, pl_module)
            else:
                self.follow_scaling()
            if self.perturbs(trainer):
                self.on(trainer)

        # This hook is too early: the hooks of later callbacks and of the module may still change the model, and all of
        # them must see clean weights. No hook lies between them and training_step.
        self._waiting.callback(at_training_step(pl_module, begin_pass))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization:
            self.end_batch()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.check_gradient_is_first(pl_module, optimizer)
        if module_passes_of(trainer) is None:  # an FMLoRAModule uses the pairs' state until its own hook
            self.follow_step(trainer, pl_module)
        pair_group = self.pair_group_of(trainer, optimizer)
        if pair_group is None:
            return
        self.look_for_gradients(pair_group)
        if pair_group.pairs:
            self.before_optimizer_step(trainer, pl_module, pair_group)
        # Counted here, since no later hook says that the step was taken: steps that a scaler skips count, too.
        pair_group.step += 1
        if pl_module.automatic_optimization:
            self.end_batch()
        elif self.perturbs(trainer):
            # A manual training_step may continue with another pass.
            self.on(trainer)

    # -- wherever a step can end early, the layers return to the clean weights

    @override
    def end_batch(self) -> None:
        self._waiting.close()
        self.off()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        steps = [pair_group.step for pair_group in self.pair_groups if pair_group.pairs]
        if steps and not any(steps) and not pl_module.automatic_optimization:
            rank_zero_warn(
                f"{type(self).__name__} has seen no optimizer step so far, so nothing was perturbed: step the "
                "optimizer that self.optimizers() gives, not the one inside it"
            )

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end_batch()
