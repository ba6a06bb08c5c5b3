"""What logits are worth: loss, accuracy and calibration, with a temperature of 1 and with a fitted one."""

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

_BINS = 15
_TEMPERATURES = (1e-2, 1e3)  # between which the fitted one lies


def scores(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> dict[str, float]:
    """Of logits (n, classes) and labels (n,).

    Returns:
        ``loss`` (nats), ``accuracy``, ``ece``, the expected calibration error of the highest probability over 15 equal
        bins (both in [0, 1]), and ``brier``, the squared distance of the probabilities from the truth (in [0, 2]).

    Example:
        >>> scores(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))["brier"]
        0.5
    """
    # In float64, so that rounding stays far below the differences between methods that are to be judged.
    logits = logits.double() / temperature
    probabilities = logits.softmax(dim=1)
    classes = logits.shape[1]
    truth = nn.functional.one_hot(labels, classes)
    ece = multiclass_calibration_error(probabilities, labels, classes, n_bins=_BINS, validate_args=False)
    return {
        "loss": float(nn.functional.cross_entropy(logits, labels)),
        "accuracy": float((logits.argmax(dim=1) == labels).double().mean()),
        "ece": float(ece),
        "brier": float((probabilities - truth).square().sum(dim=1).mean()),
    }


def both_scores(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, float]:
    """The :func:`scores` at a temperature of 1, and those that another one changes, followed by ``_scaled``."""
    scaled = scores(logits, labels, temperature)
    return scores(logits, labels) | {f"{name}_scaled": scaled[name] for name in ("loss", "ece", "brier")}


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature at which these logits have the lowest loss (arXiv 1706.04599), between 0.01 and 1,000."""

    def loss(log_temperature: float) -> float:
        return float(nn.functional.cross_entropy(logits.double() / math.exp(log_temperature), labels))

    bounds = [math.log(bound) for bound in _TEMPERATURES]
    # Bounded, since logits that are right everywhere have their lowest loss at 0.
    found = minimize_scalar(loss, bounds=bounds, method="bounded")
    return math.exp(float(found.x))


def linear_probe(
    features: Tensor, labels: Tensor, validation: tuple[Tensor, Tensor], classes: int
) -> tuple[nn.Linear, float]:
    """A linear classifier on fixed features, by L-BFGS; its L2 penalty is the one with the lowest validation loss.

    Args:
        features: (n, d).
        labels: (n,).
        validation: features and labels to choose the penalty on.
        classes: their number.

    Returns:
        The classifier and the penalty.
    """
    chosen: tuple[float, nn.Linear, float] | None = None
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1):
        probe = _fitted(features, labels, classes, penalty)
        with torch.no_grad():
            loss = float(nn.functional.cross_entropy(probe(validation[0]), validation[1]))
        if chosen is None or loss < chosen[0]:
            chosen = (loss, probe, penalty)
    assert chosen is not None
    return chosen[1], chosen[2]


def _fitted(features: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Linear:
    probe = nn.Linear(features.shape[1], classes, dtype=features.dtype)
    # The problem is convex: from zeros, the result does not depend on a seed.
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(probe(features), labels) + penalty * probe.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return probe
