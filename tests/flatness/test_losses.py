"""Losses whose gradient can't be taken, or is meaningless."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, helpers
from quadratics import RHO, Quadratic
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_flatlora import Perturbation, find_pairs
from lightning_flatlora.flatness import (
    Point,
    hessian_product,
    hessian_trace,
    lora_sharpness,
    loss_gradient,
    measure,
    top_eigenvalue,
    trained_factors,
)


def checkpointed(quadratic: Quadratic, use_reentrant: bool) -> Tensor:
    """The same loss, with activation checkpointing for the forward pass of the first layer."""
    first = quadratic.layers[0]
    forward = first.forward

    def inside(x: Tensor) -> Any:
        return checkpoint(forward, x.requires_grad_(), use_reentrant=use_reentrant)

    first.forward = inside
    try:
        return quadratic.loss()
    finally:
        first.forward = forward


def test_activation_checkpoints_change_nothing() -> None:
    quadratic = Quadratic()
    factors = trained_factors(quadratic.pairs)
    expected = loss_gradient(quadratic.loss, factors).gradients
    products = hessian_product(quadratic.loss, factors, expected)
    found = loss_gradient(lambda: checkpointed(quadratic, use_reentrant=False), factors).gradients
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found = hessian_product(lambda: checkpointed(quadratic, use_reentrant=False), factors, expected)
    torch.testing.assert_close(found, products, rtol=1e-12, atol=1e-12)
    # In reentrant checkpoints torch.autograd.grad finds no parameters, so their part of the gradient would be 0.
    with pytest.raises(ValueError, match=r"reentrant .* set use_reentrant=False"):
        loss_gradient(lambda: checkpointed(quadratic, use_reentrant=True), factors)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: 1.0, r"a Tensor with one number, got 1\.0"),
        (lambda: torch.ones(2), r"got a Tensor of shape \(2,\)"),
        (lambda: torch.ones(()), "the loss has no graph"),
    ],
)
def test_what_is_no_loss_is_named(loss: Any, message: str) -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=message):
        loss_gradient(loss, parameters)
    with pytest.raises(ValueError, match=message):
        hessian_trace(loss, parameters)


@pytest.mark.skipif(not hasattr(helpers, "DoraCaching"), reason="DoraCaching came with peft 0.19")
def test_what_peft_caches_of_dora_is_not_taken_for_the_moved_weights() -> None:
    """In eval mode its layers would keep B A and the weights' norm from before the move."""
    config = LoraConfig(r=2, target_modules=["0", "1"], use_dora=True, init_lora_weights=False)
    net = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), config).eval()
    x, labels = torch.randn(8, 4), torch.randint(3, (8,))

    def measured() -> dict[str, Tensor]:
        point = Point(lambda: nn.functional.cross_entropy(net(x), labels), Perturbation(find_pairs(net).pairs), RHO)
        return measure(point, ["sharpness", "lora_sharpness", "radius", "top_eigenvalue", "hessian_trace"])

    expected = measured()
    with helpers.DoraCaching():
        assert measured() == expected
        found = net(x)
    assert torch.equal(net(x), found)


def test_too_few_parameters_and_a_negative_radius_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="at least two numbers in all, got 1"):
        top_eigenvalue(lambda: parameter.square().sum(), [parameter])
    with pytest.raises(ValueError, match="at least one"):
        hessian_trace(lambda: parameter.square().sum(), [])
    quadratic = Quadratic()
    with pytest.raises(ValueError, match="rho must be a finite number >= 0, got -1"):
        lora_sharpness(quadratic.loss, quadratic.pairs, rho=-1)
