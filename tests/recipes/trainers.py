"""A Trainer for the recipes' tests."""

from pathlib import Path
from typing import Any

import lightning as L


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | options
    return L.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
