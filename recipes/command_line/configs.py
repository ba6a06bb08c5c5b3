"""The YAML files that come with the recipes: a base for each recipe, and overlays that override it."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.data.foreign import read_yaml

RECIPES = Path(__file__).parent.parent
_NO_METHODS = ("AdapterCheckpoint", "FlatnessMonitor", "Requeue")
"""Callbacks of the package that do not change the training."""
_MATTER = (
    "data.dataset",
    "model.model",
    "model.lora.r",
    "model.learning_rate",
    "data.batch_size",
    "trainer.max_epochs",
)
"""The settings that ``--help`` begins with, apart from the method and its rho."""


def base_file(recipe: str) -> Path:
    """Return the file of a recipe's default training: plain LoRA."""
    return RECIPES / recipe / "configs" / "base.yaml"


def method_file(recipe: str, method: str) -> Path:
    """Return the overlay of a method: the recipe's own, or else the one that all recipes share."""
    specific = RECIPES / recipe / "configs" / "methods" / f"{method}.yaml"
    return specific if specific.exists() else RECIPES / "configs" / "methods" / f"{method}.yaml"


def methods_of(recipe: str) -> list[str]:
    """Return the methods that a recipe has configurations for."""
    # LoRA has no overlay: the base trains it.
    names = {"lora"}
    for folder in (RECIPES / "configs", RECIPES / recipe / "configs"):
        names.update(path.stem for path in folder.glob("methods/*.yaml"))
    return sorted(names)


def settings_help(recipe: str) -> tuple[str, str]:
    """Return two texts for ``--help``: the one before the list of options, and the names of the configuration files.

    The first describes the recipe, with three commands, the settings that matter, and all of the model and the data.
    """
    files: list[Path] = []
    for folder in (RECIPES / recipe, RECIPES / "configs"):
        files += sorted(folder.rglob("*.yaml"))
    names = "\n  ".join(map(str, files))
    return _about(recipe), f"Configurations for --config; base.yaml is read first:\n  {names}"


def _about(recipe: str) -> str:
    path = base_file(recipe)
    if not path.exists():
        return ""
    base, rho = path.read_text(encoding="utf-8"), method_file(recipe, "efmlora").read_text(encoding="utf-8")
    header = base.partition("seed_everything:")[0].replace("# ", "")
    lines = [_described(base, name) for name in _MATTER]
    lines += [f"  --{'method':<22} lora     one of {', '.join(methods_of(recipe))}", _described(rho, "rho")]
    every = "\nAll settings of the model and the data, given as --model.NAME and --data.NAME:\n\nmodel:"
    matter = f"{header}The settings that matter, with their defaults:"
    return "\n".join([matter, *lines, every + base.partition("\nmodel:")[2]])


def _described(text: str, option: str) -> str:
    """Return a line with an option, its default and its comment, read from a YAML text."""
    part, _, name = option.rpartition(".")
    section = text[text.index(f"\n{part.partition('.')[0]}") :]
    default, comment = re.findall(rf"\n +{name}: (\S+) # (.+)", section)[0]
    return f"  --{option:<22} {default:<8} {comment}"


def written_settings(saved: Path) -> dict[str, Any]:
    """Read all settings of a run, as LightningCLI has written them; empty if there are none.

    They may be somebody else's: before giving them to a parser, use :func:`recipes.command_line.taken.taken`.

    Args:
        saved: a checkpoint of the run, or the folder next to it: ``runs/.../version_N/checkpoints/NAME``.
    """
    path = saved.resolve().parent.parent / "config.yaml"
    return read_settings(path) if path.is_file() else {}


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a run's ``config.yaml``; empty if another program has a file of that name.

    Raises:
        MisconfigurationException: it can't be parsed within bounds, or a part of the settings is not a dict.
    """
    settings = read_yaml(path)
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        return {}
    for name in ("model", "data", "trainer"):
        part = settings.get(name, {})
        if not isinstance(part, dict) or not isinstance(part.get("init_args", {}), dict):
            raise MisconfigurationException(f"{path}: {name} and its init_args must be dicts, got {part!r:.100}")
    return settings


def listed(setting: Any) -> list[Any]:
    """Return a setting of the Trainer as a list; a single value may stand for a list of one.

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
        settings: the run's, as :func:`written_settings` returns them.

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
