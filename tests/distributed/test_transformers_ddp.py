"""transformers' Trainer on two processes: DDP gives what one process gives with the whole batches."""

from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import same
from hf_runs import trained_by
from launch import Results, launch

RUNS = list(product(("EFMLoRA", "FMLoRA"), (1, 2)))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("transformers")
    runs = {}
    for name, window in RUNS:
        arguments = {"folder": str(folder / "out"), "name": name, "window": window}
        runs[f"{name}-{window}"] = ("hf_runs:on_two_ranks", arguments)
    return launch(folder, runs)


@pytest.mark.parametrize(("name", "window"), RUNS)
def test_two_ranks_equal_one(results: Results, tmp_path: Path, name: str, window: int) -> None:
    """The object is made before transformers wraps the model in DDP."""
    first, second = results[f"{name}-{window}"]
    assert first["wrapped"] == "DistributedDataParallel"
    assert same(first, second)
    trainer, flat = trained_by(name, tmp_path, gradient_accumulation_steps=window)
    weights = dict(trainer.model.net.named_parameters())
    for key, value in first["weights"].items():
        assert float((value - weights[key].detach()).abs().max()) < 1e-10, key
    E = flat.perturbation.state_dict()["E"]
    for key, value in first["E"].items():
        assert float(value.norm()) > 0
        assert torch.allclose(value, E[key], atol=1e-10), key
