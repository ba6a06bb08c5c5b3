"""EFMLoRA: the perturbation is an average over past steps, so a step costs one pass."""

from typing_extensions import override

from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.methods.efmlora import EFMLoRAStep
from lightning_flatlora.pairs.lora_pair import Finder
from lightning_flatlora.schedules import RhoSchedule


class EFMLoRA(MethodCallback):
    r"""Seek flat minima at LoRA's speed (Algorithm 2): each step's gradient is taken at B + Ê.

    .. math:: \hat E_1 = E_1, \qquad \hat E_t = (1-\beta)\,\hat E_{t-1} + \beta\,E_t \quad\text{(Eq. 18)}

    E_t comes from the same gradient that the step uses (Eqs. 10-15), and the forward passes of the next steps read
    B + Ê. The stored weights stay clean at every moment. Next to an :class:`~lightning_flatlora.FMLoRAModule` it
    schedules the module's two passes instead: a fresh E on refresh steps, Ê and one pass on the others.

    A pair takes part in a step if its B has a gradient. The model is searched for pairs at the start of the fit and of
    each epoch. Under manual optimization with several optimizers, the pairs of each optimizer have their own ball,
    average and step count.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        beta: weight of the fresh perturbation in the average, in (0, 1]; 1 keeps only the latest.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient alone.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first refresh.
        every_n_steps: optimizer steps between refreshes; Ê is stale in between.
        adapter_name: the peft adapter to perturb; None takes the active ones. Several callbacks may be used together if
            each has an adapter of its own.
        finder: says what the pairs are if the layers are not peft's, see :mod:`lightning_flatlora.pairs.finders`.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[EFMLoRA(rho=0.03)], accelerator="cpu", logger=False)
    """

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
        super().__init__(
            EFMLoRAStep(
                rho,
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
    def works_beside(self, other: MethodCallback) -> bool:
        """Allow an FMLoRAModule, whose passes it schedules, or another EFMLoRA if each has an adapter of its own."""
        if not isinstance(other, EFMLoRA):
            return other.works_beside(self)
        if self.adapter_name is None or other.adapter_name is None:
            return False
        return bool(self.adapter_name != other.adapter_name)
