"""Two passes a step in automatic optimization, for any LightningModule."""

import functools
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.base import FlatLoRACallback, module_drivers
from lightning_flatlora.callbacks.counted_once import CountedOnce
from lightning_flatlora.callbacks.horizon import takes_no_step
from lightning_flatlora.callbacks.two_passes import (
    at_training_step,
    ends_window,
    gradient_holders,
    loss_of,
    nothing,
    own_containers,
    put_back_gradients,
    put_on_instance,
    random_state,
    silenced_log,
    take_gradients,
)
from lightning_flatlora.distributed import average_gradients
from lightning_flatlora.lightning_names import is_lightning
from lightning_flatlora.schedules import RhoSchedule


class TwoPasses(FlatLoRACallback):
    """Base of the callbacks that take a step's gradient a second time, at perturbed weights.

    The first pass's gradient gives the perturbation, the second's is the one that the optimizer sees. Both passes draw
    the same dropout masks and see the same batch, but for what the first writes into its tensors; the loss is logged
    and returned from the first, the clean one, and buffers (BatchNorm's statistics) and torchmetrics are as the first
    has left them. Hooks around backward fire in each pass, with its gradient, and other attributes that a training_step
    changes see both passes. Under gradient accumulation each micro-batch has its own ascent. Subclasses say what is
    perturbed, and how.
    """

    def __init__(self, rho: float | RhoSchedule, *, sync_ascent: bool = True, **settings: Any) -> None:
        super().__init__(rho, **settings)
        self.sync_ascent = sync_ascent

    @override
    def begin(self) -> None:
        super().begin()
        self._parameters: list[nn.Parameter] = []
        self._counted: CountedOnce | None = None
        self._kept_local = ExitStack()
        self._waiting = ExitStack()
        self._step_arguments: tuple[Any, ...] = ()
        self._put_back_random_state: Callable[[], None] = nothing

    @property
    @abstractmethod
    def ascending(self) -> list[nn.Parameter]:
        """The trained parameters whose gradients give the perturbation, in the same order on every rank."""

    @abstractmethod
    def ascend(self, rho: float) -> None:
        """Take the perturbation of size rho from the gradients that the parameters hold now; 0 if one is not finite."""

    @abstractmethod
    def perturbed(self) -> AbstractContextManager[None]:
        """Inside, the forward pass sees perturbed weights; after it, whatever happens, the clean ones to the bit."""

    @override
    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        problems = super().configuration_problems(trainer, pl_module)
        if not pl_module.automatic_optimization and not module_drivers(trainer):
            problems.append(
                "a second pass can't be put into a training_step with manual optimization: "
                "use automatic optimization, or subclass FMLoRAModule, or use EFMLoRA"
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            problems.append(
                "training_step(dataloader_iter) takes batches itself, so a batch can't be passed twice: "
                "write training_step(batch, batch_idx), or use EFMLoRA"
            )
        return problems

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._parameters = list(pl_module.parameters())
        self._counted = CountedOnce(pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self._counted is not None:
            self._counted.look_again()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._forget_batch()  # of a batch that the module's on_train_batch_start has called off
        if takes_no_step(trainer):
            return
        if self._is_sharded:  # inside its forward a sharded model shows other parameters
            self.follow(trainer, pl_module)
        if self.is_refresh_step and self.current_rho(trainer) > 0:
            takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
            self._step_arguments = (batch, batch_idx) if takes_index else (batch,)
            self._waiting.callback(at_training_step(pl_module, lambda: self._begin_passes(trainer, pl_module)))
            two_passes = functools.partial(self._two_passes, trainer, pl_module)
            self._waiting.callback(put_on_instance(trainer.strategy, "backward", two_passes))
            if self._stays_local(trainer) and ends_window(trainer, batch_idx, trainer.accumulate_grad_batches):
                self._kept_local.enter_context(trainer.strategy.block_backward_sync())  # type: ignore[attr-defined]

    def _two_passes(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """In place of the strategy's backward: the ascent's, and when all its hooks are through, the descent."""
        self._waiting.close()
        if not self.ascending:  # nothing that it perturbs is trained yet
            self._kept_local.close()
            return trainer.strategy.backward(loss, *args, **kwargs)
        # Here and no earlier: Lightning clears the gradients of the last step after the forward pass.
        taken = take_gradients(gradient_holders(self._parameters, trainer.optimizers))
        loss = trainer.strategy.backward(loss, *args, **kwargs)
        if self.sync_ascent and not _synchronises(trainer):
            average_gradients(self.ascending)
        self.ascend(self.current_rho(trainer))
        put_back_gradients(gradient_holders(self._parameters, trainer.optimizers), taken)
        self._kept_local.close()
        self._put_back_random_state()
        assert self._counted is not None
        with self.perturbed(), silenced_log(pl_module), self._counted.second_pass():
            self._descend(trainer)
        self._forget_batch()
        return loss

    def _descend(self, trainer: Trainer) -> None:
        """The second pass: the gradient at the perturbed weights, added to what was accumulated."""
        loss = loss_of(trainer.strategy.training_step(*self._step_arguments), "training_step")
        if loss is None:
            name = type(self).__name__
            raise RuntimeError(f"training_step returned None in {name}'s second pass, but a loss in the first")
        trainer.strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.holds_pairs(trainer, optimizer):
            self.step += 1

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._forget_batch()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_batch()
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._forget_batch()

    @override
    def uninstall(self) -> None:
        super().uninstall()
        self._parameters, self._counted = [], None

    def _begin_passes(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_sharded:
            self.follow(trainer, pl_module)
        self.follow_scaling()
        self._step_arguments = own_containers(self._step_arguments)
        self._put_back_random_state = random_state(pl_module.device)
        assert self._counted is not None
        self._counted.first_pass_starts()

    def _forget_batch(self) -> None:
        self._waiting.close()
        self._kept_local.close()
        self._step_arguments, self._put_back_random_state = (), nothing

    def _stays_local(self, trainer: Trainer) -> bool:
        """Whether the ascent's backward must not average gradients even in the batch that ends an accumulation window.

        One that synchronises would make FSDP1 turn the window's gradients, not reduced so far, into shards, and DDP
        forget which parameters the window has used: with find_unused_parameters it would not reduce them all.
        """
        if not is_lightning(trainer.strategy, DDPStrategy, FSDPStrategy):
            return False
        return trainer.accumulate_grad_batches > 1 or not self.sync_ascent


def _synchronises(trainer: Trainer) -> bool:
    """Whether the backward that just ended averaged the gradients over the ranks."""
    return not is_lightning(trainer.strategy, DDPStrategy) or bool(
        getattr(trainer.strategy.model, "require_backward_grad_sync", True)
    )
