"""A pretrained vision-language model with its processor, and the answers that it generates."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes import packaged
from recipes.instruction_tuning.model import DType, decoded, ending, padding_id
from recipes.sharding import is_sharded

PACKAGED = "packaged"
# The language model's blocks, by the names that transformers gives them; the vision tower's are other ones.
LANGUAGE_MODEL = r".*(language|text)_model.*\.(q|v)_proj"
DEFAULT_LORA = {"r": 8, "lora_alpha": 16, "target_modules": LANGUAGE_MODEL}


def packaged_model() -> Path:
    """Where ``python -m recipes.vqa.offline`` leaves its model."""
    return packaged.cache_dir() / "easy-vqa-idefics3"


def model_source(name: str) -> str:
    """What ``from_pretrained`` takes for a name.

    Raises:
        MisconfigurationException: the name is "packaged", and that model has not been trained yet.
    """
    if name == PACKAGED and not packaged_model().exists():
        raise MisconfigurationException(
            f"model={PACKAGED!r} has to be trained once, in a few minutes: python -m recipes.vqa.offline"
        )
    return str(packaged_model()) if name == PACKAGED else name


def load_processor(name: str) -> Any:
    """The processor of a model: its tokenizer and its image processor."""
    try:
        processor = AutoProcessor.from_pretrained(model_source(name))
    except (OSError, ValueError, ImportError) as error:
        raise MisconfigurationException(_not_found(name, error)) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise MisconfigurationException(
            f"model={name!r} has a {type(processor).__name__}, which takes no images and text: "
            "give a vision-language model (image-text-to-text)"
        )
    return processor


def load_base(name: str, dtype: DType) -> nn.Module:
    """The pretrained model in training mode.

    Args:
        name: a Hub name, a local directory, or "packaged" for the model of ``python -m recipes.vqa.offline``.
        dtype: of the weights; "auto" takes what the checkpoint has.

    Raises:
        MisconfigurationException: there is no such model, or it is of another kind.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(model_source(name), dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise MisconfigurationException(_not_found(name, error)) from error
    model.train()  # from_pretrained gives it in eval mode, where LoRA's dropout would be off
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def generate_answers(
    net: nn.Module, inputs: dict[str, Tensor], tokenizer: Any, max_new_tokens: int, answer_end: str = ""
) -> list[str]:
    """The model's most likely answers, token by token, to prompts padded on the left.

    They end where the chat template would end them, see :func:`recipes.instruction_tuning.model.ending`.

    Where the model is sharded, every rank has to call it, and goes on until all have their answers.
    """
    generate: Any = net.generate
    tokens = generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding_id(tokenizer),
        synced_gpus=is_sharded(net),
        **ending(net, tokenizer, answer_end),
    )[:, inputs["input_ids"].shape[1] :]
    return decoded(tokens, tokenizer, answer_end)


def _not_found(name: str, error: Exception) -> str:
    return (
        f"model={name!r} can't be loaded: give the name of a vision-language model on the Hub (image-text-to-text; "
        f"reachable, or in the local cache), a local directory, or {PACKAGED!r} for the model of "
        f"`python -m recipes.vqa.offline`. {type(error).__name__}: {error}"
    )
