"""SAM on every trained parameter, and LoRA-SAM on A and B at once."""

from collections import defaultdict
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.flatness.sharpness import moved
from lightning_flatlora.functional import joint_ascent
from lightning_flatlora.methods.optimizers import parameters_of
from lightning_flatlora.methods.step_method import TwoPassStep
from lightning_flatlora.pairs.lora_pair import Finder, rows_of, trained_factors
from lightning_flatlora.perturbed_read import AnyRef, as_ref, perturbed
from lightning_flatlora.schedules import RhoSchedule


class SAM(MethodCallback["SAMStep"]):
    r"""Take each step's gradient at parameters that are moved along their gradient (SAM), in two passes.

    .. math:: e = \rho\, \frac{g}{\lVert g \rVert_2}, \qquad \text{gradient at } w + e

    It perturbs every parameter that the optimizer trains, including heads and norms; the model needs no LoRA layer. The
    weights are moved in place and restored exactly from copies, so the stored weights are not clean during the second
    pass and in the hooks around its backward. Memory: two copies of the trained weights. In all other respects
    (dropout, logging, accumulation, ranks) the passes are those of :class:`~lightning_flatlora.FMLoRA`. Under DDP with
    accumulation every ascent sends all gradients.

    Args:
        rho: radius of the ball over all trained parameters, in the weights' units, >= 0; or a schedule over optimizer
            steps.
        start_step: plain optimizer steps before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain steps.
        sync_ascent: average the ascent's gradient over the ranks; with False each rank keeps its own e and sends
            nothing.

    Raises:
        MisconfigurationException: values out of range (here), or optimizers or a strategy that can't work, such as FSDP
            (at the start of fit, before the first step).

    Source: Foret et al., arXiv 2010.01412, Algorithm 1 with p = 2.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[SAM(rho=0.05)], accelerator="cpu", logger=False)
    """

    def __init__(
        self, rho: float | RhoSchedule, *, start_step: int = 0, every_n_steps: int = 1, sync_ascent: bool = True
    ) -> None:
        super().__init__(SAMStep(rho=rho, start_step=start_step, every_n_steps=every_n_steps, sync_ascent=sync_ascent))


class SAMStep(TwoPassStep):
    """The step of :class:`SAM`: it perturbs the parameters that the optimizer currently trains."""

    needs_pairs = False
    works_sharded = False

    @override
    def pair_problems(self) -> list[str]:
        if not self.ascent_parameters:
            return ["the optimizer holds no trainable parameter: unfreeze those that it should train"]
        return super().pair_problems()

    @property
    @override
    def rate_parameters(self) -> list[nn.Parameter]:
        return self.ascent_parameters

    @property
    @override
    def ascent_parameters(self) -> list[nn.Parameter]:
        if self.optimizer is None:
            return []
        return [parameter for parameter in parameters_of(self.optimizer) if parameter.requires_grad]

    @override
    def perturb(self) -> AbstractContextManager[None]:
        parameters = [parameter for parameter in self.ascent_parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in self.ascent_parameters:
            # A graph of the clean weights that outlives its pass must fail, not silently use the moved weights.
            torch.autograd.graph.increment_version(parameter)
        return moved(parameters, joint_ascent(gradients, self.current_rho))


class LoRASAM(MethodCallback["LoRASAMStep"]):
    r"""Take each step's gradient at A and B moved along their joint gradient (SAM in LoRA's space), in two passes.

    .. math:: (E_A, E_B) = \rho\, \frac{(G_A, G_B)}{\lVert (G_A, G_B) \rVert_F},
        \qquad \text{gradient at } (A + E_A,\; B + E_B)

    The norm is over all pairs. The product s (B + E_B)(A + E_A) has cross terms, so this is not a ball around W:
    rewriting W by (B M, M⁻¹ A) changes its perturbation. Only the layers see the moved factors; the stored ones always
    stay clean. In all other respects (dropout, logging, accumulation, ranks) the passes are those of
    :class:`~lightning_flatlora.FMLoRA`.

    Args:
        rho: radius of the ball over all A and B, in the factors' units, >= 0; or a schedule over optimizer steps.
        start_step: optimizer steps of plain LoRA before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain LoRA steps.
        adapter_name: the peft adapter to perturb; None takes the active ones.
        finder: finds the pairs of layers that are not peft's, see :mod:`lightning_flatlora.pairs.finders`.
        sync_ascent: average the ascent's gradient over the ranks; with False each rank keeps its own E and sends
            nothing.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Source: Foret et al., arXiv 2010.01412; on LoRA, Eq. 7 of arXiv 2508.00522.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[LoRASAM(rho=0.05)], accelerator="cpu", logger=False)
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
                rho=rho,
                start_step=start_step,
                every_n_steps=every_n_steps,
                adapter_name=adapter_name,
                finder=finder,
                sync_ascent=sync_ascent,
            )
        )


class LoRASAMStep(TwoPassStep):
    """The step of :class:`LoRASAM`."""

    @property
    @override
    def ascent_parameters(self) -> list[nn.Parameter]:
        return trained_factors(self.pairs)

    @override
    @torch.no_grad()
    def perturb(self) -> AbstractContextManager[None]:
        # Factors that can be stacked, in the same order on every rank.
        groups: dict[object, list[nn.Parameter]] = defaultdict(list)
        for factor in self.ascent_parameters:
            groups[self.sharding.shape(factor), factor.dtype, factor.device].append(factor)
        # A missing gradient counts as zero.
        gradients = [self.sharding.stack(group, gradients=True) for group in groups.values()]
        E: dict[nn.Parameter, Tensor] = {}
        for group, stack in zip(groups.values(), joint_ascent(gradients, self.current_rho), strict=True):
            E.update(zip(group, stack, strict=True))
        moves: dict[AnyRef, Tensor] = {}
        for pair in self.pairs:
            for factor, readers in ((pair.A, pair.A_readers), (pair.B, pair.readers)):
                # A frozen factor is not perturbed.
                for reader in readers if factor in E else ():
                    # A pair may cover only some rows of the parameter.
                    moves[reader] = rows_of(E[factor].view(self.sharding.shape(factor)), as_ref(reader).rows)
        return perturbed(moves, self.sharding.only_views, only_with_grad=True)
