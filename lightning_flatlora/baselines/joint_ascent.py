"""SAM's perturbation along a gradient, of any parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def joint_ascent(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    r"""Compute SAM's perturbation of several parameters at once.

    .. math:: E_i = \rho\, \frac{G_i}{\lVert (G_1, G_2, \dots) \rVert_F}

    Args:
        gradients: of any shapes.
        rho: radius of the ball over all of them, in the parameters' units.

    Returns:
        The perturbations, in float32 or wider; zero if the gradient is zero, and all zero if one is not finite.
        The host does not wait.

    Source: Foret et al., arXiv 2010.01412, Eq. 2 with p = 2.

    Example:
        >>> joint_ascent([torch.tensor([3.0]), torch.tensor([0.0, 4.0])], rho=0.5)
        [tensor([0.3000]), tensor([0.0000, 0.4000])]
    """
    wide = []
    for gradient in gradients:
        # An embedding's may be sparse.
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        # In float32 at least, since the squares of a 16-bit gradient may over- or underflow.
        wide.append(dense.to(torch.promote_types(dense.dtype, torch.float32)))
    norm = nn.utils.get_total_norm(wide)
    scale = torch.where(norm > 0, rho / norm, 0.0)
    bad = ~torch.isfinite(norm)
    perturbations = []
    for gradient in wide:
        E = gradient * scale.to(gradient.device, gradient.dtype)
        perturbations.append(E.masked_fill_(bad.to(gradient.device), 0.0))
    return perturbations
