"""Curvature of the loss over LoRA's factors: the Hessian's largest eigenvalue and trace, by products with vectors.

Curvatures are in nats over squared units of the factors, float64. ``parameters`` are the factors theta, see
:func:`trained_factors`. A product with the Hessian takes three passes: one forward and two backward, the second of them
about twice as long. :func:`loss_gradient` lists the losses that are refused with a ValueError.
"""

from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_flatlora.flatness.losses import Loss, mean_derivative


class Estimate(NamedTuple):
    """A mean over samples and its standard error, shape () each, in the samples' unit."""

    mean: Tensor
    standard_error: Tensor


def estimate(samples: Sequence[Tensor]) -> Estimate:
    r"""Compute the mean of independent samples and its standard error, both in float64.

    .. math:: \bar x = \tfrac1k \sum_i x_i, \qquad \mathrm{se} = \sqrt{\tfrac{1}{k(k-1)} \sum_i (x_i - \bar x)^2}

    Args:
        samples: k of them, at least one, shape () each. The standard error of a single one is nan.

    Example:
        >>> estimate(list(torch.tensor([1.0, 2.0, 3.0])))
        Estimate(mean=tensor(2., dtype=torch.float64), standard_error=tensor(0.5774, dtype=torch.float64))
    """
    if not samples:
        raise ValueError("a mean needs at least one sample: set samples to 1 or more")
    values = torch.stack(list(samples)).detach().double()
    spread = values.std(correction=1) if len(values) > 1 else values.new_tensor(torch.nan)
    return Estimate(values.mean(), spread / len(values) ** 0.5)


def hessian_product(loss: Loss, parameters: Sequence[nn.Parameter], vector: Sequence[Tensor]) -> list[Tensor]:
    r"""Compute the product of the Hessian with a vector, by a backward pass through the backward pass.

    .. math:: H v = \nabla_\theta \langle \nabla_\theta L,\; v\rangle

    Attention runs in its plain form, without fused kernels.

    Args:
        loss: mean loss of fixed batches.
        parameters: at least one.
        vector: v, of the parameters' shapes.

    Returns:
        H v, of the parameters' shapes, nan if the loss is not finite.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> hessian_product(lambda: w.pow(3).sum(), [w], [torch.tensor([1.0, 0.0])])
        [tensor([6., 0.])]
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError("parameters must hold at least one")
    options: Any = {"allow_unused": True, "materialize_grads": True}

    def product(loss: Tensor) -> Sequence[Tensor]:
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, **options)
        along = torch.stack([(g * v).sum() for g, v in zip(gradients, vector, strict=True)]).sum()
        if along.requires_grad:
            return torch.autograd.grad(along, parameters, **options)
        # The loss is linear.
        return [torch.zeros_like(parameter) for parameter in parameters]

    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        _, products = mean_derivative(loss, parameters, product)
    return products


def top_eigenvalue(
    loss: Loss, parameters: Sequence[nn.Parameter], tolerance: float = 1e-2, restarts: int = 10, seed: int = 0
) -> Tensor:
    r"""Compute the largest eigenvalue of the Hessian over LoRA's factors: the sharpest direction's curvature.

    .. math:: \lambda_{\max} = \max_{\|v\| = 1} v^\top H v

    It runs ARPACK's restarted Lanczos method, from scipy. Memory: 20 vectors of the factors' size in float64 on the
    CPU.

    Args:
        loss: mean loss of fixed batches.
        parameters: with at least two numbers in all.
        tolerance: residual relative to the eigenvalue at which the method stops. If many eigenvalues lie close to the
            largest one, its relative error can be a little larger.
        restarts: limit of iterations; the first takes up to 20 products with the Hessian, each later one up to 19.
        seed: random seed of the first vector.

    Returns:
        Shape (); nan if it has not converged or a product with the Hessian is not finite. About 20 (restarts: up to
        200) products.

    Raises:
        ImportError: scipy is missing.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> top_eigenvalue(lambda: (torch.tensor([1.0, 5.0, 2.0]) * w.square()).sum() / 2, [w]).round(decimals=3)
        tensor(5., dtype=torch.float64)
    """
    try:
        from scipy.sparse import linalg
    except ImportError as error:
        raise ImportError(
            "top_eigenvalue needs scipy: pip install 'lightning-flatlora[flatness]', or use hessian_trace"
        ) from error
    parameters = list(parameters)
    size = sum(parameter.numel() for parameter in parameters)
    if size < 2:
        raise ValueError(f"top_eigenvalue needs parameters with at least two numbers in all, got {size}")
    norms: list[float] = []

    def matvec(x: Any) -> Any:
        product = hessian_product(loss, parameters, _split(torch.as_tensor(x).flatten(), parameters))
        flat = torch.cat([part.flatten().double().cpu() for part in product])
        norms.append(float(flat.norm()))
        # ARPACK itself would raise this, but only after LAPACK has printed to the screen.
        if not isfinite(norms[-1]):
            raise linalg.ArpackError(-9999)
        return flat.numpy()

    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    hessian = linalg.LinearOperator((size, size), matvec=matvec, dtype=start.dtype)
    limits: Any = {"ncv": min(size, 20), "maxiter": restarts, "tol": tolerance}
    try:
        eigenvalues = linalg.eigsh(hessian, k=1, which="LA", v0=start, return_eigenvectors=False, **limits)
    except linalg.ArpackError:  # also raised if every product is zero
        eigenvalues = [0.0 if set(norms) == {0.0} else torch.nan]
    return torch.tensor(float(eigenvalues[0]), dtype=torch.float64)


def hessian_trace(loss: Loss, parameters: Sequence[nn.Parameter], samples: int = 8, seed: int = 0) -> Estimate:
    r"""Estimate the trace of the Hessian over LoRA's factors, the sum of all curvatures, by Hutchinson's method.

    .. math:: \mathrm{tr}\,H = \mathbb E_v\,[v^\top H v], \qquad v_i = \pm 1 \text{ with equal chances}

    Args:
        loss: mean loss of fixed batches.
        parameters: at least one.
        samples: draws of v, each with one product with the Hessian; at least 2 for a standard error.
        seed: random seed of the draws.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> hessian_trace(lambda: w.square().sum(), [w], samples=4)  # exact if the Hessian is diagonal
        Estimate(mean=tensor(4., dtype=torch.float64), standard_error=tensor(0., dtype=torch.float64))
    """
    parameters = list(parameters)
    generator = torch.Generator().manual_seed(seed)
    traces = []
    size = sum(parameter.numel() for parameter in parameters)
    for _ in range(samples):
        vector = _split(torch.randint(0, 2, (size,), generator=generator) * 2 - 1, parameters)
        product = hessian_product(loss, parameters, vector)
        products = [(v.double() * p.double()).sum().cpu() for v, p in zip(vector, product, strict=True)]
        traces.append(torch.stack(products).sum())
    return estimate(traces)


def _split(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Cut a flat vector into tensors like the parameters."""
    pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
    return [piece.view(p.shape).to(p.device, p.dtype) for piece, p in zip(pieces, parameters, strict=True)]
