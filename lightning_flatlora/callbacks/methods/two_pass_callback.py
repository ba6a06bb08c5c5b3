"""Two passes a step in automatic optimization, for any LightningModule."""

import functools
from abc import abstractmethod
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.methods.gradients import set_aside
from lightning_flatlora.callbacks.methods.method_callback import MethodCallback
from lightning_flatlora.callbacks.methods.module_passes import module_passes_of
from lightning_flatlora.callbacks.methods.training_step import ends_window, leave_batch_out, loss_of, takes_no_step
from lightning_flatlora.callbacks.patches import at_training_step, put_on_instance
from lightning_flatlora.callbacks.silenced import silenced
from lightning_flatlora.callbacks.strategies import ascent_stays_local, backward_without_sync, has_synchronized
from lightning_flatlora.distributed import average_gradients
from lightning_flatlora.methods.replay import Replay


class TwoPassCallback(MethodCallback):
    """Base of the callbacks that take a step's gradient a second time, at perturbed weights.

    The gradient of the first pass gives the perturbation, and the optimizer sees that of the second. Both passes draw
    the same dropout masks and see the same batch. The loss is logged and returned from the first pass, at clean
    weights. Buffers (BatchNorm's statistics) and torchmetrics are afterwards as the first pass left them. Hooks around
    backward fire in each pass, with its gradient, and other attributes that a training_step changes see both passes.
    Under gradient accumulation each micro-batch has its own ascent. Subclasses say what is perturbed, and how.
    """

    @override
    def begin(self) -> None:
        super().begin()
        self._second_pass = Replay(nn.Module())
        # Two, since they end at different moments: the methods return before the first backward, which is the real one,
        # and gradients are averaged over the ranks again from the second pass on.
        self._replaced = ExitStack()
        self._local_ascent = ExitStack()

    @property
    @abstractmethod
    def ascending(self) -> list[nn.Parameter]:
        """The trained parameters whose gradients give the perturbation, in the same order on every rank."""

    @abstractmethod
    def ascend(self, rho: float) -> AbstractContextManager[None]:
        """Take the perturbation of size rho from the current gradients; it is zero if one of them is not finite.

        Returns:
            A context in which the forward pass sees perturbed weights. After it, whatever happens, it sees exactly the
            clean ones.
        """

    @override
    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        problems = super().configuration_problems(trainer, pl_module)
        if not pl_module.automatic_optimization and module_passes_of(trainer) is None:
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
        self._second_pass = Replay(pl_module, trainer.optimizers, self._is_sharded)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._second_pass.look_again(trainer.optimizers)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        # The module's own on_train_batch_start may have skipped the last batch.
        self.end_batch()
        if takes_no_step(trainer):
            return
        if self._is_sharded:
            # Here and not in _begin_passes: inside its forward a sharded model shows other parameters.
            self.follow(trainer, pl_module)
        if not self.is_refresh_step or self.current_size(trainer) == 0:
            return
        # Lightning has no hook between the last on_train_batch_start and training_step, where the first pass begins.
        begin = functools.partial(self._begin_passes, trainer, pl_module, batch, batch_idx)
        self._replaced.callback(at_training_step(pl_module, begin))
        ends = ends_window(trainer, batch_idx, trainer.accumulate_grad_batches)
        if ends and ascent_stays_local(trainer, self.sync_ascent):
            # Here, before the forward: DDP decides in it whether the backward is going to average.
            self._local_ascent.enter_context(backward_without_sync(trainer.strategy))

    def _begin_passes(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note what the second pass needs of the moment before the first, and let backward take both."""
        if not self._is_sharded:
            self.follow(trainer, pl_module)
        self.follow_scaling()
        takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
        arguments = self._second_pass.kept_batch((batch, batch_idx) if takes_index else (batch,))
        self._second_pass.first_pass_starts(pl_module.device)
        # on_after_backward would be too late for the ascent: it comes inside the closure, but before the hooks of the
        # module and of later callbacks have seen the first gradient. So backward itself is replaced.
        two_passes = functools.partial(self._two_passes, trainer, arguments)
        self._replaced.callback(put_on_instance(trainer.strategy, "backward", two_passes))

    def _two_passes(
        self, trainer: Trainer, arguments: tuple[Any, ...], loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Replaces the strategy's backward: runs the ascent's and, after all of its hooks, the descent's."""
        self._replaced.close()
        # Nothing that is perturbed is trained yet.
        if not self.ascending:
            self._local_ascent.close()
            return trainer.strategy.backward(loss, *args, **kwargs)
        # Not earlier: Lightning clears the gradients of the last step after the forward pass.
        with set_aside(self._second_pass.parameters, trainer.optimizers):
            loss = trainer.strategy.backward(loss, *args, **kwargs)
            if self.sync_ascent and not has_synchronized(trainer.strategy):
                average_gradients(self.ascending)
            at_perturbed_weights = self.ascend(self.current_size(trainer))
        self._local_ascent.close()
        # What the first pass has written is asked before the perturbation may move weights in place.
        with self._second_pass.running(), at_perturbed_weights, silenced(trainer.lightning_module):
            self._descend(trainer, arguments)
        return loss

    def _descend(self, trainer: Trainer, arguments: tuple[Any, ...]) -> None:
        """The second pass: the gradient at the perturbed weights, added to what was accumulated."""
        # Through the strategy, as Lightning calls it: DDP and FSDP prepare their backward in the forward of a wrapper.
        loss = loss_of(trainer.strategy.training_step(*arguments), "training_step")
        if loss is None:
            leave_batch_out(trainer, "training_step")
            return
        # Lightning has divided the first pass's loss itself, but it does not see this one.
        trainer.strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.check_gradient_is_first(pl_module, optimizer)
        self.follow_step(trainer, pl_module)
        # Counted here, since no later hook says that the step was taken: steps that a scaler skips count, too.
        if self.holds_pairs(trainer, optimizer):
            self.look_for_gradients(self.main_group)
            self.step += 1

    @override
    def end_batch(self) -> None:
        self._replaced.close()
        self._local_ascent.close()

    @override
    def uninstall(self) -> None:
        super().uninstall()
        self._second_pass = Replay(nn.Module())
