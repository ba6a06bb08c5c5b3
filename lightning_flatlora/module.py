"""FMLoRAModule: FMLoRA in manual optimization, with the windows, clipping and schedulers that the Trainer refuses."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import recursive_detach
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from lightning_flatlora.callbacks.fmlora import FMLoRAModuleCallback
from lightning_flatlora.callbacks.passes import takes_no_step
from lightning_flatlora.callbacks.strategies import backward_without_sync
from lightning_flatlora.callbacks.training_step import ZERO_LOSS, ends_window, loss_of
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.methods.b_perturbation import FMLoRAStep
from lightning_flatlora.methods.checks import choice_problems, integer_problems
from lightning_flatlora.methods.optimizers import has_gradient
from lightning_flatlora.pairs.lora_pair import Finder
from lightning_flatlora.schedules import RhoSchedule, is_size

if TYPE_CHECKING:
    _Base = LightningModule
else:
    # The classes that users subclass add the LightningModule.
    _Base = object


_NOT_CALLED = {
    "optimizer_step": "warm up with an LR scheduler",
    "optimizer_zero_grad": "leave it out, since gradients are cleared at the start of each window",
    "on_before_zero_grad": "use on_train_batch_start, which runs before gradients are cleared",
}
"""Hooks that a subclass would override in vain, and the alternatives."""


class FMLoRAModuleStep(FMLoRAStep):
    """FMLoRA's step, named after the module in messages."""


class FMLoRASteps(_Base):
    """The work of an FMLoRAModule, for the LightningModule of either name of Lightning; see :class:`FMLoRAModule`."""

    _takes_passes_itself = True

    def __init__(
        self,
        rho: float | RhoSchedule | None = None,
        *,
        estimator: Estimator = "average",
        norm_scope: NormScope = "global",
        start_step: int = 0,
        every_n_steps: int = 1,
        adapter_name: str | None = None,
        finder: Finder | None = None,
        sync_ascent: bool = True,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        problems = integer_problems("accumulate_grad_batches", accumulate_grad_batches, least=1)
        if gradient_clip_val not in (None, math.inf) and not is_size(gradient_clip_val):
            problems.append(f"gradient_clip_val must be None or a number >= 0, got {gradient_clip_val!r}")
        problems += choice_problems("gradient_clip_algorithm", gradient_clip_algorithm, Literal["norm", "value"])
        self._callback = FMLoRAModuleCallback(
            FMLoRAModuleStep(
                rho=rho,
                estimator=estimator,
                norm_scope=norm_scope,
                start_step=start_step,
                every_n_steps=every_n_steps,
                adapter_name=adapter_name,
                finder=finder,
                sync_ascent=sync_ascent,
                more_problems=problems,
            )
        )
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm

    def compute_loss(self, batch: Any, batch_idx: int) -> Tensor | Mapping[str, Any] | None:
        """Compute the loss of one batch: you write this method, which may log like training_step.

        A step with an ascent calls it twice. Logging, buffers, torchmetrics and the module's own numbers, lists, dicts
        and sets count only the first call. Deeper side effects happen twice: move them to on_train_batch_end.

        Args:
            batch: from the training dataloader.
            batch_idx: its index in the epoch.

        Returns:
            A scalar loss, a mapping with the key "loss", or None to skip the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute_loss(batch, batch_idx)")

    def _subclass_problems(self) -> list[str]:
        """List why a subclass can't work, one line for each problem."""
        name = type(self).__name__
        problems = []
        if self.automatic_optimization:
            problems.append(
                "automatic_optimization must be False, as FMLoRAModule sets it, got True: the module takes its "
                "optimizer steps itself. Don't set it, or subclass LightningModule and use the FMLoRA callback"
            )
        if is_overridden("training_step", self, FMLoRASteps):
            problems.append(
                f"{name} overrides FMLoRAModule's training_step, which runs the passes and the optimizer's step: "
                "rename it to compute_loss, and let it return the loss. Other work belongs in on_train_batch_end"
            )
        # Lightning's own hooks, under either of its names.
        lightnings = next(kind for kind in type(self).__mro__ if kind.__name__ == "LightningModule")
        for hook, instead in _NOT_CALLED.items():
            if is_overridden(hook, self, lightnings):
                problems.append(
                    f"{name} overrides {hook}, which Lightning does not call in manual optimization: {instead}, or "
                    "subclass LightningModule and use the FMLoRA callback"
                )
        return problems

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Return the callback of the perturbation; if you override this, include ``super().configure_callbacks()``."""
        return [self._callback]

    @override
    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients of an open accumulation window, which Lightning does not know about."""
        if ends_window(self.trainer):
            super().on_validation_model_zero_grad()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Run one or two passes and, at the end of an accumulation window, the optimizer step (Algorithm 1)."""
        callback, trainer = self._callback, self.trainer
        # Weight averaging runs such batches only to update BatchNorm's statistics.
        if takes_no_step(trainer):
            return recursive_detach(self.compute_loss(batch, batch_idx))
        if not callback.is_set_up:
            raise MisconfigurationException(
                "FMLoRAModule was not set up, so nothing would be perturbed: if you override configure_callbacks, "
                "return [*super().configure_callbacks(), ...]"
            )
        optimizer: Any = self.optimizers()  # one, as was checked in on_fit_start
        if batch_idx % self.accumulate_grad_batches == 0:
            # Like Lightning, at the start of a window and not after the step: hooks may read the last gradients.
            optimizer.zero_grad()
            callback.perturbing_method.forget_gradients()
        last = ends_window(trainer)
        with nullcontext() if last else backward_without_sync(trainer.strategy):
            output = self.compute_loss(batch, batch_idx)
            loss = loss_of(output, "compute_loss")
            if loss is not None:
                # This call contains the step's second pass, if any: callbacks/passes.py wraps the strategy's method.
                self.manual_backward(loss / self.accumulate_grad_batches)
            elif trainer.world_size > 1:
                raise RuntimeError(f"compute_loss returned None on one of several ranks while others wait: {ZERO_LOSS}")
        if last:
            if has_gradient(optimizer.optimizer):
                optimizer.step()
            else:
                # Every batch of the window was skipped, and a loss scaler refuses a step without gradients.
                callback.perturbing_method.before_step()
            callback.step_schedulers(trainer, "step", batch_idx)
        if trainer.is_last_batch:
            callback.step_schedulers(trainer, "epoch", self.current_epoch)
        return recursive_detach(output)


class FMLoRAModule(FMLoRASteps, LightningModule):
    """A LightningModule that takes FMLoRA's two passes itself: perturb, project into B, step (Algorithm 1).

    Subclass it, call ``super().__init__(rho=...)``, and write ``compute_loss`` and ``configure_optimizers`` (one
    optimizer). ``training_step`` is already defined; overriding it is refused. The module also handles what the Trainer
    does not under manual optimization: gradient accumulation, clipping, and LR schedulers (with their interval and
    frequency; step a ReduceLROnPlateau yourself). Next to it, an :class:`~lightning_flatlora.EFMLoRA` callback
    schedules the two passes (cost 1 + 1/every_n_steps) and perturbs by Ê in between.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
            Required: None is refused.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient only.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain LoRA steps.
        adapter_name: the peft adapter to perturb; None takes the active ones.
        finder: finds the pairs of layers that are not peft's, see :mod:`lightning_flatlora.pairs.finders`.
        sync_ascent: average the ascent's gradient over the ranks; with False each rank keeps its own E and sends
            nothing.
        accumulate_grad_batches: batches per optimizer step.
        gradient_clip_val: largest norm, or absolute value, of the gradient; None does not clip.
        gradient_clip_algorithm: "norm" or "value".

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> class Regression(FMLoRAModule):
        ...     def __init__(self):
        ...         super().__init__(rho=0.05)
        ...         net = torch.nn.Sequential(torch.nn.Linear(4, 3))
        ...         self.net = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
        ...     def compute_loss(self, batch, batch_idx):
        ...         return self.net(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters(), lr=1e-3)
        >>> Regression().automatic_optimization
        False
    """
