"""`python -m recipes.instruction_tuning.export ADAPTER FOLDER`: a plain transformers model, without peft.

The adapter of a run is added to the weights that it was trained on. The folder is what vLLM serves, llama.cpp converts
and any program with transformers loads. It has a model card that says how the run was made. Nothing is sent anywhere
unless `--push_to_hub` names a repository.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from huggingface_hub import HfApi
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from recipes.instruction_tuning.model_card import model_card
from recipes.language.export import config_of, merged, with_adapter
from recipes.language.model import DType, load_pretrained, load_tokenizer
from recipes.language.templates import read_template
from recipes.shared.configs import settings_of_run
from recipes.shared.files import refuse_unless_new


def export(adapter: Path, to: Path, dtype: DType = "auto", base: str | None = None) -> None:
    """Write the merged model, its tokenizer and a model card.

    Args:
        adapter: folder of an adapter in peft's format, such as ``checkpoints/last`` of a run.
        to: the new folder.
        dtype: of the merged weights; "auto" is what the base's checkpoint has.
        base: the model that the adapter belongs to; None takes the name that the adapter has.

    Raises:
        MisconfigurationException: there is no adapter, the base can't be loaded or is another model, the folder holds
            something already, or the merged weights are not finite.
    """
    config = config_of(adapter)
    refuse_unless_new(to)
    base = base or str(config.base_model_name_or_path)
    run = settings_of_run(adapter)
    model = load_adapted(base, adapter, dtype)
    whole = merged(model, adapter)
    whole.save_pretrained(to)
    data = run.get("data", {}).get("init_args", {})
    tokenizer = load_tokenizer(data.get("tokenizer") or base)
    if data.get("chat_template"):
        # What the run was trained with has to be what others ask with.
        given = data["chat_template"]
        tokenizer.chat_template = given if "{" in given else read_template(given)
    # Programs load a vision-language model together with its image processor.
    if "image" in getattr(whole, "input_modalities", ()):
        load_pretrained(AutoProcessor, base).save_pretrained(to)
    tokenizer.save_pretrained(to)
    model_card(base, model.peft_config["default"], run).save(to / "README.md")


def load_adapted(base: str, adapter: Path, dtype: DType) -> PeftModel:
    """A base with its adapter, as a language model or, where the adapter belongs to one, as a vision-language model.

    A base that was quantized in training is loaded whole: 4 bits would not hold the sum.

    Raises:
        MisconfigurationException: the base can't be loaded, or the adapter's weights are those of another model.
    """
    problems = []
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            return with_adapter(load_pretrained(auto_class, base, dtype=dtype), adapter)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.instruction_tuning.export", description=__doc__)
    parser.add_argument("adapter", type=Path, help="folder of the adapter, such as checkpoints/last of a run")
    parser.add_argument("folder", type=Path, help="to write, which must be empty or not be there")
    parser.add_argument("--dtype", choices=get_args(DType), default="auto", help="of the weights (auto: as the base's)")
    parser.add_argument("--base", help="the model that was trained on, where it is elsewhere now")
    parser.add_argument("--push_to_hub", metavar="NAME", help="send it to this repository, private if it is new")
    options = parser.parse_args(arguments)
    try:
        export(options.adapter, options.folder, options.dtype, options.base)
    except MisconfigurationException as error:
        parser.error(str(error))
    print(f"The merged model is in {options.folder}")
    if options.push_to_hub:
        print(f"and in {push(options.folder, options.push_to_hub)}")


if __name__ == "__main__":
    main()
