"""Layers of other projects on several processes under DDP."""

import os
from typing import Any

from helpers import trainer_of
from imitated_layers import KINDS, Learner, batches, model_of
from strategies import strategy_of
from torch.utils.data import DataLoader

from lightning_flatlora import EFMLoRA, FMLoRA

RHO, BETA, STEPS = 0.3, 0.7, 3


def train(place: int, method: str) -> dict[str, Any]:
    """Train on this rank's half of each batch; ``place`` is that of the kind in the list."""
    kind, finder, _ = KINDS[place]
    model = model_of(kind)
    callback: Any = FMLoRA(RHO, finder=finder)
    if method == "EFMLoRA":
        callback = EFMLoRA(RHO, beta=BETA, finder=finder)
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    shares = [(x.chunk(ranks)[rank], y.chunk(ranks)[rank]) for x, y in batches(STEPS)]
    settings = {"devices": ranks, "use_distributed_sampler": False, "max_epochs": 1, "precision": "64-true"}
    trainer = trainer_of(None, [callback], strategy=strategy_of("ddp"), **settings)
    trainer.fit(Learner(model), DataLoader(shares, batch_size=None))
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
