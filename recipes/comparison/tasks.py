"""The tasks of the comparison, with their sizes and the values that every method may choose from."""

from recipes.comparison.classification import TextTask
from recipes.comparison.commonsense import CommonsenseTask
from recipes.comparison.emoji import EmojiTask
from recipes.comparison.task import Grids, Task

_TEXT_GRIDS: Grids = {
    "learning_rate": (5e-4, 1e-3, 2e-3, 4e-3),
    "full_learning_rate": (1e-5, 3e-5, 1e-4, 3e-4),
    "rho": (0.1, 0.3, 1.0, 3.0),
    "layer_rho": (0.03, 0.1, 0.3, 1.0),
    "lora_rho": (0.05, 0.1, 0.2, 0.5),
    "sam_rho": (0.005, 0.01, 0.02, 0.05),
    "sigma": (0.05, 0.1, 0.2, 0.4),
    "alpha": (0.5, 2.0, 8.0, 32.0),
}
_EMOJI_GRIDS: Grids = {
    **_TEXT_GRIDS,
    "learning_rate": (2e-3, 5e-3, 1e-2, 2e-2),
    "rho": (0.01, 0.03, 0.1, 0.3),
    "layer_rho": (0.003, 0.01, 0.03, 0.1),
}
_COMMONSENSE_GRIDS: Grids = {**_TEXT_GRIDS, "rho": (0.03, 0.1, 0.3, 1.0), "layer_rho": (0.01, 0.03, 0.1, 0.3)}
_LONG_GRIDS: Grids = {**_TEXT_GRIDS, "rho": (1.0, 2.0, 4.0, 8.0), "layer_rho": (0.3, 0.6, 1.2, 2.4)}


def _text(name: str, length: int, examples: int, epochs: int, data: str = "", grids: Grids = _TEXT_GRIDS) -> Task:
    sizes = {"examples": examples, "length": length, "epochs": epochs, "batch_size": 8}
    held_out = {"validation": 400, "test": 1000, "sharpness_rho": 1.0, "noise": 0.5}
    return TextTask(name, sizes | held_out | {"model": "all-MiniLM-L6-v2"}, grids, data or name)


def _emoji() -> Task:
    settings = {"shots": 4, "steps_per_shot": 10, "epochs": 1, "batch_size": 32, "sharpness_rho": 0.3, "noise": 0.5}
    return EmojiTask("emoji", settings, _EMOJI_GRIDS)


def _commonsense() -> Task:
    sizes = {"examples": 128, "epochs": 4, "batch_size": 16, "sharpness_rho": 1.0, "noise": 0.1}
    return CommonsenseTask("commonsense", sizes | {"model": "SmolLM2-135M-Instruct"}, _COMMONSENSE_GRIDS)


_ALL = (
    _text("sentiment", length=32, examples=128, epochs=6),
    _text("spam", length=48, examples=64, epochs=10),
    _text("subject", length=32, examples=128, epochs=6),
    _text("subject_long", length=32, examples=128, epochs=18, data="subject", grids=_LONG_GRIDS),
    _emoji(),
    _commonsense(),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
