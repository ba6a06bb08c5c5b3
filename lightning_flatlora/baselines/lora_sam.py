"""LoRA-SAM: SAM on A and B at once."""

from contextlib import AbstractContextManager

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_flatlora.baselines.joint_ascent import FactorPerturbation
from lightning_flatlora.callbacks.methods.checks import warn_of_rounding
from lightning_flatlora.callbacks.methods.two_pass_callback import TwoPassCallback
from lightning_flatlora.distributed import layout_of


class LoRASAM(TwoPassCallback):
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

    @override
    def begin(self) -> None:
        super().begin()
        self._factors: FactorPerturbation | None = None

    @override
    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pairs = self.main_group.pairs
        self._leave()
        if pairs:
            # Once at the start, and not again whenever the pairs change in the middle of a fit.
            if not self._is_training:
                warn_of_rounding(self, "B", [pair.B for pair in pairs])
            self._factors = FactorPerturbation(pairs, layout_of(trainer.strategy.model))
            self._factors.install()

    @override
    def uninstall(self) -> None:
        self._leave()
        super().uninstall()

    def _leave(self) -> None:
        if self._factors is not None:
            self._factors.uninstall()
            self._factors = None

    @property
    @override
    def ascending(self) -> list[nn.Parameter]:
        return self._factors.factors if self._factors is not None else []

    @override
    def ascend(self, rho: float) -> AbstractContextManager[None]:
        assert self._factors is not None
        self._factors.ascend(rho)
        return self._factors.applied()
