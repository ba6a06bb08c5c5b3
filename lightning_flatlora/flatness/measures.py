"""Take several measures at one point, which share the loss and its gradient."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_flatlora.flatness import sharpness
from lightning_flatlora.flatness.curvature import hessian_trace, top_eigenvalue
from lightning_flatlora.flatness.factors import balancedness, condition_number, gradient_identity_residual
from lightning_flatlora.flatness.losses import Loss, LossGradient, loss_gradient
from lightning_flatlora.full_weight import WeightNoise
from lightning_flatlora.pairs.lora_pair import LoRAPair, readers_of, rows_of, trained_factors
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.perturbed_read import clean

Values = dict[str, Tensor]
"""By name: a number, shape (), or one per pair, shape (pairs,)."""


@dataclass
class Point:
    """A loss around a model's current weights, and the settings of its measurement.

    Attributes:
        loss: mean loss of fixed batches.
        perturbation: the pairs, and how E is computed.
        rho: radius of E, in the weights' units; for "lora_sharpness" in the factors' units.
        average: a perturbation that keeps Ê, such as ``EFMLoRA.perturbation``; for "ema".
        average_rho: radius of the fresh E to compare Ê with; None takes rho.
        noise: the noise of "expected_sharpness".
        sigma: size of the noise relative to the rows' norms.
        samples: draws of noise, and of vectors for "hessian_trace".
        seed: random seed of these draws, and of the first vector of "top_eigenvalue".
        at: the loss and its gradient at the clean weights, if already known.
        loss_scale: see :func:`loss_gradient`.

    The example of :func:`measure` makes one.
    """

    loss: Loss
    perturbation: Perturbation
    rho: float
    average: Perturbation | None = None
    average_rho: float | None = None
    noise: WeightNoise | None = None
    sigma: float = 0.05
    samples: int = 8
    seed: int = 0
    at: LossGradient | None = None
    loss_scale: float = 1.0

    @property
    def pairs(self) -> list[LoRAPair]:
        """The pairs of the perturbation."""
        return self.perturbation.pairs

    @cached_property
    def gradient(self) -> LossGradient:
        """The loss and its gradient at the clean weights, computed when first needed."""
        return self.at or loss_gradient(self.loss, trained_factors(self.pairs), self.loss_scale)


def measure(point: Point, measures: Iterable[str], per_layer: bool = False) -> Values:
    """Take several measures at a point.

    The gradient is taken once: "sharpness", "lora_sharpness", "ema", "radius", "gradient_residual" and
    "critical_sharpness" share a forward and a backward pass. Beyond it "sharpness" and "lora_sharpness" cost one
    forward pass, "ema" two. "balancedness" and "condition" cost none, the others as much as their functions.

    Args:
        point: the loss, the weights and the settings.
        measures: names in :data:`MEASURES`.
        per_layer: also return the values of each pair, under ``name/pair``.

    Returns:
        Numbers by name, shape (). Over the layers these are the mean balancedness, the median condition numbers (a
        single infinite one would make the mean infinite), and the largest residual.

    Raises:
        ValueError: an unknown name, a measure whose setting the point lacks, or a loss that :func:`loss_gradient`
            refuses.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora import find_pairs
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> loss = lambda: model(torch.ones(5, 4)).square().mean()
        >>> point = Point(loss, Perturbation(find_pairs(model).pairs), rho=0.05)
        >>> sorted(measure(point, ["sharpness", "condition", "radius"]))
        ['condition_A', 'condition_B', 'loss', 'radius', 'sharpness']
    """
    measures = measures if isinstance(measures, str) else list(measures)
    problems = measure_problems(measures)
    if problems:
        raise ValueError("; ".join(problems))
    result: Values = {}
    # With EFMLoRA the layers would otherwise read B + Ê.
    with clean(readers_of(point.pairs)):
        for measure_name in measures:
            for name, value in MEASURES[measure_name](point).items():
                result[name] = _OVER_LAYERS[name](value) if value.ndim else value
                if per_layer and value.ndim:
                    result |= {f"{name}/{pair.name}": one for pair, one in zip(point.pairs, value, strict=True)}
    return result


def _sharpness(point: Point) -> Values:
    sharp = sharpness.sam_sharpness(point.loss, point.perturbation, point.rho, point.gradient)
    return {"loss": sharp.loss, "sharpness": sharp.sharpness}


def _lora_sharpness(point: Point) -> Values:
    sharp = sharpness.lora_sharpness(point.loss, point.pairs, point.rho, point.gradient)
    return {"loss": sharp.loss, "lora_sharpness": sharp.sharpness}


def _ema(point: Point) -> Values:
    if point.average is None:
        raise ValueError("the measure 'ema' needs Point.average, a Perturbation that keeps Ê")
    rho = point.rho if point.average_rho is None else point.average_rho
    ema = sharpness.ema_sharpness(point.loss, point.average, rho, point.gradient)
    return {"ema_sharpness": ema.ema, "ema_gap": ema.gap, "ema_cosine": ema.cosine}


def _expected_sharpness(point: Point) -> Values:
    if point.noise is None:
        raise ValueError("the measure 'expected_sharpness' needs Point.noise, a WeightNoise")
    expected = sharpness.expected_sharpness(point.loss, point.noise, point.sigma, point.samples, point.seed)
    return {"expected_sharpness": expected.sharpness, "expected_sharpness_error": expected.standard_error}


def _balancedness(point: Point) -> Values:
    return {"balancedness": torch.stack([balancedness(*pair.matrices()).mean() for pair in point.pairs])}


def _condition(point: Point) -> Values:
    factors = [pair.matrices() for pair in point.pairs]
    of_A = torch.stack([condition_number(A).median() for A, _ in factors])
    of_B = torch.stack([condition_number(B).median() for _, B in factors])
    return {"condition_A": of_A, "condition_B": of_B}


def _radius(point: Point) -> Values:
    fresh = sharpness.fresh_perturbation(point.perturbation, point.rho, point.gradient)
    E = sharpness.read(point.perturbation, fresh)
    realized = sharpness.overlaps(point.pairs, E, E).clamp_min(0).sqrt().where(fresh.finite, torch.nan)
    return {"radius": realized / point.rho if point.rho > 0 else realized}


def _gradient_residual(point: Point) -> Values:
    residuals = []
    for pair in point.pairs:
        # Without a second gradient, nothing could differ.
        residual = torch.zeros((), dtype=torch.float64, device=pair.B.device)
        # A pair rests once its B is frozen in mid-fit.
        if pair.learns_A and pair.B.requires_grad:
            grad_A = rows_of(point.gradient.of(pair.A), pair.A_rows).flatten(1)
            grad_B = rows_of(point.gradient.of(pair.B), pair.B_rows).flatten(1)
            residual = gradient_identity_residual(*pair.matrices(), *pair.products(grad_A, grad_B)).max()
        residuals.append(residual)
    return {"gradient_residual": torch.stack(residuals)}


def _top_eigenvalue(point: Point) -> Values:
    return {"top_eigenvalue": top_eigenvalue(point.loss, trained_factors(point.pairs), seed=point.seed)}


def _critical_sharpness(point: Point) -> Values:
    return {"critical_sharpness": sharpness.critical_sharpness(point.loss, point.gradient)}


def _hessian_trace(point: Point) -> Values:
    trace = hessian_trace(point.loss, trained_factors(point.pairs), point.samples, point.seed)
    return {"hessian_trace": trace.mean, "hessian_trace_error": trace.standard_error}


MEASURES: dict[str, Callable[[Point], Values]] = {
    "sharpness": _sharpness,
    "lora_sharpness": _lora_sharpness,
    "ema": _ema,
    "expected_sharpness": _expected_sharpness,
    "balancedness": _balancedness,
    "condition": _condition,
    "radius": _radius,
    "gradient_residual": _gradient_residual,
    "top_eigenvalue": _top_eigenvalue,
    "critical_sharpness": _critical_sharpness,
    "hessian_trace": _hessian_trace,
}
"""All measures by name, as the monitor and the report take them."""

DEFAULT_MEASURES = ("sharpness", "lora_sharpness", "balancedness", "condition", "radius")
"""Four passes in all: forward, backward, two forwards."""

_OVER_LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "balancedness": torch.mean,
    # The median, since a single layer of deficient rank makes the mean infinite. Of an even number of layers PyTorch
    # takes the lower of the middle two.
    "condition_A": torch.median,
    "condition_B": torch.median,
    "radius": torch.linalg.vector_norm,
    "gradient_residual": torch.amax,
}


def measure_problems(measures: object) -> list[str]:
    """List what is wrong with a choice of measures; None, the default choice, is right."""
    if measures is None:
        return []
    if isinstance(measures, str) or not isinstance(measures, Sequence) or not measures:
        return [f"measures must be None or a list of names among {', '.join(MEASURES)}, got {measures!r}"]
    unknown = [name for name in measures if name not in MEASURES]
    problems = [f"measures holds {name!r}, which is not one of {', '.join(MEASURES)}" for name in unknown]
    if "top_eigenvalue" in measures and find_spec("scipy") is None:
        problems.append("the measure 'top_eigenvalue' needs scipy: pip install 'lightning-flatlora[flatness]'")
    return problems
