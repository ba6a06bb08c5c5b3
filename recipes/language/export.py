"""Merge a run's adapter into its base: a plain transformers model, without peft.

vLLM serves the folder, llama.cpp converts it, and any program with transformers loads it. Its model card says how the
run was made.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from recipes.command_line.configs import written_settings
from recipes.command_line.model_card import model_card
from recipes.command_line.taken import runs_no_code
from recipes.data.files import refuse_unless_new
from recipes.language.adapters import read_config, read_weights
from recipes.language.joint_attention import join_attention, split_attention
from recipes.language.model import DType, ending, load_pretrained, load_tokenizer
from recipes.language.templates import TemplateEncoder, read_template


def export(adapter: Path, folder: Path, dtype: DType = "auto", base: str | None = None) -> None:
    """Merge a run's adapter into its base, and write a plain transformers model with tokenizer and model card.

    Args:
        adapter: the adapter's folder, such as checkpoints/last of a run.
        folder: output folder, new or empty.
        dtype: dtype of the weights; auto is the base's.
        base: the model that was trained on, if it has moved.

    Raises:
        MisconfigurationException: there is no adapter or it can't be merged, the base can't be loaded or is another
            model, or the folder is not empty.
    """
    refuse_unless_new(folder)
    base = base or str(config_of(adapter).base_model_name_or_path)
    run = written_settings(adapter)
    model = load_adapted(base, adapter, dtype, _model_config(run))
    whole: Any = model.merge_and_unload(safe_merge=True)  # refuses weights that are not finite
    join_attention(whole)
    data = run.get("data", {}).get("init_args", {})
    tokenizer = load_tokenizer(data.get("tokenizer") or base)
    if data.get("chat_template"):
        # The exported model must be prompted as the run was trained.
        tokenizer.chat_template = _template(str(data["chat_template"]))
    # Programs load a vision-language model together with its image processor.
    has_images = "image" in getattr(whole, "input_modalities", ())
    if has_images:
        load_pretrained(AutoProcessor, base).save_pretrained(folder)
    if isinstance(tokenizer.chat_template, str):
        _end_answers(whole, tokenizer, data.get("template_arguments"))
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    task = "image-text-to-text" if has_images else "text-generation"
    model_card(base, vars(model.peft_config["default"]), run, task, "transformers").save(folder / "README.md")
    print(f"The merged model is in {folder}")


def _model_config(run: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the model's configuration that a run, perhaps somebody else's, has changed."""
    fields: dict[str, Any] = run.get("model", {}).get("init_args", {}).get("model_config") or {}
    if not isinstance(fields, dict) or not runs_no_code(fields):
        raise MisconfigurationException(
            f"model_config {fields} in the run's config.yaml may run code or write files: leave only fields of the "
            "model's configuration there"
        )
    return fields


def _template(given: str) -> str:
    if "{" not in given and not given.endswith(".jinja"):
        raise MisconfigurationException(
            f"chat_template={given!r} in the run's config.yaml: only a template or a .jinja file is exported"
        )
    return read_template(given)


def _end_answers(model: Any, tokenizer: Any, arguments: dict[str, Any] | None) -> None:
    """Make programs that generate with the model stop where its chat template ends an answer."""
    if not isinstance(arguments, dict | None):
        raise MisconfigurationException(f"template_arguments in the run's config.yaml must be a dict, got {arguments}")
    try:
        end = TemplateEncoder(tokenizer, tokenizer.chat_template, None, arguments).answer_end
    except MisconfigurationException:  # a template for images, too
        return
    if end:  # and it is not the tokenizer's end token
        stops = ending(model, tokenizer, end)
        model.generation_config.eos_token_id = stops["eos_token_id"]
        if "stop_strings" in stops:
            print(f"Answers end with {end!r}, which is not one token: pass it as a stop string when you generate")


def load_adapted(base: str, adapter: Path, dtype: DType, fields: dict[str, Any]) -> PeftModel:
    """Load a base with its adapter, as a language model or, if the adapter belongs to one, as a vision-language model.

    A base that was quantized in training is loaded without quantization: 4 bits would not hold the sum.

    Args:
        base: name of the base.
        adapter: the adapter's folder.
        dtype: dtype of the weights.
        fields: fields of the model's configuration that the run has changed.

    Raises:
        MisconfigurationException: the base can't be loaded, or the adapter belongs to another model.
    """
    problems = []
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            model = load_pretrained(auto_class, base, dtype=dtype, **fields)
            # The adapter may name q_proj and v_proj, which a plain GPT-2 does not have.
            split_attention(model, config_of(adapter).target_modules)
            return with_adapter(model, adapter)
        except MisconfigurationException as error:
            problems.append(f"{auto_class.__name__}: {error}")
    raise MisconfigurationException(
        f"{adapter} does not fit {base}; --base gives the model that it was trained on. {' '.join(problems)}"
    )


def config_of(adapter: Path) -> LoraConfig:
    """Return the configuration of an adapter that can be merged, which names its base.

    Raises:
        MisconfigurationException: the folder holds no adapter, or its kind is not supported.
    """
    config = read_config(adapter)
    if config.layer_replication:  # replicated layers share the weights to merge into
        raise MisconfigurationException(f"{adapter}: adapters with layer_replication are not supported")
    return config


def with_adapter(base: nn.Module, adapter: Path) -> PeftModel:
    """Load an adapter onto the base that it was trained on.

    Raises:
        MisconfigurationException: the adapter belongs to another model.
    """
    saved = read_weights(adapter)
    try:
        model = PeftModel.from_pretrained(base, str(adapter), config=config_of(adapter))
    except Exception as error:  # for values of the wrong kind peft raises any type
        raise MisconfigurationException(str(error)) from error
    # peft only warns of unknown or missing weights, and the merged model would be the base there.
    if get_peft_model_state_dict(model).keys() != saved.keys():
        raise MisconfigurationException("the adapter's weights have other names than this model's")
    return model
