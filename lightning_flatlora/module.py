"""FMLoRAModule: FMLoRA's loop written out in manual optimization."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.base import FlatLoRACallback, ends_window, watched_parameters
from lightning_flatlora.callbacks.efmlora import EFMLoRA
from lightning_flatlora.callbacks.two_passes import (
    loss_of,
    put_back_gradients,
    random_state,
    silenced_log,
    take_gradients,
)
from lightning_flatlora.distributed import average_gradients
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.manual_schedulers import ManualSchedulers
from lightning_flatlora.perturbation import FreshPerturbation, all_gradients_finite
from lightning_flatlora.schedules import RhoSchedule


class FMLoRAModule(LightningModule):
    """A LightningModule that takes FMLoRA's two passes itself: perturb, project into B, step (Algorithm 1).

    Subclass it, call ``super().__init__(rho=...)``, and write ``compute_loss`` and ``configure_optimizers`` (one
    optimizer); ``training_step`` is taken. What the Trainer refuses under manual optimization is here: gradient
    accumulation, clipping, and stepping of LR schedulers (their interval, frequency and monitor are honoured). An
    :class:`~lightning_flatlora.EFMLoRA` callback beside it schedules the two passes (cost 1 + 1/every_n_steps), with
    Ê in between.

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
        self._driver = _FMLoRAModuleDriver(
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

        Args:
            batch: from the training dataloader.
            batch_idx: its index in the epoch.

        Returns:
            A scalar loss, a mapping with the key "loss", or None to skip the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute_loss(batch, batch_idx)")

    @override
    def configure_callbacks(self) -> list[Callback]:
        """The driver of the perturbation; when you override this, keep ``super().configure_callbacks()``."""
        return [self._driver]

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One or two passes and, at the end of an accumulation window, the optimizer step (Algorithm 1)."""
        optimizer = self._optimizer()
        if batch_idx % self.accumulate_grad_batches == 0:
            optimizer.zero_grad()
            self._driver.open_window()
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
        perturbation, parameters = self._driver.perturbation, self._driver.parameters
        assert perturbation is not None
        put_back_random_state = random_state(self.device)
        taken = take_gradients(parameters)
        output = self._one_pass(batch, batch_idx, sync=last and self.sync_ascent)
        if loss_of(output, "compute_loss") is None:
            put_back_gradients(parameters, taken)
            return output
        if self.sync_ascent and not last:
            average_gradients(p for pair in perturbation.pairs for p in (pair.A, pair.B) if p.requires_grad)
        self._driver.take_ascent(self.trainer)
        put_back_gradients(parameters, taken)
        put_back_random_state()
        with self._driver.descending(), silenced_log(self):
            if loss_of(self._one_pass(batch, batch_idx, sync=last), "compute_loss") is None:
                raise RuntimeError("compute_loss returned None in the second pass, but a loss in the first")
        return output

    def _one_pass(self, batch: Any, batch_idx: int, sync: bool) -> Any:
        output = self.compute_loss(batch, batch_idx)
        loss = loss_of(output, "compute_loss")
        if loss is not None:
            parallel = isinstance(self.trainer.strategy, ParallelStrategy)
            with nullcontext() if sync or not parallel else self.trainer.strategy.block_backward_sync():  # type: ignore[attr-defined]
                self.manual_backward(loss / self.accumulate_grad_batches)
        return output

    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # checked in on_fit_start
        return optimizer


class _FMLoRAModuleDriver(FlatLoRACallback):
    """The callback through which an FMLoRAModule starts, counts, clips and ends; hooks of the module stay the user's.

    Beside an EFMLoRA callback it takes steps, rho, perturbation and average from that one.
    """

    is_module_driver = True

    def __init__(self, *args: Any, window: int, sync_ascent: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window = window
        self.sync_ascent = sync_ascent
        self.parameters: list[nn.Parameter] = []
        self._scheduler: EFMLoRA | None = None
        self._fresh: list[FreshPerturbation] = []
        self._is_set_up = False
        self.schedulers = ManualSchedulers()

    @override
    def works_beside(self, other: FlatLoRACallback) -> bool:
        return isinstance(other, EFMLoRA)

    @override
    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        problems = super().configuration_problems(trainer, pl_module)
        problems += self.schedulers.take_over(trainer)
        if len(trainer.optimizers) != 1:
            problems.append(f"configure_optimizers must return one optimizer, got {len(trainer.optimizers)}")
        scheduler = _scheduler_of(trainer)
        for name in ("rho", "estimator", "norm_scope", "adapter_name") if scheduler else ():
            if getattr(self, name) != getattr(scheduler, name):
                problems.append(
                    f"{name} must be the same in the module and in EFMLoRA beside it, "
                    f"got {getattr(self, name)!r} and {getattr(scheduler, name)!r}"
                )
        return problems

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._is_set_up = True
        self._scheduler, self._fresh = None, []
        if stage == "fit":
            self.schedulers.listen(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.parameters = list(pl_module.parameters())
        self._scheduler = _scheduler_of(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._scheduler is not None:  # not earlier: it may come after this one in the list of callbacks
            assert self.perturbation is not None
            self.perturbation.uninstall()
            self.perturbation = self._scheduler.perturbation

    @override
    def uninstall(self) -> None:
        super().uninstall()
        self._is_set_up = False

    def ascends(self, trainer: Trainer) -> bool:
        """Whether the coming step has two passes; not while a tuner has put our callbacks away."""
        if not self._is_set_up:
            raise MisconfigurationException(
                "FMLoRAModule was not set up, so nothing would be perturbed: where you override configure_callbacks, "
                "return [*super().configure_callbacks(), ...]"
            )
        source = self._scheduler or self
        if source not in trainer.callbacks:  # type: ignore[attr-defined]
            return False
        if not source.is_refresh_step:
            return False
        # With rho = 0 the step is plain, unless there is an average that a zero perturbation has to move.
        started = self._scheduler is not None and self.perturbation is not None and self.perturbation.started
        return started or source.current_rho(trainer) > 0

    def open_window(self) -> None:
        """Forget what a window that was cut short has left."""
        self._fresh = []

    def count_step(self) -> None:
        """Count an optimizer step, with EFMLoRA beside in its count."""
        (self._scheduler or self).step += 1

    def take_ascent(self, trainer: Trainer) -> None:
        """E from the gradients that the pairs hold; with EFMLoRA beside, Ê waits for the optimizer step."""
        assert self.perturbation is not None
        fresh = self.perturbation.ascend((self._scheduler or self).current_rho(trainer), at_perturbed=False)
        if self._scheduler is None:
            self.perturbation.assign(fresh)
        else:
            self._fresh.append(fresh)

    def descending(self) -> Any:
        """Inside, the layers read B + E with the fresh E."""
        assert self.perturbation is not None
        return self.perturbation.applied(self._fresh[-1].stacks if self._fresh else None)

    def between_ascents(self) -> Any:
        """Inside, the layers read B + Ê with EFMLoRA beside, else B."""
        if self._scheduler is None or self.perturbation is None or not self.perturbation.started:
            return nullcontext()
        return self.perturbation.applied()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, FMLoRAModule)
        if self._scheduler is None:  # else EFMLoRA has counted it
            self.count_step()
        elif self._fresh:
            self._average(trainer, self._scheduler.beta)
        if pl_module.gradient_clip_val is not None:
            pl_module.clip_gradients(optimizer, pl_module.gradient_clip_val, pl_module.gradient_clip_algorithm)

    def _average(self, trainer: Trainer, beta: float) -> None:
        """Move Ê once, by the mean E of the window's micro-batches, if the step itself is not going to be skipped."""
        assert self.perturbation is not None
        fresh, self._fresh = self._fresh, []
        finite = all_gradients_finite(watched_parameters(trainer, optimizer_index=0)).to(fresh[0].finite.device)
        for one in fresh:
            finite = finite & one.finite
        stacks = [torch.stack(parts).mean(0) for parts in zip(*(one.stacks for one in fresh), strict=True)]
        self.perturbation.average(FreshPerturbation(stacks, finite, fresh[0].is_zero), beta)

    # Plateau schedulers step when automatic optimization would: after the validation that follows their step or epoch.

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.schedulers.step_waiting(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.schedulers.step_waiting(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.schedulers.step_waiting(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._scheduler is not None else super().state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            super().load_state_dict(state_dict)


def _scheduler_of(trainer: Trainer) -> EFMLoRA | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, EFMLoRA)), None)


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
