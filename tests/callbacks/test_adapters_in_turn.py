"""Adapters that take turns, chosen in a hook or inside of the step: each is estimated as it is trained."""

from typing import Any

import pytest
import torch
from helpers import Classifier, TwoPassClassifier, build, fit, make_net, weights
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_flatlora import Perturbation, find_pairs


def two_adapters() -> nn.Module:
    net = make_net()
    torch.manual_seed(1)
    net.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2", "4"]))
    return net


class InTurn:
    """The batch's number decides on the adapter, in training_step itself."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        module: Any = self
        module.net.set_adapter(("default", "other")[batch_idx % 2])
        return super().loss(batch, batch_idx)  # type: ignore[misc]

    def configure_optimizers(self) -> Any:
        module: Any = self
        return torch.optim.AdamW([p for name, p in module.named_parameters() if "lora" in name], lr=0.02)


class Turns(InTurn, Classifier):
    pass


class TwoPassTurns(InTurn, TwoPassClassifier):
    pass


@pytest.mark.parametrize("front_end", ["efmlora", "fmlora", "module"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_estimator_is_the_one_that_was_asked_for(tmp_path: Any, front_end: str, accumulate: int) -> None:
    """Where A counted as frozen, both estimators gave the same weights bit for bit."""
    found = []
    for estimator in ("average", "projected"):
        module, callbacks, kwargs = build(
            front_end, net=two_adapters(), accumulate=accumulate, classes=(Turns, TwoPassTurns), estimator=estimator
        )
        fit(tmp_path, module, callbacks, max_epochs=4, **kwargs)
        found.append(weights(module))
    average, projected = found
    for adapter in ("default", "other"):
        names = [name for name in average if f".{adapter}." in name]
        assert names
        assert any(not torch.equal(average[name], projected[name]) for name in names), adapter


def test_the_estimate_goes_by_what_is_trained_at_the_ascent() -> None:
    """Of four pairs in one stack: A frozen all along, unfrozen since, frozen since with its gradient, and trained."""
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    config = LoraConfig(r=2, target_modules=["0", "1", "2", "3"], init_lora_weights=False)
    net = get_peft_model(layers, config).double()
    pairs = find_pairs(net).pairs
    pairs[0].A.requires_grad_(False)
    pairs[1].A.requires_grad_(False)
    perturbation = Perturbation(pairs, norm_scope="layer")
    assert len(perturbation._stacks) == 1
    pairs[1].A.requires_grad_(True)
    net(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
    pairs[2].A.requires_grad_(False)
    (found,) = perturbation.ascend(0.5, at_perturbed=False).stacks
    for pair, E, estimator in zip(pairs, found, ("projected", "average", "average", "average"), strict=True):
        (expected,) = Perturbation([pair], estimator, "layer").ascend(0.5, at_perturbed=False).stacks  # type: ignore[arg-type]
        torch.testing.assert_close(E, expected[0], rtol=1e-12, atol=1e-14)
    projected, average = (Perturbation([pairs[3]], each, "layer") for each in ("projected", "average"))  # type: ignore[arg-type]
    of_both = [each.ascend(0.5, at_perturbed=False).stacks[0] for each in (projected, average)]
    assert not torch.allclose(*of_both)
