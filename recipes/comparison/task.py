"""What a run needs from a task, whatever its model and data are."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
from peft import PeftModel
from torch import Tensor

from recipes.shared.precision import Precision
from recipes.shared.training import RecipeModule
from recipes.studies.plan import Config

Batch = dict[str, Any]
Grids = Mapping[str, Sequence[float]]


class Judged(NamedTuple):
    """What a model makes of a batch.

    Attributes:
        correct: examples whose most probable answer is the right one, shape ().
        loss: sum of the losses, nats, shape ().
        terms: how many losses that is, shape ().
        examples: their number.
    """

    correct: Tensor
    loss: Tensor
    terms: Tensor
    examples: int


class Task(ABC):
    """A model and data to fine-tune it with, in three parts that share nothing.

    Args:
        name: of the task.
        settings: all that decides a result besides the method, its configuration and the seed; every row holds them.
            ``epochs``, ``sharpness_rho`` and ``noise`` (sigma), at which every method's sharpness and expected
            sharpness are measured, are always among them; ``precision`` is once :meth:`computed_in` has added it; the
            others are the task's own.
        grids: values to choose from on the validation part, by the names that :mod:`recipes.comparison.methods` gives.
    """

    def __init__(self, name: str, settings: dict[str, Any], grids: Grids) -> None:
        self.name = name
        self.settings = settings
        self.grids = grids
        self._held_out: dict[str, Sequence[Batch]] = {}

    @property
    def precision(self) -> Precision:
        """Of its runs."""
        precision: Precision = self.settings["precision"]
        return precision

    def computed_in(self, precision: Precision) -> "Task":
        """The same task with a precision in its settings."""
        task = copy.copy(self)
        task.settings = {**self.settings, "precision": precision}
        return task

    def batches(self, trainer: L.Trainer, part: str) -> Sequence[Batch]:
        """All examples of a part, once, without augmentation; "train" is what the trainer has trained on."""
        if part == "train":
            return self.read(trainer, part)
        if part not in self._held_out:
            self._held_out[part] = self.read(trainer, part)
        return self._held_out[part]

    def prepare(self) -> None:  # noqa: B027 - most tasks have nothing to make
        """Make, once, what a run needs beside its data, before the run's seed is set."""

    @abstractmethod
    def module(self, config: Config, full: bool) -> RecipeModule:
        """The module with its network inside, ready to train.

        Args:
            config: ``learning_rate``, and perhaps ``weight_decay`` and ``dropout`` (of the adapter).
            full: train all weights, and no adapter.
        """

    @abstractmethod
    def data(self, seed: int) -> L.LightningDataModule:
        """The training examples that a seed draws, in batches whose order it decides too."""

    @abstractmethod
    def read(self, trainer: L.Trainer, part: str) -> Sequence[Batch]:
        """What :meth:`batches` gives."""

    @abstractmethod
    def loss(self, module: Any, batch: Batch) -> Tensor:
        """Mean loss of training examples as in training, in nats, shape ()."""

    @abstractmethod
    def judge(self, module: Any, batch: Batch) -> Judged:
        """What the model makes of examples of "validation" or "test"."""


def with_network(module: Any, full: bool) -> Any:
    """A recipe's module with its network inside, of which ``full`` has all weights trained."""
    module.configure_model()
    if full:
        train_everything(module.net)
    return module


def train_everything(net: PeftModel) -> None:
    """Full fine-tuning: all weights of the base are trained, and the adapter has no part in it."""
    net.base_model.disable_adapter_layers()
    for name, parameter in net.get_base_model().named_parameters():
        parameter.requires_grad_("lora_" not in name)
