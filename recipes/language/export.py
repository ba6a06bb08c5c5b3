"""What the exports of the language recipes share: an adapter on its base, and the settings of its run."""

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn


def base_of(adapter: Path) -> str:
    """The name of the model that an adapter names as its base.

    Raises:
        MisconfigurationException: the folder holds no adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise MisconfigurationException(
            f"{adapter} holds no adapter_config.json: give the folder beside a checkpoint, such as checkpoints/last"
        )
    return str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)


def run_settings(adapter: Path) -> dict[str, Any]:
    """The settings of the run that an adapter is from; empty where the folder lies outside of a run."""
    path = adapter.resolve().parent.parent / "config.yaml"  # of runs/…/version_N/checkpoints/NAME
    if not path.is_file():
        return {}
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    is_of_run = isinstance(settings, dict) and isinstance(settings.get("model"), dict)
    return settings if is_of_run else {}  # another program may have a file of that name


def with_adapter(base: nn.Module, adapter: Path) -> PeftModel:
    """A base with an adapter that was trained on it.

    Raises:
        MisconfigurationException: the adapter's weights are those of another model.
    """
    saved = load_peft_weights(str(adapter), device="cpu")
    try:
        model = PeftModel.from_pretrained(base, str(adapter))
    except (ValueError, RuntimeError) as error:
        raise MisconfigurationException(str(error)) from error
    # peft only warns of weights that it has no place for, or lacks, and the merged model would be the base there.
    if get_peft_model_state_dict(model).keys() != saved.keys():
        raise MisconfigurationException("the adapter's weights have other names than this model's")
    return model


def merged(model: PeftModel, adapter: Path) -> Any:
    """The base, with the adapter in its weights.

    Raises:
        MisconfigurationException: a merged weight would not be finite.
    """
    try:
        # safe_merge looks for values that are not finite, before they replace the weights.
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise MisconfigurationException(f"{adapter} can't be merged into its base: {error}") from error
