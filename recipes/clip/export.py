"""``python -m recipes.clip.export RUN_CHECKPOINT FOLDER``: a plain open_clip model, with the adapter merged in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import open_clip
import torch
from jsonargparse import ArgumentError, auto_cli
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_flatlora import load_adapter_checkpoint
from recipes.clip.model import export_open_clip, image_features, text_features
from recipes.command_line.configs import read_settings
from recipes.command_line.mistakes import without_traceback
from recipes.command_line.model_card import model_card
from recipes.command_line.taken import taken
from recipes.data.files import refuse_unless_new

_CONFIG, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_CLOSE = 1e-3  # largest difference of normalized features; a wrong weight changes them by more


def main(checkpoint: Path, folder: Path, config: Path | None = None) -> None:
    """Merge the adapter of a CLIP recipe's run into its model, and write a plain open_clip model.

    Args:
        checkpoint: a .ckpt file of the run.
        folder: output folder, new or empty; open_clip loads it as "local-dir:FOLDER".
        config: the run's config.yaml; by default the one in the folder above the checkpoint's.
    """
    difference = export(checkpoint, folder, config)
    name = f"local-dir:{folder}"
    print(
        f"{folder} holds a plain open_clip model, whose features differ from the run's by {difference:.0e}.\n"
        f"  model, _, preprocess = open_clip.create_model_and_transforms({name!r})\n"
        f"  tokenizer = open_clip.get_tokenizer({name!r})"
    )


def export(checkpoint: Path, folder: Path, config: Path | None = None) -> float:
    """Write a run's model as :func:`main` does, and return the largest difference between its and the run's features.

    Raises:
        MisconfigurationException: a file is missing, the two don't belong together, or the folder is not empty.
    """
    refuse_unless_new(folder)
    config = config or checkpoint.parent.parent / "config.yaml"
    module = trained(checkpoint, config)
    clip = module.clip
    expected = features(module.net, clip.preprocess_val, clip.tokenizer)
    write(module, folder)
    run, _ = taken(read_settings(config))
    model_card(module.model_name, module.lora, run, module.task, "open_clip").save(folder / "README.md")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    actual = features(model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}"))
    difference = (actual - expected).abs().max().item()
    if difference > _CLOSE:
        raise MisconfigurationException(
            f"{folder} was written, but its features differ from the run's by {difference:.1e}: don't use it, and "
            f"report that model={module.model_name!r}, pretrained={module.pretrained!r} can't be exported"
        )
    return difference


def trained(checkpoint: Path, config: Path) -> Any:
    """Load the LightningModule of a run with the weights of a checkpoint, in evaluation mode."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model")
    try:
        # The run may come from somebody else.
        settings, others = taken(read_settings(config))
        if "model" not in settings:
            raise ValueError(f"it names classes outside the recipes, which are not imported: {', '.join(others)}")
        module = parser.instantiate_classes(parser.parse_object({"model": settings["model"]})).model
        module.configure_model()
        load_adapter_checkpoint(module, checkpoint)
    except (ArgumentError, MisconfigurationException, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())  # PyTorch writes one over many lines
        raise MisconfigurationException(
            f"{checkpoint} does not fit the model in {config}; give the run's own --config. {reason}"
        ) from error
    return module.eval()


def write(module: Any, folder: Path) -> None:
    """Write the model's configuration and weights, and its tokenizer if it has its own files."""
    folder.mkdir(parents=True, exist_ok=True)
    state = module.open_clip_state() if hasattr(module, "open_clip_state") else export_open_clip(module.net)
    # safetensors refuses tensors that share memory or are not contiguous.
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in state.items()}, folder / _WEIGHTS)
    base = module.net.get_base_model() if hasattr(module.net, "get_base_model") else module.net
    name = module.model_name
    model_config = open_clip.get_model_config(Path(name).stem if name.endswith(".json") else name)
    # A tag's weights may need another activation than the configuration of that name gives.
    model_config["quick_gelu"] = any(isinstance(part, QuickGELU) for part in base.modules())
    if hasattr(module.clip.tokenizer, "save_pretrained"):
        module.clip.tokenizer.save_pretrained(folder)
    save_config_for_hf(base, folder / _CONFIG, model_config)  # last: with it the folder counts as a model


@torch.no_grad()
def features(net: nn.Module, preprocess: Callable[[Image.Image], Tensor], tokenizer: Callable[[str], Tensor]) -> Tensor:
    """Return normalized features of an image of noise and of a text, (2, D)."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    image = preprocess(Image.fromarray(noise))[None]
    return torch.cat([image_features(net, image), text_features(net, tokenizer("a photo of a cat"))])


if __name__ == "__main__":
    with without_traceback():
        auto_cli(main, prog="python -m recipes.clip.export")
