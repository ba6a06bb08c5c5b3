"""FMLoRA: two passes a step, for any LightningModule."""

from contextlib import AbstractContextManager

from torch import nn
from typing_extensions import override

from lightning_flatlora.callbacks.perturbs_b import PerturbsB
from lightning_flatlora.callbacks.two_pass_loop import TwoPasses
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.schedules import RhoSchedule


class FMLoRA(TwoPasses, PerturbsB):
    """Seek flat minima with a fresh perturbation at every step (Algorithm 1), in two passes.

    The first pass's gradient gives E, the second is taken at B + E and is the one that the optimizer sees. Both passes
    draw the same dropout masks and see the same batch, but for what the first writes into its tensors; the loss is
    logged and returned from the first, the clean one, and buffers (BatchNorm's statistics) and torchmetrics are as the
    first has left them. Hooks around backward fire in each pass, with its gradient, and other attributes that a
    training_step changes see both passes: count in on_train_batch_end. Under gradient accumulation each micro-batch has
    its own ascent.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient alone.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain LoRA steps.
        adapter_name: the peft adapter to perturb; None takes the active ones.
        sync_ascent: average the ascent's gradient over the ranks, so that all have one E; False leaves each rank its
            own (m-sharpness) and sends nothing.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[FMLoRA(rho=2.0)], accelerator="cpu", logger=False)
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
    ) -> None:
        super().__init__(
            rho,
            estimator=estimator,
            norm_scope=norm_scope,
            start_step=start_step,
            every_n_steps=every_n_steps,
            adapter_name=adapter_name,
            sync_ascent=sync_ascent,
        )

    @property
    @override
    def ascending(self) -> list[nn.Parameter]:
        return [p for pair in self.main.pairs for p in (pair.A, pair.B) if p.requires_grad]

    @override
    def ascend(self, rho: float) -> None:
        assert self.perturbation is not None
        self.perturbation.assign(self.perturbation.ascend(rho, at_perturbed=False))

    @override
    def perturbed(self) -> AbstractContextManager[None]:
        assert self.perturbation is not None
        return self.perturbation.applied()
