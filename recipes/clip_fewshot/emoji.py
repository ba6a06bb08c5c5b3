"""The few-shot task on emoji: a drawing style that the small CLIP of recipes.clip_contrastive has never seen."""

from pathlib import Path

from recipes.clip_fewshot.data import FewShotData
from recipes.clip_fewshot.folders import Example
from recipes.clip_fewshot.sources import load


def emoji_data(images: Path, shots: int, seed: int, batch_size: int, iterations_per_shot: int) -> FewShotData:
    """The shots that a seed draws from the packaged emoji, without a validation part.

    Args:
        images: folder with train/CLASS/ and the like.
        shots: images of each class to train on.
        seed: of the shots and of the batches.
        batch_size: images of a step.
        iterations_per_shot: optimizer steps for each shot.
    """
    return FewShotData(
        dataset=str(images),
        shots=shots,
        validation_shots=0,
        seed=seed,
        batch_size=batch_size,
        iterations_per_shot=iterations_per_shot,
        templates=["{}"],  # as in the captions that the model was trained with
        crop_scale=(0.6, 1.0),
        flip=0.0,  # letters, arrows and clocks have a right way round
    )


def examples(images: Path, part: str) -> list[Example]:
    """Paths and labels of a part, in a fixed order."""
    return load(str(images)).parts[part]
