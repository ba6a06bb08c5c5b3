"""The loss around kept adapters: each direction and curvature against explicit projectors in float64."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence_runs import RUN, Fake, tiny_encoder
from torch import Tensor

from lightning_flatlora import Perturbation, find_pairs
from lightning_flatlora.flatness import MeanLoss, hessian_product, loss_gradient, moved, sam_sharpness, trained_factors
from lightning_flatlora.flatness.losses import value
from recipes.evidence import commands
from recipes.evidence.__main__ import main
from recipes.evidence.flatness import (
    PARTS,
    RADII,
    RESULTS,
    SUBSPACES,
    balls,
    frozen_weights,
    in_weight_units,
    mean_loss,
)
from recipes.evidence.flatness_report import ratio
from recipes.evidence.module import ShotsClassifier
from recipes.evidence.plan import RESULTS as RUNS
from recipes.evidence.run import Run, perform, training_batches
from recipes.shared.ledger import read

DOUBLE = {"dtype": torch.float64}


pytestmark = pytest.mark.usefixtures("evidence")


@pytest.fixture
def module() -> ShotsClassifier:
    """With an adapter that does something, in float64."""
    module = ShotsClassifier(tiny_encoder(), 3, RUN.settings, RUN.config).double().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, **DOUBLE)
    return module


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    """Of unequal sizes, since the examples of a part need not fill the last one."""
    (whole,) = training_batches(RUN, tiny_encoder())
    texts = whole["labels"].numel()
    found = []
    for places in (range(texts - 2), range(texts - 2, texts)):
        keep = torch.isin(whole["owners"], torch.tensor(places))
        owners = torch.where(keep, whole["owners"] - places.start, -1)
        batch = {"hidden": whole["hidden"].double(), "owners": owners, "labels": whole["labels"][list(places)]}
        found.append(batch)
    return found


@pytest.fixture
def loss(module: ShotsClassifier, batches: list[dict[str, Tensor]]) -> MeanLoss:
    return mean_loss(module, batches)


def projectors(module: ShotsClassifier) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, on B's columns (n, n) and on A's rows (m, m), by pseudo-inverses."""
    found = []
    for layer in module.adapted_layers:
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        found.append((B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A))
    return found


def projected(name: str, moves: Sequence[Tensor], onto: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """On what a subspace can express, by the dense definition."""
    found = []
    for move, (of_B, of_A) in zip(moves, onto, strict=True):
        rest_B, rest_A = torch.eye(len(of_B), **DOUBLE) - of_B, torch.eye(len(of_A), **DOUBLE) - of_A
        dense = {"B": move @ of_A, "A": of_B @ move, "both": move - rest_B @ move @ rest_A, "full": move}
        found.append(dense[name])
    return found


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("name", SUBSPACES)
def test_a_direction_is_the_steepest_of_its_subspace_at_its_radius(
    name: str, module: ShotsClassifier, loss: MeanLoss
) -> None:
    layers, onto = module.adapted_layers, projectors(module)
    at = loss_gradient(loss, frozen_weights(layers))
    ball, gradient = balls(layers, at)[name], flat(at.gradients)
    steepest = flat(projected(name, at.gradients, onto))
    for rho in RADII:
        moves = ball.moves(rho)
        # Within the subspace, at the radius in the full weights, and along the dense projection of the gradient.
        torch.testing.assert_close(flat(projected(name, moves, onto)), flat(moves), rtol=0, atol=1e-10 * rho)
        torch.testing.assert_close(flat(moves), rho * steepest / steepest.norm(), rtol=0, atol=1e-10 * rho)
        assert float(flat(moves).norm()) == pytest.approx(rho, rel=1e-10)
        assert float(gradient @ flat(moves)) == pytest.approx(rho * ball.norm(), rel=1e-10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = flat(projected(name, [torch.randn(W.shape, generator=generator, **DOUBLE) for W in ball.weights], onto))
        assert float(gradient @ other / other.norm()) < ball.norm()
    # The loss itself rises by the slope times a small radius.
    with moved(ball.weights, ball.moves(1e-6)):
        assert float(value(loss) - at.loss) == pytest.approx(1e-6 * ball.norm(), rel=1e-3)


def test_the_steepest_move_of_b_is_the_methods_own(module: ShotsClassifier, loss: MeanLoss) -> None:
    layers, pairs = module.adapted_layers, find_pairs(module).pairs
    at = loss_gradient(loss, frozen_weights(layers))
    ball = balls(layers, at)["B"]
    of_factors = loss_gradient(loss, trained_factors(pairs))
    for rho in RADII:
        with moved(ball.weights, ball.moves(rho)):
            rise = float(value(loss) - at.loss)
        # Up to the damping of the inverse.
        sharp = sam_sharpness(loss, Perturbation(pairs, estimator="projected"), rho, of_factors)
        assert rise == pytest.approx(float(sharp.sharpness), rel=1e-4)


def shaped(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a vector in the shapes of some tensors."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def curvatures(loss: MeanLoss, tensors: Sequence[Tensor], directions: Tensor) -> float:
    """The sum of the curvatures along some directions."""
    products = [
        direction @ flat(hessian_product(loss, tensors, shaped(direction, tensors))) for direction in directions
    ]
    return float(sum(products))


@pytest.mark.parametrize("name", ["A", "B"])
def test_curvature_in_a_subspace_is_in_units_of_the_full_weights(
    name: str, module: ShotsClassifier, loss: MeanLoss
) -> None:
    layers, onto = module.adapted_layers, projectors(module)
    weights = frozen_weights(layers)
    units = torch.eye(sum(W.numel() for W in weights), **DOUBLE)
    projector = torch.stack([flat(projected(name, shaped(unit, weights), onto)) for unit in units])
    # An orthonormal basis of the subspace: its dense projector's eigenvectors to 1.
    values, vectors = torch.linalg.eigh(projector)
    trace = curvatures(loss, weights, vectors.mT[values > 0.5])
    before = value(loss)
    factors = in_weight_units(layers, name)
    torch.testing.assert_close(value(loss), before)
    found = curvatures(loss, factors, torch.eye(sum(factor.numel() for factor in factors), **DOUBLE))
    assert found == pytest.approx(trace, rel=1e-8)
    # The subspace is what it was.
    for new, old in zip(projectors(module), onto, strict=True):
        torch.testing.assert_close(new[0], old[0])
        torch.testing.assert_close(new[1], old[1])


# -- the command


def test_the_command_measures_what_is_kept_and_the_report_compares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--workload", "tiny", "--folder", str(tmp_path), "--precision", "32-true"]
    options += ["--methods", "lora", "efmlora", "--seeds", "0", "1"]
    with pytest.raises(SystemExit, match="names no weights"):
        main(["flatness", *options])
    fake = Fake(gain=0.05)

    def searched(run: Run, folder: Path) -> dict[str, Any]:
        return fake(run) if run.stage == "search" else perform(run, folder)

    monkeypatch.setattr(commands, "perform", searched)
    main(["run", *options])
    assert main(["flatness", *options]) == 0
    rows = read(tmp_path / RESULTS)
    assert len(rows) == 4
    runs = {(row["arm"], row["seed"]): row for row in read(tmp_path / RUNS) if "weights" in row}
    for row in rows:
        run = runs[row["arm"], row["seed"]]
        for part in PARTS:
            assert row[part]["loss"] == pytest.approx(run[f"{part}_loss"], rel=1e-5)
    assert main(["report", *options]) == 0
    assert "secondary" in capsys.readouterr().out
    text = (tmp_path / "tiny_flatness.md").read_text()
    slopes: dict[str, dict[int, float]] = {"lora": {}, "efmlora": {}}
    for row in rows:
        slopes[row["arm"]][row["seed"]] = row["train"]["gradient"]["B"]
    assert str(ratio(slopes["efmlora"], slopes["lora"])) in text
    # Nothing is measured twice, and weights that are missing are said.
    (tmp_path / next(run["weights"] for run in runs.values())).unlink()
    assert main(["flatness", *options]) == 0
    assert "1 of 4 rows are left out" in capsys.readouterr().out
    assert read(tmp_path / RESULTS) == rows


def test_a_ratio_is_geometric_and_paired() -> None:
    one, other = {0: 1.0, 1: 4.0, 2: 2.0}, {0: 2.0, 1: 4.0, 2: 8.0}
    found = ratio(one, other)
    assert found is not None
    assert found.mean == pytest.approx((1 / 2 * 1 * 1 / 4) ** (1 / 3))
    half = 4.302653 * math.log(2) * 1 / math.sqrt(3)  # Student's t for 2 degrees of freedom; the logs are -1, 0, -2
    assert found.low == pytest.approx(found.mean * math.exp(-half), rel=1e-6)
    assert found.high == pytest.approx(found.mean * math.exp(half), rel=1e-6)
    assert ratio({0: 1.0, 1: -1.0}, other) is None
    assert ratio({0: 1.0}, other) is None
