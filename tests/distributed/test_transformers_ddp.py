"""transformers' Trainer on two processes: DDP gives what one process gives with the whole batches."""

from pathlib import Path

import pytest
import torch
from float64_runs import BETA, network
from helpers import same
from hf_runs import RHO, trainer_of
from launch import Results, launch
from lightning_flatlora.transformers_trainer import EFMLoRA

WINDOWS = (1, 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("transformers")
    runs = {}
    for window in WINDOWS:
        runs[f"window-{window}"] = ("hf_runs:on_two_ranks", {"folder": str(folder / "out"), "window": window})
    return launch(folder, runs)


@pytest.mark.parametrize("window", WINDOWS)
def test_two_ranks_equal_one(results: Results, tmp_path: Path, window: int) -> None:
    first, second = results[f"window-{window}"]
    assert first["wrapped"] == "DistributedDataParallel"
    assert same(first, second)
    net, callback = network(), EFMLoRA(RHO, beta=BETA)
    trainer_of(tmp_path, [callback], net, gradient_accumulation_steps=window).train()
    weights = dict(net.named_parameters())
    for name, value in first["weights"].items():
        assert float((value - weights[name].detach()).abs().max()) < 1e-10, name
    assert callback.loop is not None
    assert callback.loop.perturbation is not None
    E = callback.loop.perturbation.state_dict()["E"]
    for name, value in first["E"].items():
        assert float(value.norm()) > 0
        assert torch.allclose(value, E[name], atol=1e-10), name
