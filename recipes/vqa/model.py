"""A pretrained vision-language model with its processor, and the answers that it generates."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.language.model import DType, Quantization, load_pretrained, quantization_config, trainable
from recipes.offline import packaged

PACKAGED = "packaged"
# The language model's blocks, by the names that transformers gives them; those of the vision tower differ.
LANGUAGE_MODEL = r".*(language|text)_model.*\.(q|v)_proj"
# Vision towers and connectors, by transformers' names: they are not quantized with the language model. The patterns are
# matched to the beginnings of module names.
_NOT_QUANTIZED = [r"(.*\.)?(visual|vision_tower|vision_model|multi_modal_projector|connector)", r"(.*\.)?lm_head"]
_HINT = (
    "of a vision-language model (image-text-to-text), a local directory with one, or 'packaged' for the model of "
    "`python -m recipes.pretrain.vqa`"
)
DEFAULT_LORA = {"r": 8, "lora_alpha": 16, "target_modules": LANGUAGE_MODEL}


def packaged_model() -> Path:
    """Return the folder of the model that ``python -m recipes.pretrain.vqa`` trains."""
    return packaged.cache_dir() / "easy-vqa-idefics3"


def model_source(name: str) -> str:
    """Return what ``from_pretrained`` loads for a name.

    Raises:
        MisconfigurationException: the name is "packaged", and that model has not been trained yet.
    """
    if name == PACKAGED and not packaged_model().exists():
        raise MisconfigurationException(
            f"model={PACKAGED!r} must be trained first, in about ten minutes: python -m recipes.pretrain.vqa"
        )
    return str(packaged_model()) if name == PACKAGED else name


def load_processor(name: str) -> Any:
    """Load the processor of a model: its tokenizer and its image processor."""
    processor = load_pretrained(AutoProcessor, name, model_source, hint=_HINT)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise MisconfigurationException(
            f"model={name!r} has a {type(processor).__name__}, which takes no images and text: "
            "give a vision-language model (image-text-to-text)"
        )
    return processor


def load_base(name: str, dtype: DType, quantization: Quantization | None = None) -> nn.Module:
    """Load the pretrained model in training mode.

    Args:
        name: a Hub name, a local directory, or "packaged" for the model of ``python -m recipes.pretrain.vqa``.
        dtype: dtype of the weights; "auto" takes the checkpoint's.
        quantization: hold the language model's weights in 4 or 8 bits with bitsandbytes.

    Raises:
        MisconfigurationException: there is no such model, it is of another kind, or bitsandbytes is missing.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype, skipped=_NOT_QUANTIZED)
    return trainable(
        load_pretrained(AutoModelForImageTextToText, name, model_source, hint=_HINT, **options), quantization
    )
