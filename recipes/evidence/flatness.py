"""How steep and how curved the loss is around kept adapters, in the subspaces of B, of A, and in the full weights."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatlora.flatness import LossGradient, MeanLoss, hessian_trace, joint_ascent, loss_gradient, moved
from lightning_flatlora.flatness.losses import Loss, value
from recipes.evidence.data import Batch
from recipes.evidence.kept import Kept, restored
from recipes.evidence.module import ShotsClassifier
from recipes.evidence.run import batches_of, encoder_of, surroundings, training_batches
from recipes.shared.ledger import Row

RESULTS = "flatness.jsonl"
RADII = (0.5, 4.0, 32.0)
SUBSPACES = {"B": "B's subspace", "A": "A's subspace", "both": "both", "full": "the full weights"}
"""Of the adapted layers' weights; by the names in the rows."""
PARTS = ("train", "validation")
_SAMPLES = 1  # of Hutchinson's estimator: its noise is small, and a part of the spread over the seeds


class Ball(NamedTuple):
    """Of moves of the full weights, perhaps only in a subspace.

    Attributes:
        weights: that move.
        steepest: the gradient's projection on the subspace, of the weights' shapes.
    """

    weights: list[nn.Parameter]
    steepest: list[Tensor]

    def moves(self, rho: float) -> list[Tensor]:
        """Where the loss rises most, to first order, among moves whose Frobenius norm over all layers is rho."""
        return joint_ascent(self.steepest, rho)

    def norm(self) -> float:
        """Of the projected gradient, the first-order rise for each unit of the radius."""
        return float(nn.utils.get_total_norm(self.steepest))


def judge(kept: Kept, folder: Path) -> Row:
    """Losses, gradients, rises and curvatures at the kept weights, without dropout, in float32.

    Returns:
        A JSON line: the run's key; ``adapter_norm``, ||s B A||, ``frozen_norm``, ||W0||, and ``head_norm``, each over
        all adapted layers together; ``train`` (the examples trained on) and ``validation``, what :func:`measured`
        gives; ``seconds``, ``processor_seconds``, ``device``, ``commit`` and versions.
    """
    began, processor = time.perf_counter(), time.process_time()
    encoder = encoder_of(kept.run.settings)
    batches = {"train": training_batches(kept.run, encoder), "validation": batches_of(kept.run, encoder, "validation")}
    data = kept.run.settings["data"]
    row = kept.key() | _norms(restored(kept, folder)[data])
    for part in PARTS:
        # Anew, since measuring the curvature splits s B A into other factors.
        row[part] = measured(restored(kept, folder)[data], batches[part])
    seconds = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - processor}
    return row | seconds | surroundings()


def measured(module: ShotsClassifier, batches: Sequence[Batch]) -> dict[str, Any]:
    """What the loss of some examples is like around a module's weights, which are afterwards split otherwise.

    Returns:
        ``loss`` in nats; ``gradient``, by subspace of :data:`SUBSPACES`, the norm of the gradient's projection, and
        that of the head's gradient; ``rise``, by subspace and radius, L(w + move) - L(w) for the steepest move, and for
        "random" the mean over a Gaussian direction of the full weights and its opposite; ``trace``, of the Hessian in
        the subspaces of B and A and in the full weights, in nats over squared units of the weights; ``inputs``, the
        :func:`seen_shares`.
    """
    module.eval()
    loss = mean_loss(module, batches)
    layers = module.adapted_layers
    weights = frozen_weights(layers)
    head = list(module.head.parameters())
    at = loss_gradient(loss, [*weights, *head])
    found: dict[str, Any] = {"loss": float(at.loss), "gradient": {}, "rise": {}}
    found["inputs"] = seen_shares(module, batches)
    for name, ball in balls(layers, at).items():
        found["gradient"][name] = ball.norm()
        found["rise"][name] = {f"{rho:g}": _rise(loss, at, ball, rho) for rho in RADII}
    found["gradient"]["head"] = float(nn.utils.get_total_norm([at.of(parameter) for parameter in head]))
    there = _random_ball(weights)
    back = Ball(weights, [-direction for direction in there.steepest])
    # With the opposite, because otherwise the slope along the direction hides the curvature at small radii.
    found["rise"]["random"] = {
        f"{rho:g}": (_rise(loss, at, there, rho) + _rise(loss, at, back, rho)) / 2 for rho in RADII
    }
    traces = {"full": hessian_trace(loss, weights, _SAMPLES)}
    for name in ("A", "B"):
        traces[name] = hessian_trace(loss, in_weight_units(layers, name), _SAMPLES)
    found["trace"] = {name: float(trace.mean) for name, trace in traces.items()}
    return found


def mean_loss(module: ShotsClassifier, batches: Sequence[Batch]) -> MeanLoss:
    """The cross-entropy as a mean over the examples, whose last batch may be a smaller one."""
    examples = sum(len(batch["labels"]) for batch in batches)

    def part(batch: Batch) -> Loss:
        weight = len(batch["labels"]) * len(batches) / examples
        return lambda: weight * nn.functional.cross_entropy(module.logits(batch), batch["labels"])

    return MeanLoss([part(batch) for batch in batches])


@torch.no_grad()
def seen_shares(module: ShotsClassifier, batches: Sequence[Batch]) -> list[float]:
    """Of each adapted layer's inputs the share that A reads: ||P_A x||^2 / ||x||^2, both summed over all tokens.

    A move of B changes nothing else: s E A x is s E A P_A x.
    """
    layers, inputs = module.adapted_layers, {}

    def keep(layer: nn.Module, arguments: tuple[Tensor]) -> None:
        inputs[layer] = arguments[0]

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    seen, whole = torch.zeros(len(layers)), torch.zeros(len(layers))
    for batch in batches:
        module.logits(batch)
        for place, layer in enumerate(layers):
            x = inputs[layer][batch["owners"] >= 0]
            seen[place] += (x @ _bases(layer)[1].to(x.dtype)).square().sum()
            whole[place] += x.square().sum()
    for hook in hooks:
        hook.remove()
    shares: list[float] = (seen / whole).tolist()
    return shares


def frozen_weights(layers: Sequence[Any]) -> list[nn.Parameter]:
    """W0 (n, m) of each layer, by which gradients can be taken from now on: they are those of W."""
    return [layer.get_base_layer().weight.requires_grad_() for layer in layers]


def balls(layers: Sequence[Any], at: LossGradient) -> dict[str, Ball]:
    r"""The ball in each of :data:`SUBSPACES`.

    With :math:`P_A` and :math:`P_B`, the projectors on A's rows and on B's columns, a gradient G of a layer's W gives

    .. math:: G P_A \text{ (moves } s E A\text{)}, \quad P_B G \text{ (moves } s B F\text{)}, \quad
        G - (I - P_B)\, G\, (I - P_A) \text{ (moves } s E A + s B F\text{)}

    Args:
        layers: the adapted ones.
        at: with the gradients of their frozen weights.
    """
    weights = frozen_weights(layers)
    steepest: dict[str, list[Tensor]] = {name: [] for name in SUBSPACES}
    for layer, weight in zip(layers, weights, strict=True):
        G = at.of(weight)
        P, Q = (basis.to(G.dtype) for basis in _bases(layer))
        of_B = G @ Q @ Q.mT
        of_A = P @ (P.mT @ G)
        steepest["B"].append(of_B)
        steepest["A"].append(of_A)
        steepest["both"].append(of_A + of_B - P @ (P.mT @ of_B))
        steepest["full"].append(G)
    return {name: Ball(weights, of_layers) for name, of_layers in steepest.items()}


@torch.no_grad()
def in_weight_units(layers: Sequence[Any], name: str) -> list[nn.Parameter]:
    """Split each s B A so that a move of one factor has the norm of the move of W that it makes.

    Args:
        layers: their s B A stays what it is.
        name: of that factor, "A" or "B"; the other one becomes orthonormal, divided by s.

    Returns:
        That factor of each layer.
    """
    factors = []
    for layer in layers:
        A, B, s = _factors(layer)
        update = s * B.double() @ A.double()
        P, Q = _bases(layer)
        moving, fixed = (A, B) if name == "A" else (B, A)
        moving.copy_(P.mT @ update if name == "A" else update @ Q)
        fixed.copy_((P if name == "A" else Q.mT) / s)
        factors.append(moving)
    return factors


def _rise(loss: Loss, at: LossGradient, ball: Ball, rho: float) -> float:
    with moved(ball.weights, ball.moves(rho)):
        return float(value(loss) - at.loss)


def _random_ball(weights: list[nn.Parameter]) -> Ball:
    """With a Gaussian direction for the steepest one, the same for every adapter."""
    generator = torch.Generator().manual_seed(0)
    return Ball(weights, [torch.randn(weight.shape, generator=generator, dtype=weight.dtype) for weight in weights])


def _norms(module: ShotsClassifier) -> dict[str, float]:
    layers = module.adapted_layers
    updates = []
    for layer in layers:
        A, B, s = _factors(layer)
        updates.append((s * B @ A).detach())
    frozen: list[Tensor] = [*frozen_weights(layers)]
    of = {"adapter": updates, "frozen": frozen, "head": [module.head.weight]}
    return {f"{name}_norm": float(nn.utils.get_total_norm(tensors)) for name, tensors in of.items()}


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A (r, m), B (n, r) and s."""
    (adapter,) = layer.active_adapters
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]


def _bases(layer: Any) -> tuple[Tensor, Tensor]:
    """Orthonormal bases in float64: of B's columns (n, r), and of A's rows (m, r)."""
    A, B, _ = _factors(layer)
    return torch.linalg.qr(B.detach().double()).Q, torch.linalg.qr(A.detach().double().mT).Q
