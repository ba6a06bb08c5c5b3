"""FMLoRAModule: FMLoRA's loop written out in manual optimization."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.memory import recursive_detach
from torch import Tensor
from typing_extensions import override

from lightning_flatlora.callbacks.fmlora_module import FMLoRAModuleCallback
from lightning_flatlora.callbacks.silenced import silenced
from lightning_flatlora.callbacks.strategies import averages_window_itself, backward_without_sync
from lightning_flatlora.callbacks.training_step import ends_window, leave_batch_out, loss_of, takes_no_step
from lightning_flatlora.compat import is_lightning
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.methods.checks import integer_problems, is_number
from lightning_flatlora.methods.fmlora import FMLoRAStep
from lightning_flatlora.methods.gradients import has_gradient, set_aside
from lightning_flatlora.pairs.lora_pair import Finder
from lightning_flatlora.schedules import RhoSchedule
from lightning_flatlora.sharding import average_gradients

if TYPE_CHECKING:
    _Base = LightningModule
else:
    # The LightningModule comes with the classes that users subclass.
    _Base = object


_NOT_CALLED = {
    "optimizer_step": "warm up by an LR scheduler",
    "optimizer_zero_grad": "leave it out, as gradients are cleared at the start of each window",
    "on_before_zero_grad": "use on_train_batch_start, before which nothing clears the gradients",
}
"""Hooks that a subclass would override in vain, and what to do in their place."""


class FMLoRASteps(_Base):
    """What an FMLoRAModule does, over the LightningModule of either name of Lightning; see :class:`FMLoRAModule`."""

    def __init__(
        self,
        rho: float | RhoSchedule,
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
        method = _ModuleStep(
            rho,
            estimator=estimator,
            norm_scope=norm_scope,
            start_step=start_step,
            every_n_steps=every_n_steps,
            adapter_name=adapter_name,
            finder=finder,
            sync_ascent=sync_ascent,
            step_problems=_step_problems(accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm),
        )
        self._callback = FMLoRAModuleCallback(method, accumulate_grad_batches)
        self._in_window = False
        self.sync_ascent = sync_ascent
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm

    def compute_loss(self, batch: Any, batch_idx: int) -> Tensor | Mapping[str, Any] | None:
        """Compute the loss of one batch: this method is yours to write, and may log as training_step does.

        A step with an ascent calls it twice. Logging, buffers, torchmetrics and the module's own numbers, lists, dicts
        and sets count the first call only. What lies deeper sees both: move it to on_train_batch_end.

        Args:
            batch: from the training dataloader.
            batch_idx: its index in the epoch.

        Returns:
            A scalar loss, a mapping with the key "loss", or None to skip the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute_loss(batch, batch_idx)")

    @property
    def _overrides_step(self) -> bool:
        return _defines(self, "training_step")

    def _subclass_problems(self) -> list[str]:
        """What can't work about a subclass, one line for each problem."""
        name = type(self).__name__
        problems = []
        if self.automatic_optimization:
            problems.append(
                "automatic_optimization must be False, as FMLoRAModule sets it, got True: it takes its optimizer steps "
                "itself. Leave it alone, or subclass LightningModule and use the FMLoRA callback"
            )
        if self._overrides_step and not _defines(self, "compute_loss"):
            problems.append(
                f"{name} defines training_step, in place of FMLoRAModule's, which takes the two passes and the "
                "optimizer step, so nothing would be trained: rename it to compute_loss, and let it return the loss"
            )
        for hook, instead in _NOT_CALLED.items():
            if not _is_lightnings(type(self), hook):
                problems.append(
                    f"{name} overrides {hook}, which Lightning does not call in manual optimization: {instead}, or "
                    "subclass LightningModule and use the FMLoRA callback"
                )
        return problems

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Give the callback of the perturbation; when you override this, keep ``super().configure_callbacks()``."""
        return [self._callback]

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One or two passes and, at the end of an accumulation window, the optimizer step (Algorithm 1)."""
        callback = self._callback
        callback.has_reached_step = callback.has_reached_batch = True
        # Weight averaging runs such batches through the module only to update BatchNorm's statistics.
        if takes_no_step(self.trainer):
            return recursive_detach(self.compute_loss(batch, batch_idx))
        optimizer = self.optimizers()
        assert is_lightning(optimizer, LightningOptimizer)  # checked in on_fit_start
        ascends = callback.ascends(self.trainer)
        if batch_idx % self.accumulate_grad_batches == 0:
            # At the start of a window and not after the step, as Lightning does: hooks may read the last gradients.
            optimizer.zero_grad()
            callback.source.forget_ascents()
        last = ends_window(self.trainer, batch_idx, self.accumulate_grad_batches)
        self._in_window = not last
        if ascends:
            output = self._two_passes(batch, batch_idx, last)
        else:
            with callback.source.between_ascents():
                output = self._one_pass(batch, batch_idx, sync=last)
        if last:
            if has_gradient(optimizer.optimizer):
                optimizer.step()
            else:
                # Every batch of the window was skipped, and a loss scaler refuses a step without gradients.
                callback.source.before_step()
            callback.step_schedulers(self.trainer, "step", batch_idx)
        if self.trainer.is_last_batch:
            callback.step_schedulers(self.trainer, "epoch", self.current_epoch)
        return recursive_detach(output)

    @override
    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients of an open accumulation window, which Lightning does not know of."""
        if not self._in_window:
            super().on_validation_model_zero_grad()

    def _two_passes(self, batch: Any, batch_idx: int, last: bool) -> Any:
        """The ascent at the clean B, then the descent's gradient at B + E; returns the clean pass's output."""
        method, replay = self._callback.source, self._callback.replay
        kept_batch = replay.kept_batch(batch)
        replay.first_pass_starts(self.device)
        # E is of this micro-batch alone, so what the window has accumulated is set aside.
        with set_aside(replay.parameters, self.trainer.optimizers):
            averages = averages_window_itself(self.trainer.strategy, self.accumulate_grad_batches)
            output = self._one_pass(batch, batch_idx, sync=last and self.sync_ascent and not averages)
            if loss_of(output, "compute_loss") is None:
                # The batch is skipped, and the window continues with what it had.
                return output
            if averages and self.sync_ascent:
                average_gradients(method.ascending)
            at_perturbed_weights = method.ascend()
        with replay.running(), at_perturbed_weights, silenced(self):
            if loss_of(self._one_pass(kept_batch, batch_idx, sync=last), "compute_loss") is None:
                leave_batch_out(self.trainer, "compute_loss")
        return output

    def _one_pass(self, batch: Any, batch_idx: int, sync: bool) -> Any:
        output = self.compute_loss(batch, batch_idx)
        loss = loss_of(output, "compute_loss")
        if loss is None and self.trainer.world_size > 1:
            raise RuntimeError(
                "compute_loss returned None on one of several ranks, and the others would wait for its gradient "
                "forever: return a loss of zero that depends on the parameters, as 0 * output.sum()"
            )
        if loss is not None:
            with nullcontext() if sync else backward_without_sync(self.trainer.strategy):
                self.manual_backward(loss / self.accumulate_grad_batches)
        return output


class FMLoRAModule(FMLoRASteps, LightningModule):
    """A LightningModule that takes FMLoRA's two passes itself: perturb, project into B, step (Algorithm 1).

    Subclass it, call ``super().__init__(rho=...)``, and write ``compute_loss`` and ``configure_optimizers`` (one
    optimizer). ``training_step`` is defined already: one of your own must call
    ``super().training_step(batch, batch_idx)``. The module itself does what the Trainer refuses under manual
    optimization: gradient accumulation, clipping, and stepping of LR schedulers (their interval and frequency are
    honoured; step a ReduceLROnPlateau yourself). An :class:`~lightning_flatlora.EFMLoRA` callback next to it schedules
    the two passes (cost 1 + 1/every_n_steps) and perturbs by Ê in between.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient alone.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain LoRA steps.
        adapter_name: the peft adapter to perturb; None takes the active ones.
        finder: says what the pairs are if the layers are not peft's, see :mod:`lightning_flatlora.pairs.finders`.
        sync_ascent: average the ascent's gradient over the ranks; False leaves each rank its own E and sends nothing.
        accumulate_grad_batches: batches of one optimizer step.
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
        ...         super().__init__(rho=0.1)
        ...         net = torch.nn.Sequential(torch.nn.Linear(4, 3))
        ...         self.net = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
        ...     def compute_loss(self, batch, batch_idx):
        ...         return self.net(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters(), lr=1e-3)
        >>> Regression().automatic_optimization
        False
    """


class _ModuleStep(FMLoRAStep):
    """FMLoRA's step under the module's name, which reports what is wrong with the module's arguments too."""

    title = "FMLoRAModule"

    def __init__(self, *args: Any, step_problems: list[str], **kwargs: Any) -> None:
        self._step_problems = step_problems
        super().__init__(*args, **kwargs)

    @override
    def argument_problems(self) -> list[str]:
        return [*super().argument_problems(), *self._step_problems]


def _defines(module: FMLoRASteps, name: str) -> bool:
    """Whether a subclass, or the instance, replaces a method of FMLoRAModule."""
    return name in vars(module) or getattr(type(module), name) is not getattr(FMLoRASteps, name)


def _is_lightnings(kind: type, name: str) -> bool:
    """Whether a class has a method as Lightning wrote it."""
    owner = next(each for each in kind.__mro__ if name in vars(each))
    return owner.__module__.split(".")[0] in ("lightning", "pytorch_lightning")


def _step_problems(accumulate: object, clip_val: object, clip_algorithm: object) -> list[str]:
    problems = integer_problems("accumulate_grad_batches", accumulate, least=1)
    if clip_val is not None and not (is_number(clip_val) and clip_val >= 0):  # type: ignore[operator]
        problems.append(f"gradient_clip_val must be None or a number >= 0, got {clip_val!r}")
    if clip_algorithm not in ("norm", "value"):
        problems.append(f"gradient_clip_algorithm must be 'norm' or 'value', got {clip_algorithm!r}")
    return problems
