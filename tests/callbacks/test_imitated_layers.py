"""Layers of other projects in a real Trainer equal the literal algorithms; see tests/test_hostile_modules.py."""

from typing import Any

import pytest
import torch
from helpers import assert_no_trace, trainer_of, weights
from imitated_layers import KINDS, Learner, batches, error, model_of, optimizer_of
from reference import Reference
from torch import nn
from torch.utils.data import DataLoader

from lightning_flatlora import EFMLoRA, FMLoRA, find_pairs

RHO, BETA = 0.3, 0.7
METHODS = {"EFMLoRA": (EFMLoRA, {"beta": BETA}), "FMLoRA": (FMLoRA, {})}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "finder", "name"), KINDS)
def test_steps_equal_the_dense_reference(kind: type[nn.Module], finder: Any, name: str, method: str) -> None:
    make, own = METHODS[method]
    expected, model = model_of(kind), model_of(kind)
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(expected, finder=finder).pairs]
    run = Reference(expected, pairs, error, optimizer_of(expected), lambda step: RHO, beta=own.get("beta"))
    run.train(batches(4))
    trainer = trainer_of(None, [make(RHO, finder=finder, **own)], max_epochs=-1, max_steps=4, precision="64-true")
    trainer.fit(Learner(model), DataLoader(batches(8), batch_size=None))
    for key, value in weights(model).items():
        assert torch.allclose(value, weights(expected)[key], rtol=0, atol=1e-10), key
    assert_no_trace(model)
