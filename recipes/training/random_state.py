"""Random number generators in the checkpoint, so that a resumed run draws what the uninterrupted one drew."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from recipes.training.ranks import gathered, rank


class RandomState(Callback):
    """Save the states of Python's, NumPy's and PyTorch's generators in checkpoints and put them back on resume.

    Lightning does neither. With a data loader that can resume (torchdata's ``StatefulDataLoader``) and draws from its
    own generator, a run resumed in mid-epoch equals the uninterrupted one bit for bit, dropout included.
    Each process saves its own and gets it back; on another number of processes they share the saved ones.
    """

    def __init__(self) -> None:
        # Put back only when training starts, because the setup before that draws numbers too.
        self._loaded: dict[str, Any] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"ranks": gathered(collect_random_state())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks = state_dict["ranks"]
        self._loaded = ranks[rank() % len(ranks)]

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._restore()  # a run resumed in mid-epoch does not pass on_train_epoch_start

    def _restore(self) -> None:
        if self._loaded is not None:
            restore_random_state(self._loaded)
            self._loaded = None


def collect_random_state() -> dict[str, Any]:
    """Return the generators' states in types that ``torch.load(weights_only=True)`` reads."""
    of_numpy: dict[str, Any] = np.random.get_state(legacy=False)
    of_numpy["state"]["key"] = of_numpy["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": of_numpy,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`collect_random_state` gave; missing devices are skipped."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    for device in range(min(len(state["cuda"]), torch.cuda.device_count())):
        torch.cuda.set_rng_state(state["cuda"][device].cpu(), device)
