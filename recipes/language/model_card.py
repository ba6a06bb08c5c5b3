"""The model card of an exported run."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig

from recipes.command_line.configs import methods_of_run

_PACKAGES = ("lightning-flatlora", "lightning", "torch", "transformers", "peft")
_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
_SETTINGS = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")


def model_card(base: str, adapter: PeftConfig, run: dict[str, Any]) -> ModelCard:
    """Return a text in the Hub's form that says how a model was made.

    Args:
        base: the model that was trained on.
        adapter: its LoRA.
        run: the run's settings, as LightningCLI writes them into ``config.yaml``; empty if they are not known.
    """
    methods = list(methods_of_run(run))
    if "rho" in (run.get("model", {}).get("init_args") or {}):
        methods.append("FMLoRA")  # of FMLoRAModule
    settings = {
        "lora": {field: getattr(adapter, field, None) for field in _LORA},
        **{part: run.get(part) for part in _SETTINGS},
        "versions at the export": {package: version(package) for package in _PACKAGES},
    }
    dataset = (run.get("data", {}).get("init_args") or {}).get("dataset") or ""
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        # Names that are not the Hub's would be links to nothing, or show folders of this machine.
        base_model=base if _is_on_hub(base) else None,
        datasets=[dataset] if _is_on_hub(dataset) else None,
        tags=["lora", "flatlora"],
    )
    text = (
        f"# {Path(base).name}, fine-tuned with {' and '.join(methods) or 'LoRA'}\n\n"
        f"The LoRA adapter of a run of lightning-flatlora, merged into the weights of `{_shown(base)}`.\n\n"
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


def _is_on_hub(name: str) -> bool:
    """Return whether a name looks like one of the Hub's, which are an owner and a name."""
    return name.count("/") == 1 and not name.startswith((".", "~")) and not Path(name).exists()
