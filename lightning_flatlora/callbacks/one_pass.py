"""One pass a step at perturbed weights, which nobody but training_step and its backward sees."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.base import FlatLoRACallback, window_of
from lightning_flatlora.callbacks.courses import Course
from lightning_flatlora.callbacks.horizon import takes_no_step
from lightning_flatlora.callbacks.two_passes import at_training_step, nothing


class OnePass(FlatLoRACallback):
    """Base of the callbacks that perturb inside a step: from training_step's start to the end of its backward.

    In manual optimization, until the end of the training_step, with what :meth:`on` gives anew after each optimizer
    step. Subclasses say what is switched on and off.
    """

    @override
    def begin(self) -> None:
        super().begin()
        self._cancel: Callable[[], None] = nothing

    @abstractmethod
    def perturbs(self, trainer: Trainer) -> bool:
        """Whether the coming optimizer step takes its gradient at perturbed weights."""

    @abstractmethod
    def on(self, trainer: Trainer) -> None:
        """Let the forward pass see perturbed weights."""

    @abstractmethod
    def off(self) -> None:
        """Let it see the clean ones."""

    def before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, course: Course) -> None:
        """What the gradients of a course's coming step are needed for, before it is counted."""

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if takes_no_step(trainer):
            return
        begins_window = batch_idx % window_of(trainer) == 0
        if begins_window and self._is_sharded:  # inside its forward a sharded model shows other parameters
            self.follow(trainer, pl_module)

        def begin_pass() -> None:
            if begins_window and not self._is_sharded:
                self.follow(trainer, pl_module)
            else:
                self.follow_scaling()
            if self.perturbs(trainer):
                self.on(trainer)

        self._cancel = at_training_step(pl_module, begin_pass)  # after every hook that may change the model

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization:
            self._end_pass()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        course = self.course_of(trainer, optimizer)
        if course is None:
            return
        if course.pairs:
            self.before_optimizer_step(trainer, pl_module, course)
        course.step += 1
        if pl_module.automatic_optimization:
            self._end_pass()
        elif self.perturbs(trainer):
            self.on(trainer)  # a manual training_step may go on with another pass

    # Wherever a step can end early, the layers go back to the clean weights.

    def _end_pass(self) -> None:
        self._cancel()
        self._cancel = nothing
        self.off()

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._end_pass()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_pass()
        super().on_train_epoch_end(trainer, pl_module)
        if self.step == 0 and self.main.pairs and not pl_module.automatic_optimization:
            rank_zero_warn(
                f"{type(self).__name__} saw no optimizer step in this epoch, so nothing was perturbed: step the "
                "optimizer that self.optimizers() gives, not the one inside it"
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_pass()
        super().on_exception(trainer, pl_module, exception)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_pass()
