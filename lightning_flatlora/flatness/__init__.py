"""Measures of flatness for any model with LoRA layers: sharpness, curvature, loss landscapes, and the factors.

``loss`` computes the mean loss of fixed batches at the weights that the layers read now; ``pairs`` come from
:func:`~lightning_flatlora.find_pairs`. Every function leaves weights, ``.grad`` and layers as they were, even after an
exception. Random draws come from a generator with the given ``seed``, equal on every device and rank; the global
generators are not used. A "pass" is one forward or one backward pass over the batches.

If a process group runs (DDP), each rank gives the loss of its own batches, and every rank must call the same functions
in the same order. All get the same numbers: losses, gradients and Hessian-vector products are means over the ranks.
"""

from lightning_flatlora.flatness.curvature import Estimate as Estimate
from lightning_flatlora.flatness.curvature import hessian_product as hessian_product
from lightning_flatlora.flatness.curvature import hessian_trace as hessian_trace
from lightning_flatlora.flatness.curvature import top_eigenvalue as top_eigenvalue
from lightning_flatlora.flatness.factors import balancedness as balancedness
from lightning_flatlora.flatness.factors import condition_number as condition_number
from lightning_flatlora.flatness.factors import cosine as cosine
from lightning_flatlora.flatness.factors import gradient_identity_residual as gradient_identity_residual
from lightning_flatlora.flatness.factors import inner_product as inner_product
from lightning_flatlora.flatness.factors import realized_radius as realized_radius
from lightning_flatlora.flatness.landscape import Direction as Direction
from lightning_flatlora.flatness.landscape import adversarial_direction as adversarial_direction
from lightning_flatlora.flatness.landscape import base_norm as base_norm
from lightning_flatlora.flatness.landscape import loss_along_line as loss_along_line
from lightning_flatlora.flatness.landscape import loss_at as loss_at
from lightning_flatlora.flatness.landscape import loss_on_plane as loss_on_plane
from lightning_flatlora.flatness.landscape import orthogonal_direction as orthogonal_direction
from lightning_flatlora.flatness.landscape import random_direction as random_direction
from lightning_flatlora.flatness.losses import Loss as Loss
from lightning_flatlora.flatness.losses import LossGradient as LossGradient
from lightning_flatlora.flatness.losses import MeanLoss as MeanLoss
from lightning_flatlora.flatness.losses import loss_gradient as loss_gradient
from lightning_flatlora.flatness.measures import DEFAULT_MEASURES as DEFAULT_MEASURES
from lightning_flatlora.flatness.measures import MEASURES as MEASURES
from lightning_flatlora.flatness.measures import Point as Point
from lightning_flatlora.flatness.measures import measure as measure
from lightning_flatlora.flatness.sharpness import EMASharpness as EMASharpness
from lightning_flatlora.flatness.sharpness import Sharpness as Sharpness
from lightning_flatlora.flatness.sharpness import critical_sharpness as critical_sharpness
from lightning_flatlora.flatness.sharpness import ema_sharpness as ema_sharpness
from lightning_flatlora.flatness.sharpness import expected_sharpness as expected_sharpness
from lightning_flatlora.flatness.sharpness import fresh_perturbation as fresh_perturbation
from lightning_flatlora.flatness.sharpness import lora_sharpness as lora_sharpness
from lightning_flatlora.flatness.sharpness import moved as moved
from lightning_flatlora.flatness.sharpness import sam_sharpness as sam_sharpness
from lightning_flatlora.functional import joint_ascent as joint_ascent
from lightning_flatlora.pairs.lora_pair import trained_factors as trained_factors
