"""`python -m recipes.nlg.export ADAPTER FOLDER`: a plain model of transformers, with the adapter merged in."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from recipes.language.export import config_of, merged, with_adapter
from recipes.language.joint_attention import join_attention, split_attention
from recipes.language.model import load_base, load_tokenizer
from recipes.shared.configs import settings_of_run
from recipes.shared.files import refuse_unless_new

_CLOSE = 1e-2  # of logits in float32; a weight in the wrong place changes them by more


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line, or a list of arguments."""
    parser = argparse.ArgumentParser(
        "python -m recipes.nlg.export",
        description="Write what a run of recipes.nlg has trained as a plain model of transformers, with the adapter "
        "merged in and GPT-2's q, k and v in one layer again.",
    )
    parser.add_argument("adapter", type=Path, help="the peft folder beside a checkpoint of the run")
    parser.add_argument("folder", type=Path, help="to write, which must be empty or not be there")
    parser.add_argument("--model", help="that was adapted; by default the one that the adapter names")
    parsed = parser.parse_args(args)
    try:
        difference = export(parsed.adapter, parsed.folder, parsed.model)
    except MisconfigurationException as error:
        parser.error(str(error))
    print(
        f"{parsed.folder} holds a plain model, whose logits differ from the adapted one's by {difference:.0e}:\n"
        f"  AutoModelForCausalLM.from_pretrained({str(parsed.folder)!r})"
    )


def export(adapter: Path, folder: Path, model: str | None = None) -> float:
    """Write an adapted model as a folder that ``from_pretrained`` loads without peft and without this package.

    Args:
        adapter: the peft folder beside a checkpoint.
        folder: to write.
        model: that was adapted; None takes the one that the adapter names.

    Returns:
        The largest difference between logits of the adapted model and of the written one, as transformers loads it.

    Raises:
        MisconfigurationException: there is no such adapter or model, they don't belong together, the folder holds
            something, a merged weight is not finite, or the written model is another one.
    """
    config = config_of(adapter)
    refuse_unless_new(folder)
    name = model or str(config.base_model_name_or_path)
    run = settings_of_run(adapter)
    base: Any = load_base(name, "float32", None, run.get("model", {}).get("init_args", {}).get("model_config"))
    # The adapter names q_proj and v_proj, which a plain GPT-2 does not have.
    split_attention(base, config.target_modules)
    try:
        net = with_adapter(base, adapter).eval()
    except MisconfigurationException as error:
        raise MisconfigurationException(
            f"{adapter} does not fit {name}; --model gives the model that it was trained on. {error}"
        ) from error
    expected = _logits(net)
    whole = merged(net, adapter)
    join_attention(whole)
    whole.save_pretrained(folder)
    tokenizer = run.get("data", {}).get("init_args", {}).get("tokenizer")
    load_tokenizer(tokenizer or name).save_pretrained(folder)
    # Loaded again from the disk, so that the comparison covers what was saved and not what is in memory.
    written = AutoModelForCausalLM.from_pretrained(folder).eval()
    difference = (_logits(written) - expected).abs().max().item()
    if difference > _CLOSE * max(1.0, expected.abs().max().item()):
        raise MisconfigurationException(
            f"{folder} was written, but its logits differ from those of the adapted model by {difference:.1e}: don't "
            f"use it, and report that {name!r} can't be exported"
        )
    return difference


@torch.no_grad()
def _logits(net: nn.Module) -> Tensor:
    """Of a few tokens that every vocabulary has, in float32."""
    logits: Tensor = net(input_ids=torch.arange(1, 9)[None]).logits
    return logits.float()


if __name__ == "__main__":
    main()
