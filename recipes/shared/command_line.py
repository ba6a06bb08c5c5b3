"""What a command line leaves out: the recipe's own configuration, the method's, and those of the run that goes on."""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import LoraConfig

from recipes.shared.configs import base_file, method_file, methods_of, methods_of_run, settings_of_run

CLIP_FIELDS = ("projections", "blocks", "towers")
"""Where an adapter on a CLIP model goes."""


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of an option, written in one argument or in two; None if it is not given.

    Example:
        >>> option(["--seed=1", "--ckpt_path", "last"], "--ckpt_path")
        'last'
    """
    values = option_values(arguments, name)
    return values[-1] if values else None


def option_values(arguments: Sequence[str], name: str) -> list[str]:
    """All values of an option, in order."""
    values = []
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            values.append(argument.removeprefix(f"{name}="))
        elif argument == name and place + 1 < len(arguments):
            values.append(arguments[place + 1])
    return values


def check_config_files(arguments: Sequence[str]) -> None:
    """Name a ``--config`` file that is empty or no YAML, since the parser does not say which of several it is.

    Args:
        arguments: of a command line.

    Raises:
        MisconfigurationException: there is such a file.

    Example:
        >>> check_config_files(["fit", "--config", "no_file.yaml"])  # left to the parser
    """
    for name in option_values(arguments, "--config"):
        path = Path(name)
        if not path.is_file():
            continue
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise MisconfigurationException(f"--config {path} is no YAML: {error}") from error
        if not isinstance(read, dict):
            raise MisconfigurationException(f"--config {path} holds no settings: write lines such as `trainer:`")


def without_config(arguments: Sequence[str], dropped: Sequence[Path]) -> list[str]:
    """The arguments without the ``--config`` of some files.

    Example:
        >>> without_config(["--config", "a.yaml", "--config=b.yaml", "--seed=1"], [Path("a.yaml")])
        ['--config=b.yaml', '--seed=1']
    """
    identities = [path.resolve() for path in dropped]
    kept: list[str] = []
    for argument in arguments:
        path = argument.removeprefix("--config=")
        is_second = bool(kept) and kept[-1] == "--config"
        if (is_second or path != argument) and Path(path).resolve() in identities:
            if is_second:
                kept.pop()
            continue
        kept.append(argument)
    return kept


def with_method(recipe: str, arguments: Sequence[str]) -> list[str]:
    """The arguments with the configuration of ``--method``, or with the ``--method`` whose configuration is given.

    Example:
        >>> [Path(each).name for each in with_method("vqa", ["--config", "mine.yaml", "--method", "efmlora"])]
        ['--config', 'mine.yaml', 'efmlora.yaml', '--method', 'efmlora']

    Raises:
        MisconfigurationException: the recipe has no such method.
    """
    arguments = list(arguments)
    names = [name for name in methods_of(recipe) if name != "lora"]
    given = {Path(path).resolve() for path in option_values(arguments, "--config")}
    name = option(arguments, "--method")
    if name is None:
        return arguments + [f"--method={each}" for each in names if method_file(recipe, each).resolve() in given]
    if name not in ("lora", *names):
        raise MisconfigurationException(f"--method {name}: there are lora, {', '.join(names)}")
    if name == "lora" or method_file(recipe, name).resolve() in given:
        return arguments
    # Behind all others, of which one may replace the list of callbacks.
    place = 0
    for index, argument in enumerate(arguments):
        if argument.startswith("--config"):
            place = index + (1 if "=" in argument else 2)
    return [*arguments[:place], f"--config={method_file(recipe, name)}", *arguments[place:]]


def with_base(recipe: str, arguments: Sequence[str]) -> list[str]:
    """The arguments behind the recipe's ``base.yaml``, unless a configuration chooses both a model and data."""
    base = base_file(recipe)
    arguments = without_config(arguments, [base])
    if not base.exists():
        return arguments
    is_whole = any(_chooses_model_and_data(settings) for settings in _given_settings(arguments))
    return arguments if is_whole else [f"--config={base}", *arguments]


def with_run(recipe: str, arguments: Sequence[str], checkpoint: Path) -> list[str]:
    """The arguments behind the settings of the run that has saved a checkpoint, if its ``config.yaml`` is there.

    Whatever is given goes before them. If the method or callbacks are given, the callbacks are as in a new run. The
    method that the run had is not laid over it again, so that its rho stays.

    Args:
        recipe: name of the recipe's folder.
        arguments: behind the command, from :func:`with_base`.
        checkpoint: file or folder.
    """
    run = settings_of_run(checkpoint)
    arguments = list(arguments)
    if not run:
        return arguments
    method = option(arguments, "--method")
    taken = "model and data"
    if _names_callbacks(recipe, arguments) or method not in (None, run.get("method")):
        run.get("trainer", {}).pop("callbacks", None)
    else:
        taken = f"model, data and method ({', '.join(methods_of_run(run)) or 'LoRA'})"
        if method is not None:
            arguments = without_config(arguments, [method_file(recipe, method)])
    rank_zero_info(f"The {taken} are as in {checkpoint.parent.parent / 'config.yaml'}, except for what is given here")
    # The parser takes settings in place of a file, too.
    place = 1 if arguments[:1] == [f"--config={base_file(recipe)}"] else 0
    return [*arguments[:place], f"--config={yaml.safe_dump(run)}", *arguments[place:]]


def _given_settings(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """What the given configurations hold; those that can't be read are left to the parser."""
    found = []
    for name in option_values(arguments, "--config"):
        if Path(name).is_file():
            found.append(yaml.safe_load(Path(name).read_text(encoding="utf-8")))
    return found


def _chooses_model_and_data(settings: dict[str, Any]) -> bool:
    parts = [settings.get(name) for name in ("model", "data")]
    return all(isinstance(part, str) or (isinstance(part, dict) and "class_path" in part) for part in parts)


def _names_callbacks(recipe: str, arguments: Sequence[str]) -> bool:
    """Whether callbacks are given, one by one or in a configuration that is none of the recipe's own."""
    if any(argument.startswith("--trainer.callbacks") for argument in arguments):
        return True
    shipped = [base_file(recipe), *(method_file(recipe, name) for name in methods_of(recipe))]
    for settings in _given_settings(without_config(arguments, shipped)):
        trainer = settings.get("trainer") or {}
        if "callbacks" in trainer or "callbacks+" in trainer:
            return True
    return False


def refuse_unknown_fields(lora: Any) -> None:
    """Refuse a misspelt field of an adapter before a model is loaded.

    Args:
        lora: fields of peft's LoraConfig, and on CLIP models where the adapter goes; anything else is left alone.

    Raises:
        MisconfigurationException: there is no such field.
    """
    known = [field.name for field in dataclasses.fields(LoraConfig)] + list(CLIP_FIELDS)
    for name in lora if isinstance(lora, dict) else ():
        if name not in known:
            raise MisconfigurationException(f"lora: peft's LoraConfig has no field {name!r}.{_nearest(name, known)}")


def hint(message: str, parser: ArgumentParser) -> str:
    """The nearest name for a misspelt option, or the order of options; empty if an error is of another kind."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
    if unknown:
        commands = parser._subcommands_action
        parsers = [parser, *(commands.choices.values() if commands else ())]
        names: list[str] = []
        for each in parsers:
            names += [name.removeprefix("--") for name in each._option_string_actions]
        return _nearest(unknown[1] or unknown[2], names)
    found = re.search(r"given class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message)
    if not found:
        return ""
    names = []
    for kind in getattr(locate(found[1]), "__mro__", ()):
        names += inspect.signature(kind.__init__).parameters
    return _nearest(found[2], names) or (
        "\nAn option of the model, the data or a callback comes behind the --config that chooses it, as "
        "--trainer.callbacks.rho behind a method's file"
    )


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"\nDid you mean {close[0]}?" if close else ""
