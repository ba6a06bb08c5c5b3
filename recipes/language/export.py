"""What the exports of the language recipes share: an adapter on its base, and in its weights."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn


def config_of(adapter: Path) -> PeftConfig:
    """The configuration of an adapter, which names its base.

    Raises:
        MisconfigurationException: the folder holds no adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise MisconfigurationException(
            f"{adapter} holds no adapter_config.json: give the folder beside a checkpoint, such as checkpoints/last"
        )
    return PeftConfig.from_pretrained(str(adapter))


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
