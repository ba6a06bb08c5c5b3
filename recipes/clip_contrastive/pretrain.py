"""A small open_clip model, trained from random weights on emoji with their names, by the contrastive recipe.

``python -m recipes.clip_contrastive.pretrain`` makes it, for the CLIP recipes without a network; after Ctrl-C the same
command goes on from the last checkpoint.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import torch
from filelock import FileLock
from lightning.pytorch.callbacks import ModelCheckpoint
from open_clip.transform import PreprocessCfg, image_transform_v2
from torchvision import transforms

from recipes.clip import emoji
from recipes.clip.emoji import Folders
from recipes.clip.export import write
from recipes.clip_contrastive.data import ContrastiveData
from recipes.clip_contrastive.module import ContrastiveModel
from recipes.shared.files import write_whole
from recipes.shared.packaged import cache_dir
from recipes.shared.precision import Precision, fast_precision
from recipes.shared.progress import progress_bar
from recipes.shared.random_state import RandomState

MODEL = "emoji-ViT-8-64"
CONFIG = Path(__file__).with_name(f"{MODEL}.json")
_SCORES = "pretraining.json"
_CHECKPOINT_STEPS = 100


@dataclass(frozen=True)
class Pretraining:
    """Everything that decides the model's weights; each setting has a model of its own in the cache.

    Attributes:
        steps: optimizer steps.
        batch_size: pairs of a step, all compared with each other.
        learning_rate: AdamW's largest, after a warm-up, before a cosine to 0.
        weight_decay: AdamW's.
        warmup_steps: optimizer steps.
        smallest_crop: smallest share of an image's area that a random crop keeps.
        colour_jitter: largest relative change of brightness, contrast and saturation.
        grey_share: share of the images that lose their colours.
        seed: of weights, order, captions and augmentation.
        precision: of training; by default what the device computes fast.
    """

    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    smallest_crop: float = 0.6
    colour_jitter: float = 0.4
    grey_share: float = 0.1
    seed: int = 0
    precision: Precision = field(default_factory=fast_precision)


def pretrained(settings: Pretraining, data: Folders) -> Path:
    """Folder of the trained model, for ``local-dir:``; trained now, if the cache has none, or on from its checkpoint.

    Args:
        settings: of the training.
        data: the emoji.

    Returns:
        A folder that open_clip loads, with the settings and the recall on emoji never seen in ``pretraining.json``.
    """
    identity = json.dumps([asdict(settings), json.loads(CONFIG.read_text())], sort_keys=True)
    folder = cache_dir() / f"emoji-clip-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    if (folder / _SCORES).exists():
        return folder
    with FileLock(f"{folder}.lock"):  # a second process waits for what the first one trains
        if not (folder / _SCORES).exists():
            training = folder / "training"
            trainer, module, loaded = _train(settings, data, training)
            scores = trainer.validate(module, loaded, verbose=False)[0]
            write(module, folder)
            shown = json.dumps({"settings": asdict(settings), **scores}, indent=2)
            write_whole(folder / _SCORES, shown + "\n")  # last: with it the folder counts as a model
            shutil.rmtree(training)
    return folder


def _train(
    settings: Pretraining, folders: Folders, folder: Path
) -> tuple[L.Trainer, ContrastiveModel, ContrastiveData]:
    """The model after training, from the last checkpoint in a folder, if there is one."""
    L.seed_everything(settings.seed, verbose=False)
    open_clip.add_model_config(CONFIG)
    module = ContrastiveModel(
        model=MODEL,
        lora=None,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
    )
    data = ContrastiveData(
        dataset=str(folders.pairs),
        validation_dataset=str(folders.held_out_pairs),
        test_share=0.0,
        batch_size=settings.batch_size,
        check_images=False,
        seed=settings.seed,
    )
    data.clip = dataclasses.replace(module.clip, preprocess_train=augmentation(module.clip, settings))
    # Already here, since the number of batches decides the number of epochs.
    data.setup("fit")
    trainer = _trainer(settings, len(data.train_dataloader()), folder)
    last = folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None)
    return trainer, module, data


def _trainer(settings: Pretraining, batches: int, folder: Path) -> L.Trainer:
    return L.Trainer(
        accelerator="auto",
        devices=1,
        precision=settings.precision,
        max_steps=settings.steps,
        max_epochs=math.ceil(settings.steps / batches),
        check_val_every_n_epoch=10**6,  # only when asked to, after training
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[
            ModelCheckpoint(folder, every_n_train_steps=_CHECKPOINT_STEPS, save_top_k=0, save_last=True),
            RandomState(),
            progress_bar("the small CLIP"),
        ],
        logger=False,
        enable_model_summary=False,
    )


def augmentation(clip: Any, settings: Pretraining) -> Callable[[Any], torch.Tensor]:
    """Random crops by open_clip's own preprocessing, and random colours before them.

    Colours distinguish drawing styles more than anything else, so a model that saw the true ones would rely on them.
    """
    changes = [settings.colour_jitter] * 3
    crop = image_transform_v2(
        PreprocessCfg(**clip.net.visual.preprocess_cfg), is_train=True, aug_cfg={"scale": (settings.smallest_crop, 1.0)}
    )
    colours = [transforms.ColorJitter(*changes), transforms.RandomGrayscale(settings.grey_share)]
    together: Callable[[Any], torch.Tensor] = transforms.Compose([*colours, crop])
    return together


if __name__ == "__main__":
    print(f"The model: local-dir:{pretrained(Pretraining(), emoji.prepare())}")
