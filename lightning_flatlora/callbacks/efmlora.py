"""EFMLoRA: the perturbation is an average over past steps, so a step costs one pass."""

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_flatlora.callbacks.base import FlatLoRACallback, module_drivers, watched_parameters
from lightning_flatlora.callbacks.one_pass import OnePass
from lightning_flatlora.callbacks.perturbs_b import PerturbsB
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.schedules import RhoSchedule


class EFMLoRA(OnePass, PerturbsB):
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

    @override
    def works_beside(self, other: FlatLoRACallback) -> bool:
        return other.is_module_driver

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._module_ascends = bool(module_drivers(trainer))

    @override
    def perturbs(self, trainer: Trainer) -> bool:
        assert self.perturbation is not None
        return self.perturbation.started and not self._module_ascends

    @override
    def on(self, trainer: Trainer) -> None:
        assert self.perturbation is not None
        self.perturbation.on()

    @override
    def off(self) -> None:
        if self.perturbation is not None:
            self.perturbation.off()

    @override
    def before_optimizer_step(self, trainer: Trainer) -> None:
        """Ê from the gradient that this step is about to use, taken at B + Ê."""
        assert self.perturbation is not None
        if self._module_ascends or not self.is_refresh_step or not self.perturbation.has_gradient:
            return  # without a gradient the batch was skipped: there is no E_t
        rho = self.current_rho(trainer)
        watched = watched_parameters(trainer, self._optimizer_index)
        fresh = self.perturbation.ascend(rho, at_perturbed=True, also_finite=watched)
        self.perturbation.average(fresh, self.beta)
