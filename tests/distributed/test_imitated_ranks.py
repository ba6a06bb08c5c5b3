"""Layers of other projects under DDP give on two ranks what the dense reference gives on one."""

from itertools import product
from typing import Any

import pytest
import torch
from helpers import same
from imitated_layers import KINDS, batches, error, model_of, optimizer_of
from imitated_runs import BETA, RHO, STEPS
from launch import Results, launch
from reference import Reference

from lightning_flatlora import find_pairs

RUNS = list(product(range(len(KINDS)), ("EFMLoRA", "FMLoRA")))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    for place, method in RUNS:
        runs[f"{place}:{method}"] = ("imitated_runs:train", {"place": place, "method": method})
    return launch(tmp_path_factory.mktemp("imitated"), runs)


@pytest.mark.parametrize(("place", "method"), RUNS)
def test_two_ranks_equal_the_dense_reference(results: Results, place: int, method: str) -> None:
    kind, finder, _ = KINDS[place]
    expected = model_of(kind)
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(expected, finder=finder).pairs]
    beta = BETA if method == "EFMLoRA" else None
    Reference(expected, pairs, error, optimizer_of(expected), lambda step: RHO, beta=beta).train(batches(STEPS))
    first, second = results[f"{place}:{method}"]
    assert same(first, second)
    trained = dict(expected.named_parameters())
    for name, value in first.items():
        assert torch.allclose(value, trained[name], rtol=0, atol=1e-10), name
