"""An open_clip model with a LoRA adapter in its attention, its features, and the export to plain open_clip."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_flatlora.clip import check_reached, joined_state_dict, lora_targets, split_attention
from recipes.command_line.arguments import CLIP_FIELDS
from recipes.command_line.taken import runs_no_code

DEFAULT_LORA = {"r": 2, "lora_alpha": 1, "use_rslora": True, "lora_dropout": 0.25}
"""CLIP-LoRA's adapter, on q, k and v in all blocks of both towers; its scaling is alpha / sqrt(r), 0.71."""


@dataclass
class Clip:
    """A pretrained model and what belongs to it.

    Attributes:
        net: an open_clip model with split attention, frozen, in training mode.
        tokenizer: texts to token ids (n, context length).
        preprocess_train: an image to (3, height, width), with random crops.
        preprocess_val: the same without randomness.
        sizes: sizes that tell this model from one of another kind or size.
    """

    net: nn.Module
    tokenizer: Callable[..., Tensor]
    preprocess_train: Callable[..., Tensor]
    preprocess_val: Callable[..., Tensor]
    sizes: dict[str, int]


def load_clip(
    model: str,
    pretrained: str | None = None,
    quick_gelu: bool | None = None,
    augmentation: dict[str, Any] | None = None,
) -> Clip:
    """Load a model that open_clip knows or can read.

    Weights that were trained with QuickGELU, such as OpenAI's, run with it, whatever the configuration of that name
    says; open_clip lists these tags, but itself only warns and runs them with GELU.

    Args:
        model: an open_clip name, "hf-hub:OWNER/NAME", "local-dir:FOLDER", or a .json file with a configuration.
        pretrained: an open_clip tag, or a file with weights; None gives a named model random weights, and is needed for
            hf-hub: and local-dir:, which bring their own.
        quick_gelu: whether the weights were trained with QuickGELU; None follows the tag or else the model's
            configuration.
        augmentation: fields of open_clip's AugmentationCfg, for the preprocessing in training.

    Raises:
        MisconfigurationException: there is no such model, tag, file or field, or the weights can't be loaded.
    """
    if model.startswith(("hf-hub:", "local-dir:")) and pretrained is not None:
        raise MisconfigurationException(
            f"model={model!r} brings its own weights: set pretrained to null, got {pretrained!r}"
        )
    # force_quick_gelu can only switch it on; to switch it off, the configuration is overridden.
    other = {"quick_gelu": False} if quick_gelu is False else {}
    name = Path(model).stem if model.endswith(".json") else model
    try:
        if name != model:
            open_clip.add_model_config(Path(model).resolve(strict=True))
        # From a file or a repository, whose tokenizer open_clip would load with any arguments.
        if not runs_no_code(open_clip.get_model_config(name) or {}):
            raise ValueError("its configuration may run code")
        quick = wants_quick_gelu(name, pretrained) if quick_gelu is None else quick_gelu
        net, train, val = open_clip.create_model_and_transforms(
            name, pretrained, force_quick_gelu=quick, aug_cfg=augmentation, **other
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"model={model!r}, pretrained={pretrained!r} can't be loaded: {error}"
        ) from error
    # open_clip keeps q, k and v in one parameter, and peft adapts layers.
    split_attention(net)
    # Counted now: an adapter will be added, and sharding may leave only a part of each weight.
    image = sum(parameter.numel() for parameter in net.visual.parameters())
    every = sum(parameter.numel() for parameter in net.parameters())
    sizes = {"weights of the image tower": image, "weights of the rest": every - image}
    return Clip(net.requires_grad_(False).train(), tokenizer, train, val, sizes)


def wants_quick_gelu(model: str, pretrained: str | None) -> bool:
    """Return whether a tag's weights were trained with QuickGELU while the model's configuration may lack it.

    A file of weights does not say so; it runs with the configured activation, and a message is printed.

    Example:
        >>> wants_quick_gelu("ViT-B-16", "openai"), wants_quick_gelu("ViT-B-16", "laion2b_s34b_b88k")
        (True, False)
    """
    if pretrained is None:
        return False
    if not open_clip.is_pretrained_cfg(model, pretrained):
        rank_zero_info(
            f"The weights in {pretrained} are run with the activation in the configuration of {model}. If they were "
            "trained with another, such as OpenAI's with QuickGELU, set quick_gelu"
        )
        return False
    return bool(open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False))


def add_lora(net: nn.Module, lora: dict[str, Any]) -> PeftModel:
    """Add a LoRA adapter in float32 to the model, with all else frozen.

    Args:
        net: model from :func:`load_clip`.
        lora: fields of peft's LoraConfig, and where the adapter goes: ``projections``, ``blocks`` and ``towers`` of
            :func:`lightning_flatlora.clip.lora_targets`, or peft's own ``target_modules``.

    Raises:
        MisconfigurationException: a setting is wrong, or LoRA can't reach any layer there.
    """
    settings = dict(lora)
    where = {name: settings.pop(name) for name in CLIP_FIELDS if name in settings}
    if where and "target_modules" in settings:
        raise MisconfigurationException(
            f"lora={lora!r} says twice where the adapter goes: give either target_modules or {', '.join(where)}"
        )
    try:
        config = LoraConfig(**settings)
        if "target_modules" not in settings:
            config.target_modules = lora_targets(net, **where)
            # Some forwards read a layer's weight without calling the layer; LoRA there would do nothing.
            check_reached(net, config.target_modules, *_example(net))
        return cast("PeftModel", get_peft_model(net, config))
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"lora={lora!r} can't be used: {error}") from error


def hold_statistics(net: nn.Module) -> None:
    """Keep the running statistics of a frozen tower's batch norms, which then normalize by them in training too.

    Call it in ``on_train_start``: earlier, Lightning warns about modules in evaluation mode; from then on, it keeps
    each module's mode.
    """
    for module in net.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


def image_features(net: Any, images: Tensor) -> Tensor:
    """Return normalized features (n, d) of preprocessed images (n, 3, height, width)."""
    return cast("Tensor", net.encode_image(images, normalize=True))


def text_features(net: Any, tokens: Tensor) -> Tensor:
    """Return normalized features (n, d) of token ids (n, context length)."""
    return cast("Tensor", net.encode_text(tokens, normalize=True))


def export_open_clip(net: nn.Module) -> dict[str, Tensor]:
    """Return the weights under open_clip's names, with the adapter merged in; ``net`` itself does not change.

    Args:
        net: model from :func:`load_clip` or :func:`add_lora`, not sharded.

    Returns:
        A state dict that a plain open_clip model of the same configuration loads with ``strict=True``.
    """
    # Merging changes the model, which may still be training.
    copied = copy.deepcopy(net)
    return joined_state_dict(copied.merge_and_unload() if isinstance(copied, PeftModel) else copied)


def _example(net: Any) -> tuple[Tensor, Tensor]:
    """Return an image of zeros and a text of ones and zeros, of the shapes that the model takes."""
    size = net.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    text = torch.zeros(1, net.context_length, dtype=torch.long)
    text[0, :2] = 1
    device = next(net.parameters()).device
    return torch.zeros(1, 3, height, width, device=device), text.to(device)
