"""Equations on a LoRA layer's factors that relate to flatness: tensors in, tensors out, batched over layers.

Notation as in :mod:`lightning_flatlora.functional`: ``W = W0 + s B A`` with ``B``, shape (L, n, r), and ``A``, shape
(L, r, m), where L means any leading dimensions. A perturbation ``E`` of B, of B's shape, moves W by ``s E A``;
``scaling`` is s, a number or of shape (L,). Results have the shape (L,). Inner products of n x m matrices go through r
x r Gram matrices, in float64 if the device has it; no n x m matrix is formed, and no pass is needed.
"""

import torch
from torch import Tensor


def balancedness(A: Tensor, B: Tensor) -> Tensor:
    r"""Compute how much more of the update's size lies in B than in A (Theorem 1 of arXiv 2508.00522).

    .. math:: \tfrac12\left(\|B\|_F^2 - \|A\|_F^2\right)

    Gradient flow leaves it constant. A perturbed flow changes it by at most rho / s times a ratio of norms, per unit of
    time.

    Returns:
        Squared units of the weights.

    Example:
        >>> balancedness(A=torch.eye(2, 3), B=torch.ones(4, 2))
        tensor(3., dtype=torch.float64)
    """
    return (_widest(B).square().sum((-2, -1)) - _widest(A).square().sum((-2, -1))) / 2


def condition_number(X: Tensor) -> Tensor:
    r"""Divide the largest by the smallest singular value of a factor; the paper reports about 3 for A and B.

    .. math:: \sigma_{\max}(X) / \sigma_{\min}(X)

    Infinite if X has full rank only through rounding, that is, if
    :math:`\sigma_{\min} \le \epsilon\,\sqrt{\min(\text{rows}, \text{columns})}\,\sigma_{\max}` with the epsilon of X's
    dtype; this includes X = 0 (B at the start). nan if X is not finite.

    Args:
        X: A or B, shape (L, rows, columns).

    Returns:
        A number >= 1 without a unit.

    Example:
        >>> condition_number(torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))
        tensor([3., inf], dtype=torch.float64)
    """
    finite = X.isfinite().all(-1).all(-1)
    # svdvals raises an error for values that are not finite, so these are replaced first.
    values = torch.linalg.svdvals(_widest(X).where(finite[..., None, None], 0.0))
    largest, smallest = values[..., 0], values[..., -1]
    rounding = torch.finfo(X.dtype).eps * min(X.shape[-2:]) ** 0.5 * largest
    return torch.where(smallest > rounding, largest / smallest, torch.inf).where(finite, torch.nan)


def inner_product(E1: Tensor, E2: Tensor, A: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    r"""Compute the inner product of two perturbations in full weight space.

    .. math:: \langle s E_1 A,\; s E_2 A\rangle = s^2\,\mathrm{tr}\left(E_1^\top E_2\, A A^\top\right)

    Returns:
        Squared units of the weights.

    Example:
        >>> inner_product(torch.ones(4, 2), torch.ones(4, 2), torch.eye(2, 3), scaling=2.0)
        tensor(32., dtype=torch.float64)
    """
    E1, E2, A = _widest(E1), _widest(E2), _widest(A)
    return scaling**2 * ((E1.mT @ E2) * (A @ A.mT)).sum((-2, -1))


def realized_radius(E: Tensor, A: Tensor, scaling: float | Tensor) -> Tensor:
    r"""Compute how far a perturbation of B moves the full weight.

    .. math:: \|s E A\|_F = s\,\sqrt{\mathrm{tr}\left(E^\top E\, A A^\top\right)}

    It is at most rho: for one layer and, as the root of the sum of squares, for all layers of a global ball. The
    "projected" estimator always reaches rho; with B = 0 both estimators do.

    Returns:
        Units of the weights.

    Example:
        >>> realized_radius(torch.ones(4, 2), torch.eye(2, 3), scaling=2.0)
        tensor(5.6569, dtype=torch.float64)
    """
    return inner_product(E, E, A, scaling).clamp_min(0).sqrt()


def cosine(E1: Tensor, E2: Tensor, A: Tensor) -> Tensor:
    r"""Compute the cosine between two perturbations of a layer in full weight space, such as Ê and E (Theorem 2).

    .. math:: \frac{\langle s E_1 A, s E_2 A\rangle}{\|s E_1 A\|_F\,\|s E_2 A\|_F}

    0 if one of them is zero, such as Ê before the first refresh; nan if one is not finite.

    Returns:
        A number in [-1, 1].

    Example:
        >>> cosine(torch.ones(4, 2), -torch.ones(4, 2), torch.eye(2, 3)).round(decimals=6)
        tensor(-1., dtype=torch.float64)
    """
    return cosine_of(inner_product(E1, E2, A), inner_product(E1, E1, A), inner_product(E2, E2, A))


def cosine_of(product: Tensor, square1: Tensor, square2: Tensor) -> Tensor:
    """Compute the cosine from an inner product and two squared norms, of any shape; 0 if a norm is 0.

    Example:
        >>> cosine_of(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0]), torch.tensor([1.0, 1.0]))
        tensor([0.5000, 0.0000])
    """
    norms = square1.clamp_min(0).sqrt() * square2.clamp_min(0).sqrt()
    return torch.where(norms == 0, 0.0, product / norms).clamp(-1, 1)


def gradient_identity_residual(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor) -> Tensor:
    r"""Measure how far the two gradients of a pair are from belonging to one product s B A.

    .. math:: \frac{\|B^\top G_B - G_A A^\top\|_F}{\|B^\top G_B\|_F + \|G_A A^\top\|_F}

    Both sides are :math:`s B^\top G A^\top`, so the residual is rounding error, unless a factor is also used in another
    product or the gradients were taken at other weights. It is 0 if both sides are 0 (B = 0), and nan if a gradient is
    not finite.

    Args:
        A: at the point at which the gradients were taken, like B.
        B: see A.
        grad_A: of A's shape.
        grad_B: of B's shape.

    Returns:
        A number in [0, 1].

    Example:
        >>> A, B, G = torch.ones(2, 3), torch.ones(4, 2), torch.ones(4, 3)
        >>> gradient_identity_residual(A, B, grad_A=B.T @ G, grad_B=G @ A.T)
        tensor(0., dtype=torch.float64)
    """
    left, right = _widest(B).mT @ _widest(grad_B), _widest(grad_A) @ _widest(A).mT
    size = torch.linalg.matrix_norm(left) + torch.linalg.matrix_norm(right)
    return torch.where(size == 0, 0.0, torch.linalg.matrix_norm(left - right) / size)


def _widest(X: Tensor) -> Tensor:
    # MPS has no float64.
    return X.float() if X.device.type == "mps" else X.double()
