"""The passes of a step inside Lightning's strategy, whose methods are wrapped once for a fit.

``Strategy.training_step`` runs after all hooks that begin a batch and before the wrapper's forward. Lightning looks it
up on the instance, like ``backward`` and ``optimizer_step``. So the user's module is not touched, and in automatic
optimization no other callback's hook runs while the layers read perturbed weights.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from lightning_flatlora.callbacks.logging import silenced
from lightning_flatlora.callbacks.strategies import ascent_stays_local, backward_without_sync, synchronizes
from lightning_flatlora.callbacks.training_step import ends_window, leave_batch_out, loss_of, window_of
from lightning_flatlora.methods.checks import SEVERAL_GRADIENTS, refuse
from lightning_flatlora.methods.put_back import copied_batch
from lightning_flatlora.methods.replay import Replay
from lightning_flatlora.methods.step_method import OnePassStep, StepMethod
from lightning_flatlora.patching import put_on_instance
from lightning_flatlora.sharding import is_sharded


def takes_no_step(trainer: Trainer) -> bool:
    """Say whether batches now only update BatchNorm's statistics, as in the epoch that weight averaging (SWA) adds."""
    # Private, but the only sign: StochasticWeightAveraging sets it for the epoch that it adds.
    return bool(trainer.fit_loop._skip_backward)


class Passes:
    """Wrap a strategy's methods for one fit; subclasses say how the passes of a step differ from plain ones.

    Attributes:
        is_stale: whether the model will be searched in the coming batch.

    Args:
        owner: the callback, whose ``patches`` undo the wrapping. While a tuner has removed it from the trainer, the
            passes are plain.
        trainer: the trainer, when the fit starts.
    """

    def __init__(self, owner: Any, trainer: Trainer) -> None:
        self.owner, self.trainer = owner, trainer
        self.methods: Sequence[StepMethod] = owner.methods
        # The number of gradients so far in Lightning's current step; None outside of a step.
        self._gradients: int | None = None
        # True from the start, since a run that is resumed within an epoch calls no epoch-start hook.
        self.is_stale = True
        self._original_training_step = self._wrap(trainer.strategy, "training_step", self._training_step)
        self._original_optimizer_step = self._wrap(trainer.strategy, "optimizer_step", self.optimizer_step)

    def _wrap(self, thing: Any, name: str, method: Callable[..., Any]) -> Any:
        """Replace a method of one of the trainer's parts until the fit ends, and return the former one."""
        original = getattr(thing, name)
        self.owner.patches.callback(put_on_instance(thing, name, method))
        return original

    @property
    def is_active(self) -> bool:
        """Whether batches train now, with the callback in the trainer."""
        # Another patch that was put on the strategy in the meantime may still call these methods after the fit.
        if self.owner.passes is not self or takes_no_step(self.trainer):
            return False
        # A tuner, such as the batch size finder, removes callbacks for its trial steps, which must be plain.
        return self.owner in self.trainer.callbacks

    def look_again(self) -> None:
        """Take over changes of the module, in the first batch of an epoch."""

    # -- the wrapped methods

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_active:
            return self._original_training_step(*args, **kwargs)
        self.owner.look_again(self.trainer, self.trainer.lightning_module)
        return self.training_step(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass of a batch."""
        raise NotImplementedError

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run an optimizer step, which in automatic optimization contains the passes."""
        before, self._gradients = self._gradients, 0
        try:
            return self._original_optimizer_step(*args, **kwargs)
        finally:
            self._gradients = before

    # -- steps that can't be followed

    def check_gradient_is_first(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that calls its closure more than once in a step, as SAM and line searches do.

        Call it in on_before_optimizer_step. Of all classes only LBFGS can be recognized beforehand. In manual
        optimization a training_step may take any number of steps.
        """
        if self._gradients and self.trainer.lightning_module.automatic_optimization:
            refuse(self.owner.method, [f"{type(optimizer).__name__} {SEVERAL_GRADIENTS}"])
        self._gradients = 1

    def watch_steps(self) -> None:
        """Refuse steps that bypass the strategy, which calls ``on_before_optimizer_step``.

        Such a step happens if an override of ``optimizer_step``, or a training_step in manual optimization, steps the
        optimizer inside Lightning's wrapper. Optimizers that are not PyTorch's (wrappers that keep one inside) can't be
        watched.
        """
        for optimizer in self.trainer.optimizers:
            # A wrapper may inherit from Optimizer without calling its constructor, which creates this table.
            if "_optimizer_step_pre_hooks" in vars(optimizer):
                self.owner.patches.callback(optimizer.register_step_pre_hook(self._check_announced).remove)

    def _check_announced(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._gradients is not None or not self.is_active:
            return
        index = self.trainer.optimizers.index(optimizer)
        # Another optimizer may train the pairs.
        if not self.methods[index].pairs and any(method.pairs for method in self.methods):
            return
        problem = (
            f"the {type(optimizer).__name__} that trains the pairs is stepped without Lightning's knowledge, so "
            "nothing would be perturbed: in your optimizer_step step the optimizer that it receives, by "
            "optimizer.step(closure=optimizer_closure), and in manual optimization the one from self.optimizers()"
        )
        refuse(self.owner.method, [problem])


class OnePass(Passes):
    """Let the layers read perturbed weights in the forward and in the backward pass, and nowhere else.

    In manual optimization the perturbation lasts until the end of training_step, except for optimizer steps.
    """

    methods: Sequence[OnePassStep]

    def __init__(self, owner: Any, trainer: Trainer) -> None:
        super().__init__(owner, trainer)
        self._is_inside = False
        # Not the strategy's optimizer_step, inside which hooks of other callbacks run.
        self._original_backward = self._wrap(trainer.precision_plugin, "backward", self.backward)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass at perturbed weights."""
        return self._run(self._original_training_step, True, *args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass at perturbed weights, since checkpointed layers compute their forward in it again."""
        self._run(self._original_backward, True, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Run an optimizer step, whose hooks see the clean weights."""
        # Lightning's closure consists of the two methods above; a user's closure runs its forward pass itself.
        if not self.trainer.lightning_module.automatic_optimization:
            closure = functools.partial(self._run, closure, True)
        return self._run(super().optimizer_step, False, optimizer, closure, *args, **kwargs)

    def _run(self, original: Callable[..., Any], is_inside: bool, *args: Any, **kwargs: Any) -> Any:
        was_inside, self._is_inside = self._is_inside, is_inside
        self._switch()
        try:
            return original(*args, **kwargs)
        finally:
            self._is_inside = was_inside
            self._switch()

    def _switch(self) -> None:
        for method in self.methods:
            # Asked each time, since in manual optimization the first perturbation arises within a training_step.
            if self._is_inside and self.is_active and method.perturbs:
                method.on()
            else:
                method.off()


class TwoPasses(Passes):
    """Take a step's gradient a second time, at perturbed weights.

    The gradient of the first pass gives the perturbation, and the optimizer sees the gradient of the second.

    An FMLoRAModule also steps the optimizer in its training_step, so its second pass calls ``compute_loss``.
    """

    def __init__(self, owner: Any, trainer: Trainer) -> None:
        super().__init__(owner, trainer)
        module: Any = trainer.lightning_module
        self._original_backward = self._wrap(trainer.strategy, "backward", self.backward)
        # Called through the strategy, as Lightning does: DDP and FSDP prepare their backward in the wrapper's forward.
        self._step = self._original_training_step if module.automatic_optimization else module.compute_loss
        self._step_name = "training_step" if module.automatic_optimization else "compute_loss"
        # An error may end a batch between its passes.
        self._local_ascent: ExitStack = owner.patches.enter_context(ExitStack())
        self._arguments: tuple[Any, ...] | None = None

    def look_again(self) -> None:
        """Find the second pass's perturbation, and the state that a step may write, before an epoch's first pass."""
        self.method = self.owner.perturbing_method
        trainer = self.trainer
        self._stays_local = ascent_stays_local(trainer, self.method.sync_ascent)
        self._replay = Replay(trainer.lightning_module, trainer.optimizers, is_sharded(trainer.strategy.model))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the first forward pass, at the clean weights."""
        if not self.method.takes_ascent:
            return self._original_training_step(*args, **kwargs)
        self._arguments = copied_batch(args)
        self._replay.first_pass_starts(self.trainer.lightning_module.device)
        if self._stays_local and ends_window(self.trainer):
            # Set before the forward, in which DDP decides whether the backward will average.
            self._local_ascent.enter_context(backward_without_sync(self.trainer.strategy))
        output = self._original_training_step(*args, **kwargs)
        if output is None:  # Lightning skips the batch
            self._arguments = None
            self._local_ascent.close()
        return output

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the ascent's backward and, after all of its hooks, the second pass."""
        arguments, self._arguments = self._arguments, None
        original: Callable[..., Tensor] = self._original_backward
        if arguments is None:
            return original(loss, *args, **kwargs)
        # E belongs to this micro-batch only. Not earlier: Lightning clears the last gradients after the forward pass.
        with self._local_ascent, self._replay.ascent(self.method, synchronizes(self.trainer.strategy)):
            loss = original(loss, *args, **kwargs)
        with self._replay.running(), silenced(self.trainer.lightning_module):
            second = loss_of(self._step(*arguments), self._step_name)
            if second is None:
                leave_batch_out(self.trainer, self._step_name)
            else:
                # The first pass's loss has already been divided, by Lightning or the module.
                original(second / window_of(self.trainer), *args, **kwargs)
        return loss


def two_pass_problems(pl_module: LightningModule) -> list[str]:
    """List why a module's steps can't have a second pass."""
    problems = []
    if not pl_module.automatic_optimization:
        problems.append(
            "a second pass can't be added to manual optimization: use EFMLoRA, or, with one optimizer, FMLoRAModule"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        problems.append("training_step(dataloader_iter) can't get a batch twice: write training_step(batch, batch_idx)")
    return problems
