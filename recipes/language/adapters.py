"""LoRA adapters in folders, perhaps somebody else's: read here before peft or transformers sees them."""

from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, load_peft_weights
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor
from transformers.utils import find_adapter_config_file

from recipes.data.foreign import read_json

_NAMES = """
peft_type task_type peft_version base_model_name_or_path revision bias inference_mode fan_in_fan_out use_rslora use_dora
use_qalora qalora_group_size lora_bias ensure_weight_tying r lora_alpha lora_dropout modules_to_save target_parameters
layer_replication alora_invocation_tokens target_modules exclude_modules layers_pattern layers_to_transform
trainable_token_indices init_lora_weights auto_mapping rank_pattern alpha_pattern loftq_config eva_config corda_config
lora_ga_config arrow_config velora_config monteclora_config kasa_config use_bdlora megatron_core
"""
_PLAIN = frozenset(_NAMES.split())
"""The fields that peft takes as data when it loads an adapter.

Not ``megatron_config``: with it peft 0.18 imports the module that ``megatron_core`` names.
"""


def read_config(folder: Path) -> LoraConfig:
    """Return the configuration of a LoRA adapter; give it to peft, which would otherwise read the file itself.

    Raises:
        MisconfigurationException: the folder holds none, or one of another kind, or one that may run code.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise MisconfigurationException(f"{folder} is not an adapter's folder: it has no {path.name}")
    found = read_json(path)
    kind = found.get("peft_type") if isinstance(found, dict) else None
    if kind != "LORA":
        raise MisconfigurationException(f"{folder}: its {path.name} must say peft_type LORA, got {kind!r:.100}")
    # Other versions of peft write fields that are off.
    others = {name: value for name, value in found.items() if value and name not in _PLAIN}
    if others:
        raise MisconfigurationException(
            f"{path}: only what is known as plain data of LoRA is taken from an adapter, since the rest may run code; "
            f"got {others!r:.300}. Remove it there, or train without it"
        )
    try:
        config = LoraConfig(**{name: value for name, value in found.items() if value is not None and name in _PLAIN})
        are_texts = all(isinstance(name, str) for name in config.target_modules or ())
        if not are_texts or not isinstance(config.auto_mapping, dict | None):
            raise TypeError("auto_mapping must be a dict, and target_modules a text or a list of texts")
    except Exception as error:  # peft refuses some combinations, and stumbles over others
        raise MisconfigurationException(f"{path} can't be used by the installed peft: {error!r:.300}") from error
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return an adapter's weights by name, on the CPU; of a pickle peft reads only weights.

    Raises:
        MisconfigurationException: the folder has none, or what it has can't be read.
    """
    files = (folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME)
    # Otherwise peft would look for them on the Hub, in a repository of the folder's name.
    if not any(file.is_file() for file in files):
        raise MisconfigurationException(f"{folder} holds no weights of an adapter: copy {files[0].name} there")
    try:
        saved: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
        if not all(isinstance(weight, Tensor) for weight in saved.values()):
            raise TypeError("they are not all tensors")
    except Exception as error:  # the readers of safetensors and pickles raise types without a common base
        raise MisconfigurationException(f"the weights in {folder} can't be read: {error!r:.300}") from error
    return saved


def check_base(source: str) -> None:
    """Refuse a base whose folder or repository holds an adapter that :func:`read_config` refuses.

    transformers would load that adapter with the base.
    """
    found = find_adapter_config_file(source)
    if found is not None:
        read_config(Path(found).parent)
