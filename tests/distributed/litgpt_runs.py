"""litgpt's GPT on several processes: bare parameters and rows of stacked ones, whole or sharded."""

import os
from typing import Any

import litgpt_models
import torch
from fits import PRECISION_OF_FLOAT64
from helpers import trainer_of
from strategies import full_weights, places, strategy_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, FMLoRA
from lightning_flatlora.pairs.finders import litgpt_pairs

RHO, BETA, STEPS, ROWS = 0.3, 0.7, 4, 4


class ShardedLanguageModel(litgpt_models.LanguageModel):
    """Each block a unit of FSDP2, then the rest."""

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
    """Train on this rank's half of each batch, and save in the end; the trained weights and E, whole."""
    model: nn.Module = litgpt_models.gpt("all layers")
    callback: Any = FMLoRA(RHO, finder=litgpt_pairs)
    if front_end == "EFMLoRA":
        callback = EFMLoRA(RHO, beta=BETA, finder=litgpt_pairs)
    precision, settings = PRECISION_OF_FLOAT64[strategy.partition("-")[0]]
    used = strategy_of(strategy, **settings)
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    batches = [batch.chunk(ranks)[rank] for batch in litgpt_models.batches(STEPS, ROWS)]
    devices = {**places(), "max_epochs": 1}
    save = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=STEPS, finder=litgpt_pairs)
    trainer = trainer_of(None, [callback, save], strategy=used, precision=precision, **devices)
    torch.manual_seed(0)
    trainer.fit(ShardedLanguageModel(model), DataLoader(batches, batch_size=None))
    E = callback.perturbation.state_dict()["E"]
    return {"weights": full_weights(used, model), "E": E, "folder": folder}
