"""Unlearning with FMLoRA: the forget loss in both passes, then the retain loss at the clean weights."""

from typing import Any

import torch
from float64_runs import RHO, loss, network, optimizer_of, worst_difference
from loop_runs import batches
from reference import Reference
from torch import Tensor, nn

from lightning_flatlora import find_pairs
from lightning_flatlora.loops import FMLoRA


def forget_loss(model: nn.Module, batch: Any) -> Tensor:
    """Falls as the error grows, and is bounded."""
    return torch.exp(-loss(model, batch))


class Unlearning(Reference):
    def two_pass_gradients(self, window: list[Any]) -> None:
        super().two_pass_gradients([forget for forget, _ in window])
        for _, retain in window:
            loss(self.model, retain).backward()


def both() -> list[tuple[Any, Any]]:
    """A batch to forget, and one to retain."""
    data = batches()
    return list(zip(data, reversed(data), strict=True))


def backward_of_forgetting(flat: FMLoRA, model: nn.Module, batch: Any) -> None:
    for each_pass in flat.training_passes():
        with each_pass:
            forget_loss(model, batch).backward()


def test_equals_a_dense_computation() -> None:
    ours, theirs = network(), network()
    optimizer, other = optimizer_of(ours), optimizer_of(theirs)
    flat = FMLoRA(ours, optimizer, rho=RHO)
    for _ in range(10):
        for forget, retain in both():
            optimizer.zero_grad()
            backward_of_forgetting(flat, ours, forget)
            loss(ours, retain).backward()
            optimizer.step()
    flat.close()
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(theirs).pairs]
    reference = Unlearning(theirs, pairs, forget_loss, other, rho=lambda step: RHO)
    for _ in range(10):
        reference.train(both())
    assert reference.step == 100
    assert worst_difference(ours, theirs) < 1e-10
    plain = network()
    Unlearning(plain, [], forget_loss, optimizer_of(plain), rho=lambda step: 0.0).train(both())
    assert worst_difference(plain, theirs) > 1e-3


def test_the_gradient_of_the_retain_loss_is_the_clean_one() -> None:
    """The perturbation only comes from the forget loss: E is the same without a retain loss."""
    net = network()
    optimizer = optimizer_of(net)
    flat = FMLoRA(net, optimizer, rho=RHO)
    trained = [p for p in net.parameters() if p.requires_grad]
    for forget, retain in both()[:3]:
        clean = torch.autograd.grad(loss(net, retain), trained)
        backward_of_forgetting(flat, net, forget)
        of_forgetting = [p.grad.clone() for p in trained if p.grad is not None]
        at_clean = torch.autograd.grad(forget_loss(net, forget), trained)
        assert max(float((g - c).abs().max()) for g, c in zip(of_forgetting, at_clean, strict=True)) > 1e-3
        loss(net, retain).backward()
        for p, gradient, own in zip(trained, of_forgetting, clean, strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, gradient + own)
        optimizer.step()
        optimizer.zero_grad()
    flat.close()
