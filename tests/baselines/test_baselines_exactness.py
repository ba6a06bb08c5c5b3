"""Run for run, each baseline equals its literal loop in float64: at least 52 AdamW steps, differences below 1e-10.

Also the defining properties of SAM and LoRA-SAM: the ball, and the dependence on the factors.
"""

import math
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
import torch
from dense import Dense, DenseBAR, DenseBiLoRA, DenseFlatLoRA, DenseLoRASAM, DenseOBAR, DenseSAM, plain_network
from float64_runs import Automatic, dataset, fit_in_float64, loss, network, worst_difference
from helpers import BASELINES, SIZES
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatlora import CosineRho, FMLoRA, LearningRateRho, LinearRho, find_pairs
from lightning_flatlora.baselines import SAM, LoRASAM
from lightning_flatlora.flatness import joint_ascent

LITERAL: dict[str, Any] = {
    "SAM": DenseSAM,
    "LoRASAM": DenseLoRASAM,
    "nBAR": DenseBAR,
    "oBAR": DenseOBAR,
    "RandomPerturbation": DenseFlatLoRA,
    "BiLoRA": DenseBiLoRA,
}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", BASELINES)
def test_equals_the_literal_loop(name: str, accumulate: int) -> None:
    size, epochs, net = SIZES[name], {1: 2, 4: 8}[accumulate], network()
    fit_in_float64(Automatic(net), epochs, [BASELINES[name](size)], accumulate_grad_batches=accumulate)
    loop = LITERAL[name](lambda step: size)
    assert worst_difference(net, loop.run(epochs, accumulate)) < 1e-10
    assert loop.step >= 50
    assert worst_difference(net, Dense(lambda step: 0.0).run(epochs, accumulate)) > 1e-5


def test_sam_needs_no_adapter() -> None:
    """Full fine-tuning, the upper reference."""
    net = plain_network()
    fit_in_float64(Automatic(net), 2, [SAM(0.4)])
    assert worst_difference(net, DenseSAM(lambda step: 0.4, plain_network()).run(2)) < 1e-10


SCHEDULES: dict[str, Any] = {
    "decreasing": (lambda size: LinearRho(size, 0.0), lambda step: 1 - step / 52),
    "increasing": (
        lambda size: CosineRho(0.0, size, total_steps=40),
        lambda step: (1 - math.cos(math.pi * min(step / 40, 1))) / 2,
    ),
    "with the learning rate": (LearningRateRho, lambda step: (1 + math.cos(math.pi * step / 200)) / 2),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*product(BASELINES, ["decreasing"]), *product(["LoRASAM", "nBAR"], [*SCHEDULES][1:])]
)
def test_schedules_equal_the_literal_loop(name: str, kind: str) -> None:
    schedule, factor = SCHEDULES[kind]
    size, net = SIZES[name], network()
    fit_in_float64(Automatic(net), 2, [BASELINES[name](schedule(size))])
    assert worst_difference(net, LITERAL[name](lambda step: size * factor(step)).run(2)) < 1e-10


def test_ascents_every_third_step_from_the_seventh() -> None:
    net = network()
    fit_in_float64(Automatic(net), 2, [LoRASAM(0.4, start_step=7, every_n_steps=3)])
    loop = DenseLoRASAM(lambda step: 0.4 if step >= 7 and (step - 7) % 3 == 0 else 0.0)
    assert worst_difference(net, loop.run(2)) < 1e-10


BATCH = next(iter(DataLoader(dataset(), batch_size=32)))


def trained_network() -> nn.Module:
    """B is nonzero, smaller than A in the first layer and larger in the last."""
    net = network()
    for pair, std in zip(find_pairs(net).pairs, (0.03, 0.3, 0.9), strict=True):
        pair.B.data.normal_(std=std)
    return net


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1.0, torch.float32), (2.0**16, torch.float32), (2.0**10, torch.half), (2.0**-12, torch.half)]
)
def test_the_joint_perturbation_is_on_the_sphere_along_the_gradient(scale: float, dtype: torch.dtype) -> None:
    """Even if the squares overflow or underflow in half precision."""
    gradients = [(scale * g).to(dtype) for g in (torch.randn(3, 4), torch.randn(5), torch.zeros(2))]
    flat = torch.cat([e.flatten() for e in joint_ascent(gradients, 0.7)])
    direction = torch.cat([gradient.flatten() for gradient in gradients]).float()
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.half else {}
    torch.testing.assert_close(flat.float(), 0.7 * direction / direction.norm(), **tolerance)


def test_a_sparse_gradient_counts_as_the_dense_one() -> None:
    dense, other = torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.randn(3)
    # The sparse gradient of an embedding may list a row twice.
    sparse = torch.sparse_coo_tensor([[1, 1]], [[1.0, 0.0], [2.0, 1.0]], (2, 2), check_invariants=True)
    torch.testing.assert_close(joint_ascent([sparse, other], 0.7), joint_ascent([dense, other], 0.7))


def test_no_gradient_or_one_that_is_not_finite_gives_zero() -> None:
    for bad in (0.0, torch.inf, torch.nan):
        E = joint_ascent([torch.tensor([bad, 0.0]), torch.full((2,), 0.0 if bad == 0 else 1.0)], 0.7)
        assert all(torch.equal(e, torch.zeros(2)) for e in E)


def moved_weights(of_factors: bool, refactor: bool) -> list[Tensor]:
    """How LoRA-SAM or FMLoRA moves W, given (B, A) or (B M, M⁻¹ A), which form the same W."""
    net = trained_network()
    pairs = find_pairs(net).pairs
    M = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    for pair in pairs if refactor else []:
        pair.B.data, pair.A.data = pair.B.data @ M, torch.linalg.inv(M) @ pair.A.data
    loss(net, BATCH).backward()
    before = [pair.scaling * pair.B @ pair.A for pair in pairs]
    method = (LoRASAM(0.1) if of_factors else FMLoRA(0.1)).method
    method.take_pairs(pairs, net, net)
    method.install()
    with method.perturb():
        moved = [p.scaling * p.readers[0].weight @ p.A_readers[0].weight for p in pairs]
    method.close()
    return [(new - old).detach() for new, old in zip(moved, before, strict=True)]


def test_lora_sam_depends_on_the_factors_and_fmlora_does_not() -> None:
    for of_factors in (True, False):
        one, other = moved_weights(of_factors, False), moved_weights(of_factors, True)
        gap = max(float((x - y).norm() / x.norm()) for x, y in zip(one, other, strict=True))
        assert gap > 0.1 if of_factors else gap < 1e-3


def test_a_graph_of_the_clean_weights_fails_where_sam_has_moved_them() -> None:
    """Otherwise its gradient would silently belong to other weights than its loss."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    kept = weight.square().sum()
    kept.backward(retain_graph=True)
    sam = SAM(0.1).method
    sam.optimizer = torch.optim.SGD([weight], lr=0.1)
    with sam.perturb(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    assert torch.equal(weight, torch.tensor([1.0, 2.0]))


def test_sam_moves_what_its_optimizer_trains_at_the_moment_and_takes_it_back() -> None:
    first, later = (nn.Parameter(torch.ones(2)) for _ in range(2))
    sam = SAM(0.1).method
    sam.optimizer = torch.optim.SGD([first], lr=0.1)
    sam.optimizer.add_param_group({"params": [later]})
    for is_trained in (False, True):
        later.requires_grad_(is_trained)
        first.grad, later.grad = torch.ones(2), torch.ones(2) if is_trained else None
        with suppress(ZeroDivisionError), sam.perturb():
            assert not torch.equal(first, torch.ones(2))
            assert torch.equal(later, torch.ones(2)) is not is_trained
            raise ZeroDivisionError
        assert torch.equal(torch.cat([first, later]), torch.ones(4))
