"""Directions compared with dense float64 matrices: what they say about the full weight space is true there."""

import pytest
import torch
from helpers import FEATURES, make_net
from torch import Tensor, nn

from lightning_flatlora import LoRAPair, Perturbation, find_pairs
from lightning_flatlora.flatness import fresh_perturbation, loss_gradient, sam_sharpness, trained_factors
from lightning_flatlora.flatness.landscape import (
    Direction,
    adversarial_direction,
    loss_along_line,
    loss_at,
    loss_on_plane,
    orthogonal_direction,
    random_direction,
)
from lightning_flatlora.flatness.sharpness import overlaps, read

RHO = 0.3


@pytest.fixture
def net() -> nn.Module:
    net = make_net(rank=2).double()
    for pair in find_pairs(net).pairs:
        torch.nn.init.normal_(pair.B, std=0.3)
    return net


@pytest.fixture
def pairs(net: nn.Module) -> list[LoRAPair]:
    return find_pairs(net).pairs


def loss_of(net: nn.Module) -> Tensor:
    inputs = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return net(inputs).square().mean()


def dense(pairs: list[LoRAPair], direction: Direction) -> Tensor:
    """The direction in the full weight space, as a single vector."""
    moves = [pair.scaling * D @ pair.A.detach() for pair, D in zip(pairs, direction, strict=True)]
    return torch.cat([move.flatten() for move in moves])


def adversarial(net: nn.Module, pairs: list[LoRAPair]) -> Direction:
    return adversarial_direction(Perturbation(pairs), loss_gradient(lambda: loss_of(net), trained_factors(pairs)))


def test_every_direction_has_length_one_in_full_weight_space(net: nn.Module, pairs: list[LoRAPair]) -> None:
    for direction in (adversarial(net, pairs), random_direction(pairs, 0), random_direction(pairs, 1)):
        assert torch.linalg.vector_norm(dense(pairs, direction)).item() == pytest.approx(1, abs=1e-12)


def test_what_is_made_orthogonal_is_so_in_full_weight_space(net: nn.Module, pairs: list[LoRAPair]) -> None:
    first, second = adversarial(net, pairs), random_direction(pairs, 0)
    across = dense(pairs, orthogonal_direction(pairs, second, first))
    assert torch.dot(across, dense(pairs, first)).item() == pytest.approx(0, abs=1e-12)
    assert torch.linalg.vector_norm(across).item() == pytest.approx(1, abs=1e-12)
    along = torch.stack([dense(pairs, first), dense(pairs, second)])
    residual = across - along.mT @ torch.linalg.lstsq(along.mT, across[:, None]).solution[:, 0]
    assert torch.linalg.vector_norm(residual).item() < 1e-10  # it lies in the plane of the two


def test_a_random_direction_has_nothing_that_dependent_rows_of_a_take_out_again() -> None:
    """Such a part would be thousands of times as large as its effect on the weight."""
    A = nn.Parameter(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
    pair = LoRAPair("few", A, nn.Parameter(torch.zeros(5, 16)), scaling=2.0)
    (direction,) = random_direction([pair], 0)
    assert (pair.scaling * direction @ A.detach()).norm().item() == pytest.approx(1, abs=1e-4)
    in_row_space = direction @ A.detach() @ torch.linalg.pinv(A.detach())
    torch.testing.assert_close(direction, in_row_space, rtol=0, atol=1e-3)


def test_random_directions_fill_what_b_can_express_evenly(pairs: list[LoRAPair]) -> None:
    """A layer's share of the squared length is its share of the n r dimensions, evenly along each row of A's space."""
    pair = pairs[1]
    pair.A.data[0] *= 50  # a direction drawn in B's coordinates would lie along this row only
    draws = [random_direction([pair], seed)[0] @ pair.A.detach() * pair.scaling for seed in range(300)]
    _, _, rows = torch.linalg.svd(pair.A.detach(), full_matrices=False)
    share = torch.stack([(draw @ rows.mT).square().sum(0) for draw in draws]).mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 0.5), atol=0.05, rtol=0)


def test_seeds_give_different_directions_and_the_same_ones_again(pairs: list[LoRAPair]) -> None:
    again, other = random_direction(pairs, 0), random_direction(pairs, 1)
    assert torch.equal(dense(pairs, again), dense(pairs, random_direction(pairs, 0)))
    assert abs(torch.dot(dense(pairs, again), dense(pairs, other)).item()) < 0.9


def test_the_loss_along_directions_is_that_of_moved_weights(net: nn.Module, pairs: list[LoRAPair]) -> None:
    first, second = adversarial(net, pairs), random_direction(pairs, 0)
    moved = loss_at(lambda: loss_of(net), pairs, (0.4, first), (-0.2, second))
    stored = [pair.B.detach().clone() for pair in pairs]
    for pair, one, other in zip(pairs, first, second, strict=True):
        pair.B.data += 0.4 * one - 0.2 * other
    assert moved.item() == pytest.approx(loss_of(net).item(), rel=1e-12)
    for pair, B in zip(pairs, stored, strict=True):
        pair.B.data = B
    assert loss_at(lambda: loss_of(net), pairs, (0.0, first)).item() == loss_of(net).item()


def test_lines_and_planes_hold_the_loss_after_each_step(net: nn.Module, pairs: list[LoRAPair]) -> None:
    first, second = random_direction(pairs, 0), random_direction(pairs, 1)
    steps, heights = torch.tensor([-0.4, 0.0, 0.7]), torch.tensor([0.0, 0.2])
    plane = loss_on_plane(lambda: loss_of(net), pairs, (second, heights), (first, steps))
    assert plane.shape == (2, 3)
    assert torch.equal(plane[0], loss_along_line(lambda: loss_of(net), pairs, first, steps))
    corner = loss_at(lambda: loss_of(net), pairs, (heights[1].item(), second), (steps[2].item(), first))
    assert torch.equal(plane[1, 2], corner)


def test_the_adversarial_line_goes_through_the_sam_sharpness(net: nn.Module, pairs: list[LoRAPair]) -> None:
    perturbation, at = Perturbation(pairs), loss_gradient(lambda: loss_of(net), trained_factors(pairs))
    sharpness = sam_sharpness(lambda: loss_of(net), perturbation, RHO, at)
    E = read(perturbation, fresh_perturbation(perturbation, RHO, at))
    radius = overlaps(pairs, E, E).sum().sqrt().item()
    assert 0.5 * RHO < radius <= RHO
    along = loss_at(lambda: loss_of(net), pairs, (radius, adversarial(net, pairs)))
    assert along.item() == pytest.approx(sharpness.perturbed.item(), rel=1e-10)
