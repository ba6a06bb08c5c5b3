"""The paper's equations as pure functions: tensors in, tensors out, batched over layers of one shape.

Notation (arXiv 2508.00522): a LoRA layer's weight is ``W = W0 + s B A`` with ``W0`` of shape (n, m), ``B`` (n, r),
``A`` (r, m) and ``s`` the LoRA scaling. ``G = dL/dW`` is never formed: LoRA gives ``grad_B = s G A^T`` (n, r) and
``grad_A = s B^T G`` (r, m), and everything below is expressed by these and the r x r Gram matrices ``K_A = A A^T``,
``K_B = B^T B``. Leading dimensions (written L) batch over layers. No function here makes an (n, m) tensor, moves data
to the host, or keeps state.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Estimator = Literal["average", "projected"]
NormScope = Literal["global", "layer"]

DAMPING = 1e-6
"""delta of :func:`damped_inverse_root`, relative to the trace."""


class Ascent(NamedTuple):
    """A layer's part of the ascent, before the norm over all layers is known.

    Attributes:
        direction: ``(1/s) G_hat A⁺``, shape (L, n, r); Eq. 15 without its factor rho / ||G_hat||.
        squared_norm: ``||G_hat||_F^2`` of the estimated full gradient, shape (L,).
    """

    direction: Tensor
    squared_norm: Tensor


def damped_inverse_root(X: Tensor) -> Tensor:
    r"""Compute a square root of the damped inverse that replaces the pseudo-inverse of a factor's Gram matrix.

    .. math:: K = X^\top X,\qquad K^+ = (K + \delta\,\mathrm{tr}(K)\,I)^{-1} = R^\top R,\qquad \delta = 10^{-6}

    The paper's pseudo-inverse jumps when the rank changes, and Adam's first update makes the columns of B parallel, so
    the literal definition would depend on rounding. The damped one is smooth. The damping is at least the smallest
    normal number of the factor's dtype, so ``X = 0`` (B at the start) needs no branch: R is large but finite, and only
    ever multiplied by zeros. In float32, applying R twice is far more accurate than applying K⁺ once, and the Gram
    matrix, its Cholesky factor and that factor's inverse are computed in float64 if the device has it. Together they
    keep float32 accurate to 1e-5 for any condition of B. Cholesky's error code is not read, so the host does not wait.

    Args:
        X: a factor with r columns, shape (..., k, r), float32 or float64.

    Returns:
        R, lower triangular, shape (..., r, r), in the dtype of X.

    Example:
        >>> R = damped_inverse_root(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
        >>> (R.mT @ R).round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    return _root_and_damping(X)[0].to(X.dtype)


def _root_and_damping(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return R of :func:`damped_inverse_root` and the damping of the Gram matrix, in float64 if the device has it."""
    wide_X = X if X.device.type == "mps" else X.double()
    gram = wide_X.mT @ wide_X
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    damping = (DAMPING * diagonal.sum(-1, keepdim=True)).clamp_min(torch.finfo(X.dtype).tiny)
    diagonal += damping
    identity = torch.eye(X.shape[-1], dtype=gram.dtype, device=gram.device)
    root = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, identity.expand_as(gram), upper=False)
    return root, damping[..., None]


def pseudo_inverse_roots(A: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return two factors of the damped pseudo-inverse of A's Gram matrix, which is 0 if the rows of A are dependent.

    .. math:: S_A R_A = K_A^+ K_A K_A^+,\qquad K_A^+ = R_A^\top R_A,\qquad
        S_A = K_A^+ K_A R_A^\top = R_A^\top (I - d\, R_A R_A^\top),\qquad d = \delta\,\mathrm{tr}(K_A)

    For a true pseudo-inverse :math:`K^+ K K^+ = K^+`. The damped inverse itself is 1/d in the null space of K, which
    exists if A has more rows than columns. There B's gradient is only rounding error, and E would be this error,
    enlarged a million times. It would not show in the weight s E A, but in the gradient of A.

    Args:
        A: shape (..., r, m), float32 or float64.

    Returns:
        S_A and R_A, both of shape (..., r, r), R_A lower triangular.

    Example:
        >>> S, R = pseudo_inverse_roots(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
        >>> (S @ R).round(decimals=3).abs()
        tensor([[0.2500, 0.2500, 0.0000],
                [0.2500, 0.2500, 0.0000],
                [0.0000, 0.0000, 0.2500]])
    """
    root, damping = _root_and_damping(A.mT)
    kept = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device) - (damping * root) @ root.mT
    return (root.mT @ kept).to(A.dtype), root.to(A.dtype)


def ascent_average(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: Tensor) -> Ascent:
    r"""Compute the ascent from both of LoRA's gradients: the estimator ``"average"`` (Eqs. 10-12, 14).

    .. math::
        \bar G &= \tfrac{1}{2s}\left(G_B (A^\top)^+ + (B^\top)^+ G_A\right) = \tfrac12 (G P_A + P_B G) \\
        \bar G A^+ &= \tfrac{1}{2s}\,(I + B K_B^+ B^\top)\,G_B S_A R_A \\
        \|\bar G\|^2 &= \tfrac{1}{4s^2}\left[\|G_B S_A\|^2 + 3\,\|R_B C S_A\|^2
            + w \left(\|R_B G_A\|^2 - \|R_B C_A S_A\|^2\right)\right]

    with :math:`K_B^+ = R_B^\top R_B`, S_A and R_A from :func:`pseudo_inverse_roots`, :math:`C = B^\top G_B`,
    :math:`C_A = G_A A^\top` and

    .. math::
        w = \frac{\|R_B C S_A\|^2}{\|R_B C S_A\|^2 + \|R_B (C - C_A) S_A\|^2}

    If the loss depends on A and B only through W, then :math:`C = C_A` for gradients taken at this A and B; so w = 1,
    and this is Eq. 12. A penalty on a factor breaks the equality, and A's gradient then counts less in the square
    brackets: its part in A's row space is known from B's gradient, and the rest is trusted as far as the two agree.
    Otherwise, if B is near zero, where the loss's :math:`G_A` is also near zero, a penalty's share, of the size of
    :math:`G_A / B`, would dominate the norm. The direction comes only from B's gradient.

    Args:
        A: shape (L, r, m).
        B: shape (L, n, r), the point at which the gradients were taken.
        grad_A: shape (L, r, m).
        grad_B: shape (L, n, r).
        scaling: s of each layer, shape (L,).

    Returns:
        The :class:`Ascent` of each layer. Multiplying the loss by c multiplies ``direction`` by c.

    Example:
        >>> A, B = torch.eye(2, 3)[None], torch.zeros(1, 4, 2)
        >>> grad_B = torch.ones(1, 4, 2)
        >>> ascent_average(A, B, torch.zeros(1, 2, 3), grad_B, torch.ones(1)).squared_norm.round(decimals=3)
        tensor([2.])
    """
    first_root_A, root_A = pseudo_inverse_roots(A)
    root_B = damped_inverse_root(B)
    half = grad_B @ first_root_A
    seen_A = root_B @ grad_A
    from_B = root_B @ (B.mT @ half)
    from_A = seen_A @ A.mT @ first_root_A
    # sqrt(w) multiplies R_B G_A, not its norm: at B = 0, R_B is so large that a penalty's norm would overflow.
    agreement = _agreement(from_B, from_A)[:, None, None]
    beyond_A = _squared_norm(seen_A.mul_(agreement)) - _squared_norm(agreement * from_A)
    squares = _squared_norm(half) + 3 * _squared_norm(from_B) + beyond_A
    half.baddbmm_(B, root_B.mT @ from_B)  # (I + B K_B⁺ B^T) G_B S_A, in place: these are the largest tensors here
    direction = half @ (root_A / (2 * scaling**2)[:, None, None])
    return Ascent(direction, squares / (4 * scaling**2))


def _agreement(one: Tensor, other: Tensor) -> Tensor:
    """Compute ``||X|| / sqrt(||X||^2 + ||X - Y||^2)`` over the last two dimensions; 0 for X = 0, nan stays."""
    size = torch.linalg.vector_norm(one, dim=(-2, -1))
    whole = torch.hypot(size, torch.linalg.vector_norm(one - other, dim=(-2, -1)))
    share: Tensor = size / whole.clamp_min(torch.finfo(whole.dtype).tiny)
    return share


def ascent_projected(A: Tensor, grad_B: Tensor, scaling: Tensor) -> Ascent:
    r"""Compute the ascent from B's gradient only: the estimator ``"projected"`` (first half of Eq. 10, 14).

    .. math:: \hat G = \tfrac1s G_B (A^\top)^+ = G P_A,\qquad
        \hat G A^+ = \tfrac1s G_B S_A R_A,\qquad
        \|\hat G\|^2 = \tfrac{1}{s^2} \|G_B S_A\|^2

    It solves Eq. 14's inner problem exactly among the perturbations that B can express, and is the only possible
    estimate if A is frozen (LoRA-FA).

    Args:
        A: shape (L, r, m).
        grad_B: shape (L, n, r).
        scaling: s of each layer, shape (L,).

    Returns:
        The :class:`Ascent` of each layer.

    Example:
        >>> A = torch.eye(2, 3)[None]
        >>> ascent_projected(A, torch.ones(1, 4, 2), torch.tensor([2.0])).squared_norm.round(decimals=3)
        tensor([2.])
    """
    first_root, root = pseudo_inverse_roots(A)
    half = grad_B @ first_root
    direction = half @ (root / (scaling**2)[:, None, None])
    return Ascent(direction, _squared_norm(half) / scaling**2)


def perturbation_scale(squared_norm: Tensor, rho: float | Tensor) -> Tensor:
    r"""Compute the factor rho / ||G_hat|| of Eq. 13, zero if the gradient is zero.

    The paper's Eqs. 9 and 13 have another factor sign(g), a misprint: Eqs. 3, 16, 27 and both proofs lack it.

    Args:
        squared_norm: ``||G_hat||^2`` of the ball that shares rho, one layer's or all layers', any shape.
        rho: radius of the ball in the full weight space, in the units of the weights.

    Returns:
        The factor for :attr:`Ascent.direction`, shape of ``squared_norm``.

    Example:
        >>> perturbation_scale(torch.tensor([4.0, 0.0]), rho=0.5)
        tensor([0.2500, 0.0000])
    """
    # For a norm of 0, rsqrt gives inf, which is never chosen.
    return torch.where(squared_norm > 0, rho * squared_norm.rsqrt(), torch.zeros_like(squared_norm))


def joint_ascent(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    r"""Compute SAM's perturbation of several parameters at once.

    .. math:: E_i = \rho\, \frac{G_i}{\lVert (G_1, G_2, \dots) \rVert_F}

    Args:
        gradients: of any shapes.
        rho: radius of the ball over all of them, in the parameters' units.

    Returns:
        The perturbations, in float32 or wider; zero if the gradient is zero, and all zero if one is not finite. The
        host does not wait.

    Source: Foret et al., arXiv 2010.01412, Eq. 2 with p = 2.

    Example:
        >>> joint_ascent([torch.tensor([3.0]), torch.tensor([0.0, 4.0])], rho=0.5)
        [tensor([0.3000]), tensor([0.0000, 0.4000])]
    """
    # Dense, since an embedding's gradient may be sparse, and wide, since 16-bit squares may over- or underflow.
    dense = [wide(gradient.to_dense()) for gradient in gradients]
    norm = nn.utils.get_total_norm(dense)
    # Also 0 if the norm is not finite; only entries that are not finite themselves then give nan.
    scale = torch.where(norm > 0, rho / norm, 0.0)
    return [(gradient * scale.to(gradient.device, gradient.dtype)).nan_to_num_(0.0) for gradient in dense]


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _squared_norm(X: Tensor) -> Tensor:
    """Compute the squared Frobenius norm over the last two dimensions."""
    norm: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1))
    return norm.square()
