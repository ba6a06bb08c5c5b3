"""The model card of an exported run."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig

from recipes.shared.configs import methods_of_run

_PACKAGES = ("lightning-flatlora", "lightning", "torch", "transformers", "peft")
_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
_TRAINER = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")


def model_card(base: str, adapter: PeftConfig, run: dict[str, Any]) -> ModelCard:
    """Return a text in the Hub's form that says how a model was made.

    Args:
        base: the model that was trained on.
        adapter: its LoRA.
        run: the run's settings, as LightningCLI writes them into ``config.yaml``; empty if they are not known.
    """
    model, data = ((run.get(part) or {}).get("init_args") or {} for part in ("model", "data"))
    methods = methods_of_run(run)
    if "rho" in model:
        methods["FMLoRA"] = {"rho": model["rho"]}  # of FMLoRAModule
    trainer = run.get("trainer") or {}
    settings = {
        "method": methods or "LoRA",
        "lora": {field: getattr(adapter, field, None) for field in _LORA},
        "data": data,
        "model": {field: value for field, value in model.items() if field not in ("model", "lora")},
        "optimizer in place of the model's": run.get("optimizer"),
        "schedule in place of the model's": run.get("lr_scheduler"),
        "trainer": {field: trainer.get(field) for field in _TRAINER},
        "seed": run.get("seed_everything"),
        "versions at the export": {package: version(package) for package in _PACKAGES},
    }
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        # Names that are not the Hub's would be links to nothing, or show folders of this machine.
        base_model=base if _is_on_hub(base) else None,
        datasets=[data["dataset"]] if _is_on_hub(data.get("dataset") or "") else None,
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
    is_path = isinstance(value, str) and value.startswith(("/", "~", "."))
    return Path(value).name if is_path else value


def _is_on_hub(name: str) -> bool:
    """Return whether a name looks like one of the Hub's, which are an owner and a name."""
    return name.count("/") == 1 and not name.startswith((".", "~")) and not Path(name).exists()
