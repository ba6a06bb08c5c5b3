"""FMLoRA: two passes a step, for any LightningModule."""

from contextlib import AbstractContextManager

from torch import nn
from typing_extensions import override

from lightning_flatlora.callbacks.methods.b_perturbation_callback import BPerturbationCallback
from lightning_flatlora.callbacks.methods.two_pass_callback import TwoPassCallback
from lightning_flatlora.lora_pair import trained_factors


class FMLoRA(TwoPassCallback, BPerturbationCallback):
    """Seek flat minima with a fresh perturbation at every step (Algorithm 1), in two passes.

    The gradient of the first pass gives E. The optimizer sees the gradient of the second, which is taken at B + E. Both
    passes draw the same dropout masks and see the same batch. The loss is logged and returned from the first pass, at
    clean weights, and buffers (BatchNorm's statistics) and torchmetrics are afterwards as that pass left them. Hooks
    around backward fire in each pass, with its gradient. Other attributes that a training_step changes see both passes:
    count in on_train_batch_end. Under gradient accumulation each micro-batch has its own ascent.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient alone.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain LoRA steps.
        adapter_name: the peft adapter to perturb; None takes the active ones.
        finder: says what the pairs are where the layers are not peft's, see :mod:`lightning_flatlora.finders`.
        sync_ascent: average the ascent's gradient over the ranks, so that all of them have the same E. False leaves
            each rank its own E (m-sharpness) and sends nothing.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[FMLoRA(rho=0.03)], accelerator="cpu", logger=False)
    """

    @property
    @override
    def ascending(self) -> list[nn.Parameter]:
        return trained_factors(self.main_group.pairs)

    @override
    def ascend(self, rho: float) -> AbstractContextManager[None]:
        assert self.perturbation is not None
        # Algorithm 1 takes the gradient of the ascent at the clean B.
        self.perturbation.assign(self.perturbation.ascend(rho, at_perturbed=False))
        return self.perturbation.applied()
