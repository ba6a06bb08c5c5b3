"""The YAML files that come with the recipes: a base for each recipe, and overlays to lay over it."""

from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parent.parent
_NO_METHODS = ("AdapterCheckpoint", "FlatnessMonitor", "Requeue")
"""Callbacks of the package that leave the training as it is."""


def base_file(recipe: str) -> Path:
    """Return the file of what a recipe trains by itself: plain LoRA."""
    return RECIPES / recipe / "configs" / "base.yaml"


def method_file(recipe: str, method: str) -> Path:
    """Return the overlay of a method: the recipe's own, or else the one that all recipes share."""
    specific = RECIPES / recipe / "configs" / "methods" / f"{method}.yaml"
    return specific if specific.exists() else RECIPES / "configs" / "methods" / f"{method}.yaml"


def methods_of(recipe: str) -> list[str]:
    """Return the methods that a recipe has configurations for."""
    # LoRA has no overlay: it is what the base trains.
    names = {"lora"}
    for folder in (RECIPES / "configs", RECIPES / recipe / "configs"):
        names.update(path.stem for path in folder.glob("methods/*.yaml"))
    return sorted(names)


def settings_help(recipe: str) -> tuple[str, str]:
    """Return texts for users: the settings of a recipe's model and data with defaults, and the files there are."""
    base = base_file(recipe)
    settings = base.read_text(encoding="utf-8").partition("\nmodel:")[2] if base.exists() else ""
    files: list[Path] = []
    for folder in (RECIPES / recipe, RECIPES / "configs"):
        files += sorted(folder.rglob("*.yaml"))
    names = "\n  ".join(map(str, files))
    return (
        f"Settings, given as --model.NAME and --data.NAME, with their defaults:\n\nmodel:{settings}",
        f"Configurations for --config; base.yaml is read first:\n  {names}",
    )


def written_settings(saved: Path) -> dict[str, Any]:
    """Read all settings of a run, as LightningCLI has written them; empty if there are none.

    They may be somebody else's: whoever gives them to a parser needs :func:`recipes.command_line.taken.taken`.

    Args:
        saved: a checkpoint of the run, or the folder next to it: ``runs/.../version_N/checkpoints/NAME``.
    """
    path = saved.resolve().parent.parent / "config.yaml"
    settings: Any = yaml.safe_load(path.read_bytes()) if path.is_file() else None
    # Another program may have a file of that name.
    is_of_run = isinstance(settings, dict) and isinstance(settings.get("model"), dict)
    return settings if is_of_run else {}


def listed(setting: Any) -> list[Any]:
    """Return what a setting of the Trainer holds, as a list; one thing may be given in place of a list of it.

    Example:
        >>> listed(None), listed("one"), listed(["one", "two"])
        ([], ['one'], ['one', 'two'])
    """
    if setting is None:
        return []
    return setting if isinstance(setting, list) else [setting]


def methods_of_run(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the package's methods among the callbacks of a run, by name, with their arguments; none is plain LoRA.

    Args:
        settings: as :func:`written_settings` gives them.

    Example:
        >>> callback = {"class_path": "lightning_flatlora.EFMLoRA", "init_args": {"rho": 0.1}}
        >>> methods_of_run({"trainer": {"callbacks": [callback]}})
        {'EFMLoRA': {'rho': 0.1}}
    """
    found = {}
    for callback in listed((settings.get("trainer") or {}).get("callbacks")):
        given = callback if isinstance(callback, dict) else {}
        path = str(given.get("class_path"))
        if is_method(path):
            found[path.rpartition(".")[2]] = given.get("init_args") or {}
    return found


def is_method(class_path: str) -> bool:
    """Return whether a callback is one of the package's methods."""
    module, _, name = class_path.rpartition(".")
    return module.split(".")[0] == "lightning_flatlora" and name not in _NO_METHODS
