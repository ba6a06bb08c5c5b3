"""``python -m recipes.pretrain.clip``: a small open_clip model, trained on emoji from random weights.

It lets the CLIP recipes run without a network. ``clip.yaml`` decides its weights; options are those of `fit`. After
Ctrl-C the same command resumes from the last checkpoint.
"""

import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip.export import export
from recipes.command_line.cli import RecipeCLI
from recipes.command_line.mistakes import without_traceback
from recipes.offline.packaged import cache_dir, one_at_a_time, write_folder
from recipes.studies.process import logging_in, resuming

_HERE = Path(__file__).parent


def main(options: Sequence[str]) -> Path:
    """Return the model's folder in the cache; train the model if there is none.

    Raises:
        MisconfigurationException: options are given, but the model exists already.
    """
    folder = cache_dir() / "emoji-clip"
    run = cache_dir() / "emoji-clip-training"
    with one_at_a_time(folder.name):
        if folder.exists() and options:
            raise MisconfigurationException(
                f"the model exists already, in {folder}, so the options {' '.join(options)} would change "
                "nothing: delete this folder to train it again, or leave the options out"
            )
        if not folder.exists():
            model = f"--model.model={_HERE / 'emoji-ViT-8-64.json'}"
            arguments = [f"--config={_HERE / 'clip.yaml'}", model, *options]
            RecipeCLI(["fit", *arguments, *logging_in(run), *resuming(run)], recipe="clip_contrastive")
            write_folder(folder, partial(_export, run))
        # Otherwise a model whose folder was deleted, to train it again, would resume from its last checkpoint.
        shutil.rmtree(run, ignore_errors=True)
    print(f"The model: local-dir:{folder}")
    return folder


def _export(run: Path, folder: Path) -> None:
    export(run / "checkpoints" / "last.ckpt", folder)


if __name__ == "__main__":
    with without_traceback():
        main(sys.argv[1:])
