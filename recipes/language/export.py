"""A run's adapter in the weights of its base: a plain transformers model, without peft.

The folder is what vLLM serves, llama.cpp converts and any program with transformers loads. It has a model card that
says how the run was made. Nothing is sent anywhere unless `--push_to_hub` names a repository.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from recipes.language.joint_attention import join_attention, split_attention
from recipes.language.model import DType, ending, load_pretrained, load_tokenizer
from recipes.language.model_card import model_card
from recipes.language.templates import TemplateEncoder, read_template
from recipes.shared.configs import written_settings
from recipes.shared.files import refuse_unless_new
from recipes.shared.taken import runs_no_code


def main(
    adapter: Path, folder: Path, dtype: DType = "auto", base: str | None = None, push_to_hub: str | None = None
) -> None:
    """Write a run's adapter in the weights of its base: a plain transformers model, with a model card.

    Args:
        adapter: folder of the adapter, such as checkpoints/last of a run.
        folder: to write, which must be empty or not be there.
        dtype: of the weights; auto is the base's.
        base: the model that was trained on, if it is elsewhere now.
        push_to_hub: send it to this repository, which is private if it is new.
    """
    export(adapter, folder, dtype, base)
    print(f"The merged model is in {folder}")
    if push_to_hub:
        print(f"and in {push(folder, push_to_hub)}")


def export(adapter: Path, to: Path, dtype: DType = "auto", base: str | None = None) -> None:
    """Write the merged model, its tokenizer and a model card.

    Args:
        adapter: folder of an adapter in peft's format, such as ``checkpoints/last`` of a run.
        to: the new folder.
        dtype: of the merged weights; "auto" is what the base's checkpoint has.
        base: the model that the adapter belongs to; None takes the name that the adapter has.

    Raises:
        MisconfigurationException: there is no adapter or it can't be merged, the base can't be loaded or is another
            model, the folder holds something already, or the merged weights are not finite.
    """
    config = config_of(adapter)
    refuse_unless_new(to)
    if config.layer_replication:
        raise MisconfigurationException(
            "an adapter with layer_replication can't be merged: the copies of a layer share their weights"
        )
    base = base or str(config.base_model_name_or_path)
    run = written_settings(adapter)
    fields = run.get("model", {}).get("init_args", {}).get("model_config") or {}
    if not runs_no_code(fields):  # the run may be somebody else's
        raise MisconfigurationException(
            f"model_config {fields} in the config.yaml of {adapter} may run code or write files: leave only fields of "
            "the model's configuration there"
        )
    model = load_adapted(base, adapter, dtype, **fields)
    whole = merged(model, adapter)
    join_attention(whole)
    data = run.get("data", {}).get("init_args", {})
    tokenizer = load_tokenizer(data.get("tokenizer") or base)
    if data.get("chat_template"):
        # What the run was trained with has to be what others ask with.
        given = data["chat_template"]
        if "{" not in given and not given.endswith(".jinja"):
            raise MisconfigurationException(
                f"chat_template={given!r} in the run's config.yaml: only a template or a .jinja file is exported"
            )
        tokenizer.chat_template = given if "{" in given else read_template(given)
    # Programs load a vision-language model together with its image processor.
    if "image" in getattr(whole, "input_modalities", ()):
        load_pretrained(AutoProcessor, base).save_pretrained(to)
    if isinstance(tokenizer.chat_template, str):
        _end_answers(whole, tokenizer, data.get("template_arguments"))
    whole.save_pretrained(to)
    tokenizer.save_pretrained(to)
    model_card(base, model.peft_config["default"], run).save(to / "README.md")


def _end_answers(model: Any, tokenizer: Any, arguments: dict[str, Any] | None) -> None:
    """Let programs that generate with the model stop where its chat template ends an answer."""
    try:
        end = TemplateEncoder(tokenizer, None, None, arguments).answer_end
    except MisconfigurationException:  # a template for images, too
        return
    if end:  # it is not the tokenizer's end token
        stops = ending(model, tokenizer, end)
        model.generation_config.eos_token_id = stops["eos_token_id"]
        if "stop_strings" in stops:
            print(f"Answers end with {end!r}, which is not one token: give it as a stop string where you generate")


def load_adapted(base: str, adapter: Path, dtype: DType, **fields: Any) -> PeftModel:
    """A base with its adapter, as a language model or, where the adapter belongs to one, as a vision-language model.

    A base that was quantized in training is loaded whole: 4 bits would not hold the sum.

    Args:
        base: its name.
        adapter: the folder.
        dtype: of the weights.
        fields: of the model's configuration that the run has changed.

    Raises:
        MisconfigurationException: the base can't be loaded, or the adapter's weights are those of another model.
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


def push(folder: Path, repository: str) -> str:
    """Send a folder to the Hub, into a repository that is private if it is new.

    Returns:
        The repository's address.
    """
    api = HfApi()
    address = api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=str(folder))
    return str(address)


def config_of(adapter: Path) -> PeftConfig:
    """The configuration of an adapter, which names its base.

    Raises:
        MisconfigurationException: the folder holds no adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise MisconfigurationException(
            f"{adapter} holds no adapter_config.json: give the folder next to a checkpoint, such as checkpoints/last"
        )
    config = PeftConfig.from_pretrained(str(adapter))
    if getattr(config, "megatron_config", None):  # peft 0.18 imports the module that it names
        raise MisconfigurationException(f"{adapter} is an adapter for Megatron, which is not read")
    return config


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
