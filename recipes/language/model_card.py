"""The model card of an exported run."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from lightning_utilities.core.apply_func import apply_to_collection
from peft import PeftConfig

from recipes.shared.configs import methods_of_run

_PACKAGES = ("lightning-flatlora", "lightning", "torch", "transformers", "peft")
_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
_TRAINER = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")
_REPLACED = {
    "optimizer": ("learning_rate", "loraplus_ratio", "weight_decay", "betas"),
    "lr_scheduler": ("schedule", "warmup_steps", "warmup_share"),
}
"""What of the module has no effect beside an option."""


def model_card(base: str, adapter: PeftConfig, run: dict[str, Any]) -> ModelCard:
    """How a model was made, in the Hub's form.

    Args:
        base: the model that was trained on.
        adapter: its LoRA.
        run: the run's settings, as LightningCLI writes them into ``config.yaml``; empty if they are not known.
    """
    model, data, trainer = _arguments(run, "model"), _arguments(run, "data"), run.get("trainer") or {}
    name, settings = method(run)
    lora = {field: getattr(adapter, field, None) for field in _LORA}
    if isinstance(lora["target_modules"], set):
        # peft keeps the list as a set, whose order differs from one process to the next.
        lora["target_modules"] = sorted(lora["target_modules"])
    unused = {"model", "lora"}
    for option, replaced in _REPLACED.items():
        unused |= set(replaced) if run.get(option) else set()
    text = [
        f"# {Path(base).name}, fine-tuned with {name}",
        f"The LoRA adapter of a run of lightning-flatlora, merged into the weights of `{_shown(base)}`.",
        _section("Method", {"method": name, **settings}),
        _section("LoRA", lora),
        _section("Data and prompts", data),
        _section("Model and optimizer", {field: value for field, value in model.items() if field not in unused}),
        _section("Chosen in their place", {option: run.get(option) for option in _REPLACED}),
        _section("Run", {"seed": run.get("seed_everything"), **{field: trainer.get(field) for field in _TRAINER}}),
        _section("Versions at the export", {package: version(package) for package in _PACKAGES}),
        "FMLoRA and EFMLoRA are the methods of [arXiv 2508.00522](https://arxiv.org/abs/2508.00522).",
    ]
    body = "\n\n".join(part for part in text if part)
    return ModelCard(f"---\n{_header(base, data).to_yaml()}\n---\n\n{body}\n")


def _header(base: str, data: dict[str, Any]) -> ModelCardData:
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        # Names that are not the Hub's would be links to nothing, or show folders of this machine.
        base_model=base if _is_on_hub(base) else None,
        datasets=[data["dataset"]] if _is_on_hub(data.get("dataset", "")) else None,
        tags=["lora", "flatlora"],
    )


def method(run: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method of a run, by the name of its class, and its settings, such as rho and beta.

    Example:
        >>> callback = {"class_path": "lightning_flatlora.EFMLoRA", "init_args": {"rho": 0.1}}
        >>> method({"trainer": {"callbacks": [callback]}})
        ('EFMLoRA', {'rho': 0.1})
        >>> method({"trainer": {"callbacks": None}})
        ('LoRA', {})
    """
    if not run:
        return "LoRA", {"settings": "not known: the adapter was exported from outside of its run"}
    methods = methods_of_run(run)
    model = _arguments(run, "model")
    if "rho" in model:  # of FMLoRAModule, whose settings are the module's
        methods["FMLoRA"] = {field: model.get(field) for field in ("rho", "estimator", "norm_scope", "sync_ascent")}
    if len(methods) > 1:  # such as EFMLoRA beside FMLoRAModule
        return " and ".join(methods), methods
    return next(iter(methods.items()), ("LoRA", {}))


def _arguments(run: dict[str, Any], part: str) -> dict[str, Any]:
    arguments: dict[str, Any] = (run.get(part) or {}).get("init_args") or {}
    return arguments


def _section(title: str, settings: dict[str, Any]) -> str:
    """A heading and the settings that are not None; nothing if there are none."""
    known = {name: value for name, value in settings.items() if value is not None}
    if not known:
        return ""
    shown = yaml.safe_dump(apply_to_collection(known, str, _shown), sort_keys=False).strip()
    return f"## {title}\n\n```yaml\n{shown}\n```"


def _shown(text: str) -> str:
    """A setting, without the folders of this machine."""
    return Path(text).name if text.startswith(("/", "~", ".")) else text


def _is_on_hub(name: str) -> bool:
    """Whether a name looks like one of the Hub's, which are an owner and a name."""
    return name.count("/") == 1 and not name.startswith((".", "~")) and not Path(name).exists()
