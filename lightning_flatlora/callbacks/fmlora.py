"""FMLoRA and EFMLoRA for any LightningModule, and the callback through which an FMLoRAModule gets its hooks."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.callbacks.both_lightnings import callback_of, callbacks_of
from lightning_flatlora.callbacks.training_step import window_of
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.methods.b_perturbation import EFMLoRAStep, FMLoRAStep
from lightning_flatlora.pairs.lora_pair import Finder
from lightning_flatlora.patching import put_on
from lightning_flatlora.schedules import RhoSchedule


class FMLoRA(MethodCallback[FMLoRAStep]):
    """Seek flat minima with a fresh perturbation at every step (Algorithm 1), in two passes.

    The gradient of the first pass gives E; the optimizer sees the gradient of the second pass, taken at B + E. Both
    passes see the same batch and dropout masks. The logged and returned loss is the first pass's, at clean weights;
    buffers (BatchNorm's statistics) and torchmetrics also count only that pass. Hooks around backward fire in each
    pass, with its gradient. Side effects deeper than the module's own numbers, lists, dicts and sets happen twice: move
    them to on_train_batch_end. Under gradient accumulation each micro-batch has its own ascent.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
            Required: None is refused.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient only.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain LoRA steps.
        adapter_name: the peft adapter to perturb; None takes the active ones.
        finder: finds the pairs of layers that are not peft's, see :mod:`lightning_flatlora.pairs.finders`.
        sync_ascent: average the ascent's gradient over the ranks, so that E is equal on all of them. With False each
            rank keeps its own E (m-sharpness) and sends nothing.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[FMLoRA(rho=0.05)], accelerator="cpu", logger=False)
    """

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
    ) -> None:
        super().__init__(
            FMLoRAStep(
                rho=rho,
                estimator=estimator,
                norm_scope=norm_scope,
                start_step=start_step,
                every_n_steps=every_n_steps,
                adapter_name=adapter_name,
                finder=finder,
                sync_ascent=sync_ascent,
            )
        )


class EFMLoRA(MethodCallback[EFMLoRAStep]):
    r"""Seek flat minima at LoRA's speed (Algorithm 2): each step's gradient is taken at B + Ê.

    .. math:: \hat E_1 = E_1, \qquad \hat E_t = (1-\beta)\,\hat E_{t-1} + \beta\,E_t \quad\text{(Eq. 18)}

    E_t comes from the step's own gradient (Eqs. 10-15), and the forward passes of the next steps read B + Ê. The stored
    weights always stay clean. Next to an :class:`~lightning_flatlora.FMLoRAModule` it schedules the module's two passes
    instead: a fresh E on refresh steps, Ê and one pass on the others.

    A pair takes part in a step if its B has a gradient. The model is searched for pairs at the start of the fit and of
    each epoch. Under manual optimization with several optimizers, the pairs of each optimizer have their own ball,
    average and step count.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
            Required: None is refused.
        beta: weight of the fresh perturbation in the average, in (0, 1]; 1 keeps only the latest.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient only.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first refresh.
        every_n_steps: optimizer steps between refreshes; Ê is stale in between.
        adapter_name: the peft adapter to perturb; None takes the active ones. Several callbacks may be used together,
            each with its own adapter.
        finder: finds the pairs of layers that are not peft's, see :mod:`lightning_flatlora.pairs.finders`.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[EFMLoRA(rho=0.05)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        rho: float | RhoSchedule | None = None,
        *,
        beta: float = 0.9,
        estimator: Estimator = "average",
        norm_scope: NormScope = "global",
        start_step: int = 0,
        every_n_steps: int = 1,
        adapter_name: str | None = None,
        finder: Finder | None = None,
    ) -> None:
        super().__init__(
            EFMLoRAStep(
                rho=rho,
                beta=beta,
                estimator=estimator,
                norm_scope=norm_scope,
                start_step=start_step,
                every_n_steps=every_n_steps,
                adapter_name=adapter_name,
                finder=finder,
            )
        )

    @override
    def works_beside(self, other: MethodCallback[Any]) -> bool:
        """Allow an FMLoRAModule, whose passes it schedules, or another EFMLoRA if each has its own adapter."""
        if isinstance(other, FMLoRAModuleCallback):
            return True
        names = {self.method.adapter_name, other.method.adapter_name}
        return isinstance(other, EFMLoRA) and len(names) == 2 and None not in names


class FMLoRAModuleCallback(MethodCallback[FMLoRAStep]):
    """Do an FMLoRAModule's work in hooks, so that the module's own hooks are free for the user.

    Next to an EFMLoRA callback the module takes rho, the perturbation and the average from it. Hooks whose pl_module is
    typed Any use members that only an FMLoRAModule has.

    Attributes:
        efmlora: the EFMLoRA callback that schedules the module's passes, if there is one.
        is_set_up: whether the module has given this callback to the Trainer, even if a tuner has removed it for a
            while.
    """

    is_set_up = False

    @override
    def _begin(self) -> None:
        super()._begin()
        self.efmlora: EFMLoRA | None = None

    @property
    @override
    def perturbing_method(self) -> FMLoRAStep | EFMLoRAStep:
        return self.method if self.efmlora is None else self.efmlora.method

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Let schedulers count the module's windows, and have its gradients clipped, in the fit that begins."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.is_set_up = True
            original = trainer.strategy.setup_optimizers

            def setup_optimizers(trainer: Trainer) -> None:
                # Lightning knows no windows in manual optimization, so its estimated_stepping_batches, which an LR
                # scheduler may use, would count batches.
                with put_on(trainer, {"accumulate_grad_batches": window_of(trainer)}):
                    original(trainer)

            def clip(module: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
                # Calls the hook, which a subclass may override as usual; Lightning's own clips nothing for None.
                value, algorithm = pl_module.gradient_clip_val, pl_module.gradient_clip_algorithm
                pl_module.configure_gradient_clipping(optimizer, value, algorithm)

            self.patches.enter_context(put_on(trainer.strategy, {"setup_optimizers": setup_optimizers}))
            # Called after all hooks before a step, which see the unclipped gradient, as usual.
            self.patches.enter_context(put_on(trainer.precision_plugin, {"_clip_gradients": clip}))

    @override
    def configuration_problems(self, trainer: Trainer, pl_module: Any) -> list[str]:
        problems: list[str] = super().configuration_problems(trainer, pl_module) + pl_module._subclass_problems()
        if len(trainer.optimizers) != 1:
            problems.append(
                f"configure_optimizers must return one optimizer, got {len(trainer.optimizers)}: for several, use "
                "manual optimization and the EFMLoRA callback"
            )
        if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs):
            problems.append(
                "ReduceLROnPlateau needs a metric that FMLoRAModule does not pass to it: leave it out of "
                "configure_optimizers and step it in on_validation_epoch_end, or use the FMLoRA callback"
            )
        if sum(isinstance(callback, EFMLoRA) for callback in callbacks_of(trainer)) > 1:
            problems.append("only one EFMLoRA can schedule the module's passes: keep one")
        return problems if self.efmlora is None else problems + self._problems_beside(self.efmlora, trainer)

    def _problems_beside(self, efmlora: EFMLoRA, trainer: Trainer) -> list[str]:
        """List why the module can't work with the EFMLoRA callback that schedules its passes."""
        problems, own, other = [], self.method, efmlora.method
        for name in ("schedule", "estimator", "norm_scope", "adapter_name", "finder"):
            mine, its = getattr(own, name), getattr(other, name)
            if mine != its:
                written = "rho" if name == "schedule" else name
                problems.append(f"{written} must be equal in the module and in EFMLoRA, got {mine!r} and {its!r}")
        if (own.start_step, own.every_n_steps) != (0, 1):
            problems.append("EFMLoRA schedules the module's passes: give start_step and every_n_steps to EFMLoRA")
        if not own.sync_ascent and trainer.world_size > 1:
            problems.append("sync_ascent must be True next to EFMLoRA, which keeps one average for all ranks")
        return problems

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for an EFMLoRA callback that schedules the passes when a fit starts."""
        self.efmlora = callback_of(trainer, EFMLoRA)
        # EFMLoRA finds the pairs and holds their perturbation.
        self.per_optimizer.needs_pairs = self.efmlora is None
        super().on_fit_start(trainer, pl_module)
        if self.efmlora is not None:
            self.efmlora.method.schedules_module = True

    @override
    def look_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # EFMLoRA's pairs decide whether the step ascends, and its wrappers of the strategy may lie inside ours.
        if self.efmlora is not None:
            self.efmlora.look_again(trainer, pl_module)
        super().look_again(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the epoch's schedulers at its end if its last batch was left out."""
        # An on_train_batch_start may have skipped the last batch. Nothing to do if the run was stopped within the
        # epoch.
        batches = trainer.fit_loop.epoch_loop.batch_progress
        if batches.is_last_batch and batches.current.completed < batches.current.ready:
            self.step_schedulers(trainer, "epoch", trainer.current_epoch)
        super().on_train_epoch_end(trainer, pl_module)

    def step_schedulers(self, trainer: Trainer, interval: str, index: int) -> None:
        """Step the LR schedulers that are due after the "step" or "epoch" of this index, counted from 0."""
        for config in trainer.lr_scheduler_configs:
            if config.interval == interval and (index + 1) % config.frequency == 0:
                trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
