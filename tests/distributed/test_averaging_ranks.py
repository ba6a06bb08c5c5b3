"""AdapterAveraging on two processes gives the averages of one, and resumes them bit for bit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import END, MIDDLE, loader, trainer_of
from fits import ShardedAutomatic, difference, full_weights
from float64_runs import RHO, loss, network
from helpers import same
from launch import Results, Runs, launch
from torch.utils.data import DataLoader

from lightning_flatlora import AdapterAveraging, AdapterCheckpoint, EFMLoRA
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import HINT

STRATEGIES = ("ddp", "fsdp2")


class Validated(ShardedAutomatic):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses = [*getattr(self, "losses", []), float(loss(self.net, batch))]


def averaged(folder: str, strategy: str, resume: str | None = None) -> dict[str, Any]:
    """Train with EFMLoRA, and validate between steps; FSDP2 gathers the full weights for that."""
    averaging = AdapterAveraging(0.8, start_step=2)
    save = AdapterCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    settings = {"val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = trainer_of(strategy, [EFMLoRA(RHO), averaging, save], **settings)
    module = Validated(network())
    trainer.fit(module, loader(), DataLoader(loader().batches, batch_size=None), ckpt_path=resume)
    return {
        "weights": full_weights(trainer.strategy, module.net),
        "state": averaging.state_dict(),
        "losses": module.losses,
    }


class Averages:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.one = averaged(self.place("one"), "single")
        runs: Runs = {"fsdp1": partial(averaged, self.place("fsdp1"), "fsdp1-layers")}
        for name in STRATEGIES:
            runs[name] = partial(averaged, self.place(name), name)
            file = f"{self.place(name)}/step={MIDDLE}.ckpt"
            runs[f"{name}-resumed"] = partial(averaged, self.place(f"{name}-resumed"), name, file)
        self.two: Results = launch(folder, runs)

    def place(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Averages:
    return Averages(tmp_path_factory.mktemp("averages"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_give_the_averages_of_one(runs: Averages, name: str) -> None:
    for rank in runs.two[name]:
        assert difference(rank["weights"], runs.one["weights"]) < 1e-10
        for part in ("averages", "weights"):
            assert difference(rank["state"][part], runs.one["state"][part]) < 1e-10
        assert rank["state"]["count"] == END - 2
    # Each rank has its own half of a batch.
    means = torch.tensor([rank["losses"] for rank in runs.two[name]]).mean(0)
    torch.testing.assert_close(means, torch.tensor(runs.one["losses"]), rtol=0, atol=1e-6)
    assert difference(runs.one["state"]["averages"], runs.one["state"]["weights"]) > 1e-4


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_run_equals_the_uninterrupted_one(runs: Averages, name: str) -> None:
    for whole, resumed in zip(runs.two[name], runs.two[f"{name}-resumed"], strict=True):
        assert same(whole["weights"], resumed["weights"])
        assert same(whole["state"], resumed["state"])
        assert whole["losses"][-2:] == resumed["losses"][-2:]


@pytest.mark.parametrize("name", STRATEGIES)
def test_files_are_those_of_one_process(runs: Averages, name: str) -> None:
    file, expected = (torch.load(f"{runs.place(run)}/step={MIDDLE}.ckpt", weights_only=True) for run in (name, "one"))
    hint = {HINT: torch.zeros(1)}
    assert difference(file["state_dict"] | hint, expected["state_dict"] | hint) < 1e-10
    held, expected_held = (each["callbacks"]["AdapterAveraging"] for each in (file, expected))
    assert held.keys() == expected_held.keys()
    assert difference(held["weights"], expected_held["weights"]) < 1e-10


def test_fsdp1_is_refused(runs: Averages) -> None:
    for error in runs.two.error("fsdp1"):
        assert "AdapterAveraging: FSDP1 is not supported: use one device, DDP, or FSDP2" in error
