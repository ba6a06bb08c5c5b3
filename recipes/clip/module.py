"""The base class of the LightningModules for open_clip models."""

from functools import cached_property
from typing import Any

from typing_extensions import override

from recipes.clip.model import Clip, hold_statistics, load_clip
from recipes.training.module import RecipeModule


class ClipModule(RecipeModule):
    """An open_clip model with LoRA.

    Args:
        model: an open_clip name, or ``hf-hub:`` and a Hub name, or ``local-dir:`` and a folder.
        pretrained: an open_clip tag, or a file with weights; None starts from random weights, unless ``model`` brings
            its own.
        quick_gelu: whether the weights were trained with QuickGELU; None follows the tag or else the model's
            configuration. A file of OpenAI's weights needs true.
        lora: fields of peft's LoraConfig, and which ``projections``, ``blocks`` and ``towers`` get an adapter.
        kwargs: the optimizer's settings, see :class:`recipes.training.module.RecipeModule`.
    """

    task = "zero-shot-image-classification"

    def __init__(self, model: str, pretrained: str | None, quick_gelu: bool | None, lora: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_name = model
        self.pretrained = pretrained
        self.quick_gelu = quick_gelu
        self.lora = lora
        self.augmentation: dict[str, Any] | None = None

    @cached_property
    def clip(self) -> Clip:
        """The pretrained model, tokenizer and preprocessing; the adapter goes into its ``net``."""
        return load_clip(self.model_name, self.pretrained, self.quick_gelu, self.augmentation)

    @override
    def must_fit(self) -> dict[str, Any]:
        return dict(self.clip.sizes)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        hold_statistics(self)
