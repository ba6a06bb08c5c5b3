"""A base model with a finished adapter, loaded whole or not at all."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from transformers.models.auto import modeling_auto

from lightning_flatlora import find_pairs
from lightning_flatlora.full_weight import WeightNoise
from lightning_flatlora.pairs.lora_pair import LoRAPair
from recipes.language.adapters import check_base, read_config, read_weights
from recipes.language.batches import padding_id
from recipes.report.options import AdapterFolder, Options
from recipes.report.rounding import check_roundable

_MODELS = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
}
_CLASSES = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
_ONE_CLASS = (None, "single_label_classification")
_PREFIX = "base_model.model."
"""What peft puts before the base's own names in an adapter's file."""
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Adapted:
    """A model that is ready to be measured: in evaluation mode, its factors trainable.

    Attributes:
        label: the adapter's.
        base: name or folder of the base model.
        task: peft's name of it.
        model: base and adapter.
        tokenizer: the adapter's own if its folder holds one, else the base's.
        pairs: the adapter's pairs of factors.
        noise: draws noise on the full weights.
        left_out: layers that can't be perturbed, and why.
    """

    label: str
    base: str
    task: str
    model: PeftModel
    tokenizer: Any
    pairs: list[LoRAPair]
    noise: WeightNoise
    left_out: list[str]


def load_adapter(folder: AdapterFolder, options: Options) -> Adapted:
    """Load a base with one adapter on it; the adapter's folder is only read.

    Args:
        folder: the adapter's.
        options: name of the base, dtype and device.

    Returns:
        The model, of the class that the adapter's task asks for.

    Raises:
        MisconfigurationException: the task can't be measured, a file is missing, or the adapter is of another base.
    """
    base, task = base_and_task(folder, options)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # checked here instead
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft on new transformers
            saved = read_weights(folder.path)
            check_base(base)
            tokenizer = _tokenizer(folder, base)
            model = _base_model(base, task, saved, options, tokenizer)
            model = PeftModel.from_pretrained(
                model, str(folder.path), is_trainable=True, config=read_config(folder.path)
            )
            model.to(options.torch_device)
        _check_whole(saved, model)
        search = find_pairs(model)
        if options.bits:
            check_roundable(search.pairs)
        noise = WeightNoise(model)
    except Exception as error:  # the readers of safetensors and pickles raise types without a common base
        raise MisconfigurationException(
            f"--adapter {folder.path} on --base {base} can't be measured: {error!r:.400}"
        ) from error
    model.eval()
    return Adapted(folder.label, base, task, model, tokenizer, search.pairs, noise, search.left_out + noise.left_out)


def base_and_task(folder: AdapterFolder, options: Options) -> tuple[str, str]:
    """Read the name or folder of an adapter's base, and its task.

    Raises:
        MisconfigurationException: there is no adapter that can be measured.
    """
    config = read_config(folder.path)
    task, base = _task(config), options.base or config.base_model_name_or_path
    if task not in _MODELS or not base:
        raise MisconfigurationException(
            f"--adapter {folder.path} can't be measured: its adapter_config.json must say task_type "
            f"{' or '.join(_MODELS)} or a model's class for one of these, and the base model unless --base does; "
            f"got {task} and {base}"
        )
    return str(base), str(task)


def _task(config: LoraConfig) -> str | None:
    """Return an adapter's task; without one, that of its base's class, which peft then writes instead."""
    if config.task_type:
        return str(config.task_type)
    name = (config.auto_mapping or {}).get("base_model_class")
    for task, classes in _CLASSES.items():
        if name in classes.values():
            return task
    return None


def _tokenizer(folder: AdapterFolder, base: str) -> Any:
    """Load the adapter's own tokenizer or the base's, which pads on the right as batches need it."""
    has_own = (folder.path / "tokenizer_config.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder.path) if has_own else base, padding_side="right")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_id(tokenizer))
    return tokenizer


def _base_model(base: str, task: str, saved: Weights, options: Options, tokenizer: Any) -> Any:
    labels = _labels(saved) if task == "SEQ_CLS" else None
    extra = {"num_labels": labels} if labels else {}
    model, info = _MODELS[task].from_pretrained(base, dtype=options.dtype, output_loading_info=True, **extra)
    in_adapter = {name.removeprefix(_PREFIX) for name in saved}
    missing = sorted(set(info["missing_keys"]) - in_adapter)
    if missing:
        raise ValueError(f"neither base nor adapter holds {', '.join(missing[:3])}, which {task} needs")
    if task == "SEQ_CLS" and (model.config.num_labels < 2 or model.config.problem_type not in _ONE_CLASS):
        raise ValueError("it predicts numbers or several classes at once, and the report is of one class for a text")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # as peft's AutoPeftModel does
        model.resize_token_embeddings(len(tokenizer))
    # A decoder that classifies looks for the last token that is not padding, and rows are padded by the tokenizer's.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def _labels(saved: Weights) -> int | None:
    """Return the number of classes of an adapter's head, by the names under which peft saves one; else None."""
    heads = [saved[name] for name in sorted(saved) if {"classifier", "score"} & set(name.split("."))]
    matrices = [weight for weight in heads if weight.ndim == 2]
    return int(matrices[-1].shape[0]) if matrices else None  # the last of its layers gives the classes


def _check_whole(saved: Weights, model: PeftModel) -> None:
    """Refuse an adapter of a deeper or shallower model: peft only warns of missing keys and ignores surplus ones."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    theirs = {name for name in saved if "lora_" in name}
    ours = {name for name in expected if "lora_" in name}
    if theirs != ours:
        raise ValueError(f"it was trained on another base, with or without {', '.join(sorted(theirs ^ ours)[:3])}")
