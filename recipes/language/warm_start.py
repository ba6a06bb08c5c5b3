"""The LoRA weights of another run's adapter, as the start of this one's."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from recipes.language.adapters import read_weights
from recipes.language.export import config_of

_SAME = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""The settings that must be equal, so that the same factors give the same change of the weights."""


def load_factors(net: PeftModel, folder: str) -> None:
    """Load the LoRA weights that peft saved in a folder into a model; heads and other weights do not change.

    Args:
        net: a model with a LoRA adapter.
        folder: a folder with ``adapter_config.json``, such as the one next to each checkpoint.

    Raises:
        MisconfigurationException: there is no adapter, or its layers or settings differ.
    """
    folder = str(Path(folder).expanduser())
    saved, own = config_of(Path(folder)), net.peft_config["default"]
    if any(getattr(saved, name) != getattr(own, name) for name in _SAME):
        was = {name: getattr(saved, name) for name in _SAME}
        raise MisconfigurationException(f"start_from={folder!r} was trained with other settings: set {was} in lora")
    factors = _factors(read_weights(Path(folder)))
    present = get_peft_model_state_dict(net)
    if _shapes(factors) != _shapes(_factors(present)):
        raise MisconfigurationException(f"start_from={folder!r} adapts other layers than lora, or another model")
    set_peft_model_state_dict(net, present | factors)  # it wants the head too


def _factors(weights: dict[str, Any]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if "lora_" in name}


def _shapes(factors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: factor.shape for name, factor in factors.items()}
