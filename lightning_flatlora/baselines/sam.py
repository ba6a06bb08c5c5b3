"""SAM on every trained parameter."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora.baselines.joint_ascent import joint_ascent
from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.flatness import moved
from lightning_flatlora.methods.gradients import parameters_of
from lightning_flatlora.methods.step_method import StepMethod
from lightning_flatlora.schedules import RhoSchedule


class SAM(MethodCallback):
    r"""Take each step's gradient where every trained parameter is moved along its gradient, in two passes.

    .. math:: e = \rho\, \frac{g}{\lVert g \rVert_2}, \qquad \text{gradient at } w + e

    With full fine-tuning it is a reference for LoRA's methods; the model needs no LoRA layer. It
    perturbs everything that the one optimizer trains, with LoRA also heads and norms. The weights are moved in place
    and restored exactly, from copies: in the second pass, and in the hooks that fire around its backward, the stored
    weights are not clean. Memory: two copies of the trained weights. In all other respects (dropout, logging,
    accumulation, ranks) the two passes are those of :class:`~lightning_flatlora.FMLoRA`. Under DDP with accumulation
    each ascent sends every gradient.

    Args:
        rho: radius of the ball over all trained parameters, in the weights' units, >= 0; or a schedule over optimizer
            steps.
        start_step: plain optimizer steps before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain steps.
        sync_ascent: average the ascent's gradient over the ranks; False leaves each rank its own e and sends nothing.

    Raises:
        MisconfigurationException: values out of range (here), or optimizers or a strategy that can't work, such as FSDP
            (at the start of fit, before the first step).

    Source: Foret et al., arXiv 2010.01412, Algorithm 1 with p = 2.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[SAM(rho=0.05)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        start_step: int = 0,
        every_n_steps: int = 1,
        sync_ascent: bool = True,
    ) -> None:
        super().__init__(SAMStep(rho, start_step=start_step, every_n_steps=every_n_steps, sync_ascent=sync_ascent))

    @override
    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        problems = super().configuration_problems(trainer, pl_module)
        if len(trainer.optimizers) != 1:
            return [*problems, f"configure_optimizers must return one optimizer, got {len(trainer.optimizers)}"]
        return problems


class SAMStep(StepMethod):
    """The step of :class:`SAM`: it perturbs what the optimizer trains at the moment."""

    title = "SAM"
    needs_pairs = False
    takes_two_passes = True
    works_sharded = False

    @override
    def pair_problems(self) -> list[str]:
        if not self.ascending:
            return ["the optimizer holds no parameter that is trained: unfreeze what it should learn"]
        return super().pair_problems()

    @override
    def install(self) -> None:
        self.warn_of_rounding("a weight", self.ascending)

    @property
    @override
    def followed(self) -> list[nn.Parameter]:
        return self.ascending

    @property
    @override
    def ascending(self) -> list[nn.Parameter]:
        if self.optimizer is None:
            return []
        return [parameter for parameter in parameters_of(self.optimizer) if parameter.requires_grad]

    @override
    def ascend(self) -> AbstractContextManager[None]:
        parameters = [parameter for parameter in self.ascending if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return self._moved(parameters, joint_ascent(gradients, self.current_rho))

    @contextmanager
    def _moved(self, parameters: list[nn.Parameter], moves: list[Tensor]) -> Iterator[None]:
        """Inside, the parameters are moved in place; afterwards they have exactly their old values."""
        with moved(parameters, moves):
            for parameter in self.ascending:
                # A graph of the clean weights that outlives its pass must fail, not take the moved ones silently.
                torch.autograd.graph.increment_version(parameter)
            yield
