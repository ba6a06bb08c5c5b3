"""litgpt's layers under DDP, FSDP2 and FSDP1 give what the dense reference gives in one process."""

import os
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import litgpt_models
import pytest
import torch
from fits import full_weights, in_float64, relative_difference
from helpers import same, trainer_of
from launch import Results, Runs, launch
from reference import Reference
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, FMLoRA
from lightning_flatlora.pairs.finders import litgpt_pairs

RHO, BETA, STEPS, ROWS = 0.3, 0.7, 4, 4
STRATEGIES = ("ddp", "fsdp2", "fsdp1-root")
FRONT_ENDS = ("EFMLoRA", "FMLoRA")


class ShardedLanguageModel(litgpt_models.LanguageModel):
    """Each block is a unit of FSDP2, then the rest."""

    def configure_model(self) -> None:
        if self.device_mesh is None or getattr(self, "is_sharded", False):
            return
        mesh = self.device_mesh["data_parallel"]
        blocks: Any = self.model.transformer.h
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.is_sharded = True


def train(strategy: str, front_end: str, folder: str) -> dict[str, Any]:
    """Train on this rank's half of each batch, and save at the end; returns the full trained weights and E."""
    model: nn.Module = litgpt_models.gpt("all layers")
    callback: Any = FMLoRA(RHO, finder=litgpt_pairs)
    if front_end == "EFMLoRA":
        callback = EFMLoRA(RHO, beta=BETA, finder=litgpt_pairs)
    settings = in_float64(strategy)
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    batches = [batch.chunk(ranks)[rank] for batch in litgpt_models.batches(STEPS, ROWS)]
    save = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=STEPS, finder=litgpt_pairs)
    trainer = trainer_of(None, [callback, save], max_epochs=1, **settings)
    torch.manual_seed(0)
    trainer.fit(ShardedLanguageModel(model), DataLoader(batches, batch_size=None))
    E = callback.perturbation.state_dict()["E"]
    return {"weights": full_weights(trainer.strategy, model), "E": E, "folder": folder}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("litgpt")
    runs: Runs = {}
    for strategy, front_end in product(STRATEGIES, FRONT_ENDS):
        saved = str(folder / f"{strategy}-{front_end}")
        runs[f"{strategy}:{front_end}"] = partial(train, strategy, front_end, saved)
    return launch(folder, runs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_two_ranks_equal_the_dense_reference(results: Results, strategy: str, front_end: str) -> None:
    apart, pairs = litgpt_models.split(litgpt_models.gpt("all layers"))
    beta = BETA if front_end == "EFMLoRA" else None
    optimizer = litgpt_models.optimizer_of(apart)
    Reference(apart, pairs, litgpt_models.loss, optimizer, lambda step: RHO, beta=beta).train(
        litgpt_models.batches(STEPS, ROWS)
    )
    first, second = results[f"{strategy}:{front_end}"]
    for kind in ("weights", "E"):
        assert all(torch.equal(value, second[kind][name]) for name, value in first[kind].items())
    assert len(first["E"]) == len(pairs)
    assert all(float(E.norm()) > 0 for E in first["E"].values())
    assert relative_difference(first["weights"], litgpt_models.joined(apart)) < 1e-10
    adapter = torch.load(Path(first["folder"]) / f"step={STEPS}" / "lit_model.pth.lora")["model"]
    assert same(adapter, first["weights"])
