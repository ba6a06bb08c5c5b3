"""The model card of a run's adapter, and of an exported model."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from recipes.command_line.configs import methods_of_run

_PACKAGES = ("lightning-flatlora", "lightning", "torch", "transformers", "peft")
_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
_SETTINGS = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")


def model_card(base: str, lora: Any, run: dict[str, Any], task: str | None, library: str) -> ModelCard:
    """Return a text in the Hub's form that says how a model was made.

    Args:
        base: the model that was trained on.
        lora: fields of its LoRA's configuration; None without an adapter.
        run: the run's settings, as LightningCLI writes them into ``config.yaml``; empty if they are not known.
        task: the Hub's name of the model's task.
        library: the one that loads the files: "peft" for the adapter itself, another one for a whole model.
    """
    methods = list(methods_of_run(run))
    if "rho" in (run.get("model", {}).get("init_args") or {}):
        methods.append("FMLoRA")  # of FMLoRAModule
    settings = {
        "lora": {field: (lora or {}).get(field) for field in _LORA},
        **{part: run.get(part) for part in _SETTINGS},
        "versions": {package: version(package) for package in _PACKAGES},
    }
    dataset = (run.get("data", {}).get("init_args") or {}).get("dataset") or ""
    header = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        # Names that are not the Hub's would be links to nothing, or show folders of this machine.
        base_model=base if _is_on_hub(base) else None,
        datasets=[dataset] if _is_on_hub(dataset) else None,
        tags=["lora", "flatlora"],
    )
    made = "The LoRA adapter, for" if library == "peft" else "The LoRA adapter, merged into the weights of"
    if lora is None:
        methods, made = methods or ["all weights"], "All weights, trained from"
    text = (
        f"# {Path(base).name}, fine-tuned with {' and '.join(methods) or 'LoRA'}\n\n"
        f"{made} `{_shown(base)}`, of a run of lightning-flatlora.\n\n"
        f"```yaml\n{yaml.safe_dump(_shown(settings), sort_keys=False)}```\n\n"
        "FMLoRA and EFMLoRA are the methods of [arXiv 2508.00522](https://arxiv.org/abs/2508.00522)."
    )
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{text}\n")


def _shown(value: Any) -> Any:
    """Return settings without those that are None, and without the folders of this machine."""
    if isinstance(value, dict):
        return {name: _shown(part) for name, part in value.items() if part is not None}
    if isinstance(value, set):
        return sorted(value)  # peft keeps target_modules as a set, whose order differs between processes
    if isinstance(value, list):
        return [_shown(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", ".")) else value


def _is_on_hub(name: Any) -> bool:
    """Return whether a name looks like one of the Hub's: an owner and a name."""
    is_name = isinstance(name, str) and name.isprintable() and len(name) < 200 and name.count("/") == 1
    return is_name and not name.startswith((".", "~")) and not Path(name).exists()
