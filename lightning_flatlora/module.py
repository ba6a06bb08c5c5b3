"""FMLoRAModule: FMLoRA's loop written out in manual optimization."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import Tensor
from typing_extensions import override

from lightning_flatlora.callbacks.horizon import takes_no_step
from lightning_flatlora.callbacks.module_driver import FMLoRAModuleDriver
from lightning_flatlora.callbacks.two_passes import (
    ends_window,
    loss_of,
    own_containers,
    put_back_gradients,
    random_state,
    silenced_log,
    take_gradients,
)
from lightning_flatlora.distributed import average_gradients
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.lightning_names import is_lightning
from lightning_flatlora.schedules import RhoSchedule

if TYPE_CHECKING:
    _Base = LightningModule
else:
    _Base = object  # the LightningModule comes with the classes that users subclass


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
        sync_ascent: bool = True,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._driver = FMLoRAModuleDriver(
            rho,
            estimator=estimator,
            norm_scope=norm_scope,
            start_step=start_step,
            every_n_steps=every_n_steps,
            adapter_name=adapter_name,
            window=accumulate_grad_batches,
            sync_ascent=sync_ascent,
            more_problems=_step_problems(accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm),
        )
        self._in_window = False
        self.sync_ascent = sync_ascent
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm

    def compute_loss(self, batch: Any, batch_idx: int) -> Tensor | Mapping[str, Any] | None:
        """The loss of one batch: yours to write. It is called twice in a step with an ascent; log as in training_step.

        Logging, buffers and torchmetrics count the first call alone. Other attributes see both: count in
        on_train_batch_end.

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
        """What about a subclass can't work, one line each; the driver asks as fit starts."""
        name, problems = type(self).__name__, []
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
        return problems

    @override
    def configure_callbacks(self) -> list[Callback]:
        """The driver of the perturbation; when you override this, keep ``super().configure_callbacks()``."""
        return [self._driver]

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One or two passes and, at the end of an accumulation window, the optimizer step (Algorithm 1)."""
        self._driver.reached = True
        if takes_no_step(self.trainer):
            return _detached(self.compute_loss(batch, batch_idx))
        optimizer = self._optimizer()
        if batch_idx % self.accumulate_grad_batches == 0:
            optimizer.zero_grad()
            self._driver.begin_window(self.trainer, self)
        last = ends_window(self.trainer, batch_idx, self.accumulate_grad_batches)
        self._in_window = not last
        if self._driver.ascends(self.trainer):
            output = self._two_passes(batch, batch_idx, last)
        else:
            with self._driver.between_ascents():
                output = self._one_pass(batch, batch_idx, sync=last)
        if last:
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                optimizer.step()
            else:  # every batch was skipped, and a loss scaler would not know what to do
                self._driver.count_step()
            self._driver.schedulers.step(self.trainer, "step", batch_idx)
        if self.trainer.is_last_batch:
            self._driver.schedulers.step(self.trainer, "epoch", self.current_epoch)
        return _detached(output)

    @override
    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients of an open accumulation window, which Lightning does not know of."""
        if not self._in_window:
            super().on_validation_model_zero_grad()

    def _two_passes(self, batch: Any, batch_idx: int, last: bool) -> Any:
        """The ascent at the clean B, then the descent's gradient at B + E; returns the clean pass's output."""
        driver = self._driver
        perturbation, counted = driver.perturbation, driver.counted
        assert perturbation is not None
        assert counted is not None
        put_back_random_state, kept = random_state(self.device), own_containers(batch)
        counted.first_pass_starts()
        taken = take_gradients(driver.gradient_holders(self.trainer))
        # A backward that synchronises would make DDP forget which parameters the window has used so far.
        averages = self.accumulate_grad_batches > 1 and is_lightning(self.trainer.strategy, DDPStrategy)
        output = self._one_pass(batch, batch_idx, sync=last and self.sync_ascent and not averages)
        if loss_of(output, "compute_loss") is None:
            put_back_gradients(driver.gradient_holders(self.trainer), taken)
            return output
        if averages and self.sync_ascent:
            average_gradients(p for pair in perturbation.pairs for p in (pair.A, pair.B) if p.requires_grad)
        driver.take_ascent(self.trainer)
        put_back_gradients(driver.gradient_holders(self.trainer), taken)
        put_back_random_state()
        with driver.descending(), silenced_log(self), counted.second_pass():
            if loss_of(self._one_pass(kept, batch_idx, sync=last), "compute_loss") is None:
                raise RuntimeError("compute_loss returned None in the second pass, but a loss in the first")
        return output

    def _one_pass(self, batch: Any, batch_idx: int, sync: bool) -> Any:
        output = self.compute_loss(batch, batch_idx)
        loss = loss_of(output, "compute_loss")
        if loss is None and self.trainer.world_size > 1:
            raise RuntimeError(
                "compute_loss returned None on one of several ranks, and the others would wait for its gradient for "
                "ever: return a loss of zero that depends on the parameters, as 0 * output.sum()"
            )
        if loss is not None:
            parallel = is_lightning(self.trainer.strategy, ParallelStrategy)  # type: ignore[type-abstract]
            with nullcontext() if sync or not parallel else self.trainer.strategy.block_backward_sync():  # type: ignore[attr-defined]
                self.manual_backward(loss / self.accumulate_grad_batches)
        return output

    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert is_lightning(optimizer, LightningOptimizer)  # checked in on_fit_start
        return optimizer


class FMLoRAModule(FMLoRASteps, LightningModule):
    """A LightningModule that takes FMLoRA's two passes itself: perturb, project into B, step (Algorithm 1).

    Subclass it, call ``super().__init__(rho=...)``, and write ``compute_loss`` and ``configure_optimizers`` (one
    optimizer); ``training_step`` is taken: one of your own must call ``super().training_step(batch, batch_idx)``. What
    the Trainer refuses under manual optimization is here: gradient accumulation, clipping, and stepping of LR
    schedulers (their interval, frequency and monitor are honoured). An :class:`~lightning_flatlora.EFMLoRA` callback
    beside it schedules the two passes (cost 1 + 1/every_n_steps), with Ê in between.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient alone.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain LoRA steps.
        adapter_name: the peft adapter to perturb; None takes the active ones.
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


def _defines(module: FMLoRASteps, name: str) -> bool:
    """Whether a subclass, or the instance, has a method of its own in place of FMLoRAModule's."""
    return name in vars(module) or getattr(type(module), name) is not getattr(FMLoRASteps, name)


def _step_problems(accumulate: object, clip_val: object, clip_algorithm: object) -> list[str]:
    problems = []
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        problems.append(f"accumulate_grad_batches must be an integer >= 1, got {accumulate!r}")
    number = isinstance(clip_val, (int, float)) and not isinstance(clip_val, bool)
    if clip_val is not None and not (number and clip_val >= 0):  # type: ignore[operator]
        problems.append(f"gradient_clip_val must be None or a number >= 0, got {clip_val!r}")
    if clip_algorithm not in ("norm", "value"):
        problems.append(f"gradient_clip_algorithm must be 'norm' or 'value', got {clip_algorithm!r}")
    return problems


def _detached(output: Any) -> Any:
    """A step's output without its graph, for the hooks that see it."""
    if isinstance(output, Mapping):
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in output.items()}
    return output.detach() if isinstance(output, Tensor) else output
