"""FMLoRA: two passes per step, for any LightningModule."""

from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.methods.fmlora import FMLoRAStep
from lightning_flatlora.pairs.lora_pair import Finder
from lightning_flatlora.schedules import RhoSchedule


class FMLoRA(MethodCallback):
    """Seek flat minima with a fresh perturbation at every step (Algorithm 1), in two passes.

    The gradient of the first pass gives E. The optimizer sees the gradient of the second, which is taken at B + E. Both
    passes draw the same dropout masks and see the same batch. The loss is logged and returned from the first pass, at
    clean weights, and buffers (BatchNorm's statistics) and torchmetrics are afterwards as that pass left them. Hooks
    around backward fire in each pass, with its gradient. Side effects that lie deeper than the module's own numbers,
    lists, dicts and sets happen twice: move them to on_train_batch_end. Under gradient accumulation each micro-batch
    has its own ascent.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        estimator: "average" of both gradients' estimates (Eq. 12), or "projected", from B's gradient alone.
        norm_scope: "global", one ball over all pairs, or "layer", one of radius rho for each.
        start_step: optimizer steps of plain LoRA before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain LoRA steps.
        adapter_name: the peft adapter to perturb; None takes the active ones.
        finder: says what the pairs are if the layers are not peft's, see :mod:`lightning_flatlora.pairs.finders`.
        sync_ascent: average the ascent's gradient over the ranks, so that all of them have the same E. False leaves
            each rank its own E (m-sharpness) and sends nothing.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[FMLoRA(rho=0.03)], accelerator="cpu", logger=False)
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
        finder: Finder | None = None,
        sync_ascent: bool = True,
    ) -> None:
        super().__init__(
            FMLoRAStep(
                rho,
                estimator=estimator,
                norm_scope=norm_scope,
                start_step=start_step,
                every_n_steps=every_n_steps,
                adapter_name=adapter_name,
                finder=finder,
                sync_ascent=sync_ascent,
            )
        )
