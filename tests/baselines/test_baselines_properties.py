"""What defines SAM and LoRA-SAM: the ball, and the dependence on the factors."""

from contextlib import suppress

import pytest
import torch
from float64_runs import dataset, loss, network
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatlora import FMLoRA, find_pairs
from lightning_flatlora.baselines import SAM, LoRASAM
from lightning_flatlora.flatness import joint_ascent

BATCH = next(iter(DataLoader(dataset(), batch_size=32)))


def trained_network() -> nn.Module:
    """B is not 0, but smaller than A in the first layer and larger in the last."""
    net = network()
    for pair, std in zip(find_pairs(net).pairs, (0.03, 0.3, 0.9), strict=True):
        pair.B.data.normal_(std=std)
    return net


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_the_joint_perturbation_is_on_the_sphere_along_the_gradient(scale: float) -> None:
    gradients = [torch.randn(3, 4), torch.randn(5), torch.zeros(2)]
    E = joint_ascent([scale * g for g in gradients], 0.7)
    flat = torch.cat([e.flatten() for e in E])
    direction = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(flat, 0.7 * direction / direction.norm())


def test_a_sparse_gradient_counts_as_the_dense_one() -> None:
    dense, other = torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.randn(3)
    # An embedding's may name a row twice.
    sparse = torch.sparse_coo_tensor([[1, 1]], [[1.0, 0.0], [2.0, 1.0]], (2, 2), check_invariants=True)
    torch.testing.assert_close(joint_ascent([sparse, other], 0.7), joint_ascent([dense, other], 0.7))


def test_no_gradient_or_one_that_is_not_finite_gives_zero() -> None:
    for bad in (0.0, torch.inf, torch.nan):
        E = joint_ascent([torch.tensor([bad, 0.0]), torch.full((2,), 0.0 if bad == 0 else 1.0)], 0.7)
        assert all(torch.equal(e, torch.zeros(2)) for e in E)


def moved_weights(of_factors: bool, refactor: bool) -> list[Tensor]:
    """How LoRA-SAM or FMLoRA moves W, at (B, A) or at (B M, M⁻¹ A), the same W."""
    net = trained_network()
    pairs = find_pairs(net).pairs
    M = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    for pair in pairs if refactor else []:
        pair.B.data, pair.A.data = pair.B.data @ M, torch.linalg.inv(M) @ pair.A.data
    loss(net, BATCH).backward()
    before = [pair.scaling * pair.B @ pair.A for pair in pairs]
    method = (LoRASAM(0.1) if of_factors else FMLoRA(0.1)).method
    method.follow(pairs, net, net)
    method.install()
    with method.ascend():
        moved = [p.scaling * p.readers[0].weight @ p.A_readers[0].weight for p in pairs]
    method.close()
    return [(new - old).detach() for new, old in zip(moved, before, strict=True)]


def test_lora_sam_depends_on_the_factors_and_fmlora_does_not() -> None:
    for of_factors in (True, False):
        one, other = moved_weights(of_factors, False), moved_weights(of_factors, True)
        gap = max(float((x - y).norm() / x.norm()) for x, y in zip(one, other, strict=True))
        assert gap > 0.1 if of_factors else gap < 1e-3


def test_a_graph_of_the_clean_weights_fails_where_sam_has_moved_them() -> None:
    """Its gradient would silently be of other weights than its loss."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    kept = weight.square().sum()
    kept.backward(retain_graph=True)
    sam = SAM(0.1).method
    sam.optimizer = torch.optim.SGD([weight], lr=0.1)
    with sam.ascend(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
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
        with suppress(ZeroDivisionError), sam.ascend():
            assert not torch.equal(first, torch.ones(2))
            assert torch.equal(later, torch.ones(2)) is not is_trained
            raise ZeroDivisionError
        assert torch.equal(torch.cat([first, later]), torch.ones(4))
