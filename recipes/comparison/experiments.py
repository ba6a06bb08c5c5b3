"""Two ideas beyond the paper, tried in the comparison: one device, whole factors."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora import FMLoRA
from lightning_flatlora.baselines import LoRASAM
from lightning_flatlora.baselines.joint_ascent import FactorPerturbation
from lightning_flatlora.callbacks.two_passes import put_on_instance
from lightning_flatlora.distributed import Layout, layout_of
from lightning_flatlora.functional import damped_inverse_root, perturbation_scale
from lightning_flatlora.pairs import LoRAPair


def tangent_ascent(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float) -> tuple[Tensor, ...]:
    r"""The steepest ascent among the directions in which A and B can move W together, to first order.

    .. math::
        P_T(G) &= P_B G + G P_A - P_B G P_A = s\,(D_B A + B D_A) \\
        D_B &= \tfrac{1}{s^2} (I - \tfrac12 P_B)\, G_B K_A^+, \qquad
        D_A = \tfrac{1}{s^2} K_B^+ G_A\, (I - \tfrac12 P_A)

    Returns:
        D_A (r, m), D_B (n, r) and the squared norm of P_T(G), shape (). What s D_B D_A adds to W is of second order.
    """
    root_A, root_B = damped_inverse_root(A.mT).to(A.dtype), damped_inverse_root(B).to(A.dtype)
    half_A, half_B = root_B @ grad_A, grad_B @ root_A.mT
    both = root_B @ B.mT @ half_B
    direction_A = root_B.mT @ (half_A - 0.5 * both @ root_A @ A)
    direction_B = (half_B - 0.5 * B @ root_B.mT @ both) @ root_A
    squares = half_A.square().sum() + half_B.square().sum() - both.square().sum()
    return direction_A / scaling**2, direction_B / scaling**2, squares / scaling**2


class _Tangent(FactorPerturbation):
    def __init__(self, pairs: Sequence[LoRAPair], layout: Layout) -> None:
        super().__init__(pairs, layout)
        self._pairs = pairs

    @override
    @torch.no_grad()
    def ascend(self, rho: float) -> None:
        ascents = [tangent_ascent(p.A, p.B, _grad(p.A), _grad(p.B), p.scaling) for p in self._pairs]
        norm = torch.stack([ascent[2] for ascent in ascents]).sum()
        scale = torch.nan_to_num(perturbation_scale(norm, rho), 0.0, 0.0)
        self._E = []
        for pair, (of_A, of_B, _) in zip(self._pairs, ascents, strict=True):
            self._E += [(pair.A, scale * of_A), (pair.B, scale * of_B)]


class TangentFMLoRA(LoRASAM):
    """FMLoRA with a perturbation of A and B along the tangent space of W0 + s B A."""

    @override
    def install(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        factors = [factor for pair in self.search.pairs for factor in (pair.A, pair.B)]
        self._factors = _Tangent(self.search.pairs, layout_of(trainer.strategy.model, factors))
        self._factors.install()


class PartialFMLoRA(FMLoRA):
    """FMLoRA whose first pass sees only the first examples of a batch: a step costs 1 + part times LoRA's."""

    def __init__(self, rho: float, part: float) -> None:
        super().__init__(rho)
        self.part = part

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._step_arguments is None:
            return
        original, cancel = pl_module.training_step, self._cancel

        def training_step(batch: Any, *rest: Any) -> Any:
            return original(batch if self._in_second_pass else self._first(batch), *rest)

        put_back = put_on_instance(pl_module, "training_step", training_step)

        def cancel_both() -> None:
            put_back()
            cancel()

        self._cancel = cancel_both

    def _first(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        size = next(len(value) for value in batch.values() if isinstance(value, Tensor))
        kept = max(1, round(self.part * size))
        return {k: v[:kept] if isinstance(v, Tensor) and len(v) == size else v for k, v in batch.items()}


def _grad(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
