"""Measures of flatness for any model with LoRA layers: sharpness, curvature, loss landscapes, numbers of the factors.

Where a process group runs (DDP), each rank gives the loss of its own batches, every rank calls the same functions in
the same order, and all get the same numbers: losses, gradients and Hessian-vector products are means over the ranks.
"""

from lightning_flatlora.flatness.curvature import hessian_product, hessian_trace, top_eigenvalue
from lightning_flatlora.flatness.estimate import Estimate
from lightning_flatlora.flatness.factors import (
    balancedness,
    condition_number,
    cosine,
    gradient_identity_residual,
    inner_product,
    realized_radius,
)
from lightning_flatlora.flatness.landscape import (
    Direction,
    adversarial_direction,
    base_norm,
    loss_along_line,
    loss_at,
    loss_on_plane,
    orthogonal_direction,
    random_direction,
)
from lightning_flatlora.flatness.losses import Loss, LossGradient, MeanLoss, loss_gradient
from lightning_flatlora.flatness.measures import DEFAULT_MEASURES, MEASURES, Point, measure
from lightning_flatlora.flatness.sharpness import (
    EMASharpness,
    ExpectedSharpness,
    Sharpness,
    ema_sharpness,
    expected_sharpness,
    fresh_perturbation,
    lora_sharpness,
    moved,
    sam_sharpness,
)
from lightning_flatlora.pairs.lora_pair import trained_factors

__all__ = [
    "DEFAULT_MEASURES",
    "MEASURES",
    "Direction",
    "EMASharpness",
    "Estimate",
    "ExpectedSharpness",
    "Loss",
    "LossGradient",
    "MeanLoss",
    "Point",
    "Sharpness",
    "adversarial_direction",
    "balancedness",
    "base_norm",
    "condition_number",
    "cosine",
    "ema_sharpness",
    "expected_sharpness",
    "fresh_perturbation",
    "gradient_identity_residual",
    "hessian_product",
    "hessian_trace",
    "inner_product",
    "lora_sharpness",
    "loss_along_line",
    "loss_at",
    "loss_gradient",
    "loss_on_plane",
    "measure",
    "moved",
    "orthogonal_direction",
    "random_direction",
    "realized_radius",
    "sam_sharpness",
    "top_eigenvalue",
    "trained_factors",
]
