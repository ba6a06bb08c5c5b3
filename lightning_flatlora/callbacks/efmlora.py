"""EFMLoRA: the perturbation is an average over past steps, so a step costs one pass."""

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_flatlora.callbacks.base import FlatLoRACallback, module_drivers, watched_parameters
from lightning_flatlora.callbacks.courses import Course
from lightning_flatlora.callbacks.one_pass import OnePass
from lightning_flatlora.callbacks.perturbs_b import PerturbsB
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import RhoSchedule


class EFMLoRA(OnePass, PerturbsB):
    r"""Seek flat minima at LoRA's speed (Algorithm 2): each step's gradient is taken at B + Ê.

    .. math:: \hat E_1 = E_1, \qquad \hat E_t = (1-\beta)\,\hat E_{t-1} + \beta\,E_t \quad\text{(Eq. 18)}

    E_t comes from the very gradient that the step uses (Eqs. 10-15), and the next steps' forward passes read B + Ê. The
    stored weights stay clean at every moment. Beside an :class:`~lightning_flatlora.FMLoRAModule` it schedules the
    module's two passes instead: a fresh E on refresh steps, Ê and one pass on the others.

    It perturbs the pairs that the model trains at the moment, whatever is frozen, activated, added or scaled in the
    middle of a fit. Under manual optimization the pairs of each of several optimizers have a ball, an average and a
    step count of their own.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        beta: weight of the fresh perturbation in the average, in (0, 1]; 1 keeps only the last.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient alone.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first refresh.
        every_n_steps: optimizer steps between refreshes; Ê is stale in between.
        adapter_name: the peft adapter to perturb; None takes the active ones. Callbacks with an adapter each may stand
            side by side.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[EFMLoRA(rho=2.0)], accelerator="cpu", logger=False)
    """

    averages = True
    takes_several_optimizers = True

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

    @override
    def begin(self) -> None:
        super().begin()
        self._module_ascends = False

    @override
    def works_beside(self, other: FlatLoRACallback) -> bool:
        """An FMLoRAModule, whose passes it schedules, or another EFMLoRA with an adapter of its own."""
        names = {self.adapter_name, other.adapter_name}
        return other.is_module_driver or (isinstance(other, EFMLoRA) and None not in names and len(names) == 2)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._module_ascends = bool(module_drivers(trainer))

    @override
    def perturbs(self, trainer: Trainer) -> bool:
        return bool(self._perturbed()) and not self._module_ascends

    def _perturbed(self) -> list[Perturbation]:
        """Those of the optimizers whose pairs have an average and are trained now."""
        perturbations = [course.perturbation for course in self.courses]
        return [each for each in perturbations if each is not None and each.started and each.learns]

    @override
    def on(self, trainer: Trainer) -> None:
        for perturbation in self._perturbed():
            perturbation.on()

    @override
    def off(self) -> None:
        for course in self.courses:
            if course.perturbation is not None:
                course.perturbation.off()

    @override
    def before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, course: Course) -> None:
        """Ê from the gradient that this step is about to use, taken at B + Ê."""
        perturbation = course.perturbation
        if perturbation is None or self._module_ascends:
            return
        if not perturbation.has_gradient:
            groups = trainer.optimizers[course.index].param_groups
            if any(p.grad is not None for group in groups for p in group["params"]):
                perturbation.forget_missing()
            return  # a step without any gradient is of batches that were skipped: there is no E_t
        perturbation.forget_missing()
        if not self.refreshes(course):
            return
        self.follow_scaling()
        rho = self.current_rho(trainer, course)
        watched = watched_parameters(trainer, course.index)
        fresh = perturbation.ascend(rho, at_perturbed=True, also_finite=watched)
        perturbation.average(fresh, self.beta)
