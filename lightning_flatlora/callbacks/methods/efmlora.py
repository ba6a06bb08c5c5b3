"""EFMLoRA: the perturbation is an average over past steps, so a step costs one pass."""

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_flatlora.callbacks.methods.b_perturbation_callback import BPerturbationCallback
from lightning_flatlora.callbacks.methods.method_callback import MethodCallback, watched_parameters
from lightning_flatlora.callbacks.methods.module_passes import ModulePasses, module_passes_of
from lightning_flatlora.callbacks.methods.one_pass_callback import OnePassCallback
from lightning_flatlora.callbacks.methods.pair_groups import PairGroup
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.lora_pair import Finder
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import RhoSchedule


class EFMLoRA(OnePassCallback, BPerturbationCallback):
    r"""Seek flat minima at LoRA's speed (Algorithm 2): each step's gradient is taken at B + Ê.

    .. math:: \hat E_1 = E_1, \qquad \hat E_t = (1-\beta)\,\hat E_{t-1} + \beta\,E_t \quad\text{(Eq. 18)}

    E_t comes from the same gradient that the step uses (Eqs. 10-15), and the forward passes of the next steps read
    B + Ê. The stored weights stay clean at every moment. Beside an :class:`~lightning_flatlora.FMLoRAModule` it
    schedules the module's two passes instead: a fresh E on refresh steps, Ê and one pass on the others.

    It perturbs the pairs that the model trains at the moment, whatever is frozen, activated, added or scaled in the
    middle of a fit. Under manual optimization with several optimizers, the pairs of each optimizer have a ball, an
    average and a step count of their own.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        beta: weight of the fresh perturbation in the average, in (0, 1]; 1 keeps only the latest.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient alone.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first refresh.
        every_n_steps: optimizer steps between refreshes; Ê is stale in between.
        adapter_name: the peft adapter to perturb; None takes the active ones. Several callbacks may be used together if
            each has an adapter of its own.
        finder: says what the pairs are where the layers are not peft's, see :mod:`lightning_flatlora.finders`.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[EFMLoRA(rho=0.03)], accelerator="cpu", logger=False)
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
        finder: Finder | None = None,
    ) -> None:
        self.beta = beta
        super().__init__(
            rho,
            estimator=estimator,
            norm_scope=norm_scope,
            start_step=start_step,
            every_n_steps=every_n_steps,
            adapter_name=adapter_name,
            finder=finder,
        )

    @override
    def works_beside(self, other: MethodCallback) -> bool:
        """An FMLoRAModule, whose passes it schedules, or another EFMLoRA if each has an adapter of its own."""
        if isinstance(other, ModulePasses):
            return True
        if not isinstance(other, EFMLoRA) or self.adapter_name is None or other.adapter_name is None:
            return False
        return self.adapter_name != other.adapter_name

    @override
    def perturbs(self, trainer: Trainer) -> bool:
        # An FMLoRAModule perturbs by itself, and this callback only schedules.
        return bool(self._perturbed()) and module_passes_of(trainer) is None

    def _perturbed(self) -> list[Perturbation]:
        """The perturbations of the optimizers whose pairs have an average and are trained now."""
        averaged = [pair_group.averaged for pair_group in self.pair_groups]
        return [perturbation for perturbation in averaged if perturbation is not None]

    @override
    def on(self, trainer: Trainer) -> None:
        for perturbation in self._perturbed():
            perturbation.on()

    @override
    def off(self) -> None:
        for pair_group in self.pair_groups:
            if pair_group.perturbation is not None:
                pair_group.perturbation.off()

    @override
    def before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, pair_group: PairGroup) -> None:
        """Move Ê by the gradient that this step is about to use, which was taken at B + Ê."""
        if module_passes_of(trainer) is not None:
            return
        self.follow_scaling()
        rho = self.current_size(trainer, pair_group) if self.refreshes(pair_group) else None
        watched = watched_parameters(trainer, pair_group.index)
        pair_group.average(trainer.optimizers[pair_group.index], rho, self.beta, watched)
