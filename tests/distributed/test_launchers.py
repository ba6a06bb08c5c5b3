"""Strategies that start processes of their own bring back to the main one what DDP under torchrun trains."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_runs import difference, train_alone
from float64_runs import Manual, network
from launchers import BATCHES, RUNS, main
from processes import run

from lightning_flatlora import EFMLoRA, FMLoRA


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with each run's weights, from one main process."""
    folder = tmp_path_factory.mktemp("launchers")
    run(main, folder, output=folder / "output.txt")
    return folder


@pytest.mark.parametrize(("strategy", "front_end"), RUNS)
def test_the_main_process_has_the_weights_of_ddp(trained: Path, strategy: str, front_end: str) -> None:
    """Those of one process on the joint batches, which test_ddp.py shows to be DDP's."""
    file = trained / f"{strategy}-{front_end}.pt"
    assert file.exists(), (trained / "output.txt").read_text()[-6000:]
    expected = train_alone(front_end, accumulate=2, epochs=1, batches=BATCHES)["weights"]
    assert difference(torch.load(file, weights_only=True), expected) < 1e-10


@pytest.mark.parametrize("front_end", [EFMLoRA, FMLoRA, Manual])
def test_what_ddp_spawn_sends_to_its_processes_can_be_pickled(front_end: Any) -> None:
    net = {"net": network()} if front_end is Manual else {}
    copy = pickle.loads(pickle.dumps(front_end(rho=0.3, **net)))
    assert (copy._callback if net else copy).rho(0, 1.0) == 0.3
