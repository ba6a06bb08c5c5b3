"""LoRA-SAM: SAM on A and B at once."""

from contextlib import AbstractContextManager

from torch import nn
from typing_extensions import override

from lightning_flatlora.baselines.joint_ascent import FactorPerturbation
from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.methods.checks import warn_of_rounding
from lightning_flatlora.methods.step_method import StepMethod
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair
from lightning_flatlora.schedules import RhoSchedule


class LoRASAM(MethodCallback):
    r"""Take each step's gradient where A and B are moved along their joint gradient (SAM in LoRA's space): two passes.

    .. math:: (E_A, E_B) = \rho\, \frac{(G_A, G_B)}{\lVert (G_A, G_B) \rVert_F},
        \qquad \text{gradient at } (A + E_A,\; B + E_B)

    The norm is over all pairs. The product s (B + E_B)(A + E_A) has cross terms, so this is no ball around W: the
    perturbation of W changes under (B M, M⁻¹ A). Only the layers read the moved factors; the stored ones are clean at
    every moment. In all other respects (dropout, logging, accumulation, ranks) the passes are those of
    :class:`~lightning_flatlora.FMLoRA`.

    Args:
        rho: radius of the ball over all A and B, in the factors' units, >= 0; or a schedule over optimizer steps.
        start_step: optimizer steps of plain LoRA before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain LoRA steps.
        adapter_name: the peft adapter to perturb; None takes the active ones.
        finder: says what the pairs are where the layers are not peft's, see :mod:`lightning_flatlora.finders`.
        sync_ascent: average the ascent's gradient over the ranks; False leaves each rank its own E and sends nothing.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Source: Foret et al., arXiv 2010.01412; on LoRA, Eq. 7 of arXiv 2508.00522.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[LoRASAM(rho=0.1)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        start_step: int = 0,
        every_n_steps: int = 1,
        adapter_name: str | None = None,
        finder: Finder | None = None,
        sync_ascent: bool = True,
    ) -> None:
        super().__init__(
            LoRASAMStep(
                rho,
                start_step=start_step,
                every_n_steps=every_n_steps,
                adapter_name=adapter_name,
                finder=finder,
                sync_ascent=sync_ascent,
            )
        )


class LoRASAMStep(StepMethod):
    """The step of :class:`LoRASAM`."""

    title = "LoRASAM"
    takes_two_passes = True

    @override
    def reset(self) -> None:
        super().reset()
        self._factors: FactorPerturbation | None = None
        self._has_warned = False

    @override
    def follow(self, pairs: list[LoRAPair], module: nn.Module, wrapped: nn.Module) -> None:
        super().follow(pairs, module, wrapped)
        self.close()
        self._factors = FactorPerturbation(pairs, self._layout) if pairs else None

    @override
    def install(self) -> None:
        if self._factors is None:
            return
        if not self._has_warned:
            warn_of_rounding(self, "B", [pair.B for pair in self.pairs])
            self._has_warned = True
        self._factors.install()

    @override
    def close(self) -> None:
        if self._factors is not None:
            self._factors.uninstall()

    @property
    @override
    def ascending(self) -> list[nn.Parameter]:
        return self._factors.factors if self._factors is not None else []

    @override
    def ascend(self) -> AbstractContextManager[None]:
        assert self._factors is not None
        self._factors.ascend(self.current_rho)
        return self._factors.applied()
