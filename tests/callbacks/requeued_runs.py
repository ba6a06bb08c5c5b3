"""Short runs with Requeue, which a signal ends and another start resumes."""

import signal
from pathlib import Path
from typing import Any

from helpers import ByHand, ResumableLoader, build, fit, make_loader
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment

from lightning_flatlora import AdapterCheckpoint, Requeue

BATCHES, EPOCHS = 5, 3
USR1, TERM = 128 + signal.SIGUSR1, 128 + signal.SIGTERM


def run(
    folder: Path,
    method: str = "efmlora",
    *others: Callback,
    resume: bool = False,
    accumulate: int = 1,
    requeue: Any = None,
    monitor: str | None = "val_loss",
    batches: int = BATCHES,
    kind: Any = AdapterCheckpoint,
    **settings: Any,
) -> Any:
    """Train three epochs of five batches, each with a validation of three, unless ``settings`` differ."""
    classes = {"classes": (ByHand, ByHand)} if method == "by hand" else {}
    module, callbacks, kwargs = build("plain" if classes else method, accumulate=accumulate, **classes)
    if classes:
        kwargs = {}
    saver = kind(folder / "saved", monitor=monitor, save_last=True, save_top_k=1)
    callbacks = [requeue or Requeue(), *callbacks, *others, saver]
    loader = ResumableLoader(list(make_loader(batches)))
    kwargs = {"max_epochs": EPOCHS, "plugins": LightningEnvironment(), **kwargs, **settings}
    val = make_loader(3, seed=7) if monitor == "val_loss" else None
    return fit(folder, module, callbacks, loader, val=val, ckpt_path="last" if resume else None, **kwargs)
