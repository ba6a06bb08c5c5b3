"""EFMLoRA: the perturbation is an average over past steps, so a step costs one pass."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.base import FlatLoRACallback, module_drivers, watched_parameters
from lightning_flatlora.callbacks.two_passes import at_training_step
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.schedules import RhoSchedule


class EFMLoRA(FlatLoRACallback):
    r"""Seek flat minima at LoRA's speed (Algorithm 2): each step's gradient is taken at B + Ê.

    .. math:: \hat E_1 = E_1, \qquad \hat E_t = (1-\beta)\,\hat E_{t-1} + \beta\,E_t \quad\text{(Eq. 18)}

    E_t comes from the very gradient that the step uses (Eqs. 10-15), and the next steps' forward passes read B + Ê. The
    stored weights stay clean at every moment. Beside an :class:`~lightning_flatlora.FMLoRAModule` it schedules the
    module's two passes instead: a fresh E on refresh steps, Ê and one pass on the others.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        beta: weight of the fresh perturbation in the average, in (0, 1]; 1 keeps only the last.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient alone.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first refresh.
        every_n_steps: optimizer steps between refreshes; Ê is stale in between.
        adapter_name: the peft adapter to perturb; None takes the active ones.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[EFMLoRA(rho=2.0)], accelerator="cpu", logger=False)
    """

    averages = True

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        beta: float = 0.9,
        estimator: Estimator = "average",
        norm_scope: NormScope = "global",
        start_step: int = 0,
        every_n_steps: int = 1,
        adapter_name: str | None = None,
    ) -> None:
        super().__init__(
            rho,
            estimator=estimator,
            norm_scope=norm_scope,
            start_step=start_step,
            every_n_steps=every_n_steps,
            adapter_name=adapter_name,
            beta=beta,
        )
        self._module_ascends = False
        self._cancel: Callable[[], None] | None = None

    @override
    def works_beside(self, other: FlatLoRACallback) -> bool:
        return other.is_module_driver

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._module_ascends = bool(module_drivers(trainer))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.perturbation is not None
        if self.perturbation.started and not self._module_ascends:
            self._cancel = at_training_step(pl_module, self.perturbation.on)  # no other hook before it sees B + Ê

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization:
            self._off()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self.perturbation is not None
        if not self.holds_pairs(trainer, optimizer):
            return
        if self.is_refresh_step and not self._module_ascends:
            self._refresh(trainer)
        if pl_module.automatic_optimization:
            self._off()
        elif self.perturbation.started and not self._module_ascends:
            self.perturbation.on()  # a manual training_step may go on with another pass
        self.step += 1

    def _refresh(self, trainer: Trainer) -> None:
        """Ê from the gradient that this step is about to use, taken at B + Ê."""
        assert self.perturbation is not None
        if not self.perturbation.has_gradient:
            return  # the batch was skipped: there is no E_t
        rho = self.current_rho(trainer)
        watched = watched_parameters(trainer, self._optimizer_index)
        fresh = self.perturbation.ascend(rho, at_perturbed=True, also_finite=watched)
        self.perturbation.average(fresh, self.beta)

    # Wherever a step can end early, the layers go back to the clean weights.

    def _off(self) -> None:
        if self._cancel is not None:
            self._cancel()
            self._cancel = None
        if self.perturbation is not None:
            self.perturbation.off()

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._off()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._off()
        if self.step == 0 and not pl_module.automatic_optimization:
            rank_zero_warn(
                "EFMLoRA saw no optimizer step in this epoch, so nothing was perturbed: step the optimizer that "
                "self.optimizers() gives, not the one inside it"
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._off()
        super().on_exception(trainer, pl_module, exception)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._off()
