"""What a command line leaves out: the recipe's own configuration, the method's, and those of the run that goes on."""

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import LoraConfig

from recipes.shared.configs import (
    base_file,
    is_method,
    method_file,
    methods_of,
    methods_of_run,
    settings_of_run,
)

CLIP_FIELDS = ("projections", "blocks", "towers")
"""Where an adapter on a CLIP model goes."""


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of an option, written in one argument or in two; None if it is not given.

    Example:
        >>> option(["--seed=1", "--ckpt_path", "last"], "--ckpt_path")
        'last'
    """
    values, _ = split(arguments, name)
    return values[-1] if values else None


def split(arguments: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """The values of an option, in order, and the arguments without it.

    Example:
        >>> split(["--config", "a.yaml", "--config=b.yaml", "--seed=1"], "--config")
        (['a.yaml', 'b.yaml'], ['--seed=1'])
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, dest="values", action="append", default=[])
    found, others = parser.parse_known_args(arguments)
    return found.values, others


def in_order(arguments: Sequence[str]) -> list[str]:
    """The arguments with the configurations in front, so that all other options apply to what these choose.

    An optimizer's bare name becomes PyTorch's, whoever else has one of that name.

    Example:
        >>> in_order(["--optimizer", "SGD", "--optimizer.lr=1", "--config", "a.yaml"])
        ['--config=a.yaml', '--optimizer=torch.optim.SGD', '--optimizer.lr=1']
    """
    configs, others = split(arguments, "--config")
    optimizers, others = split(others, "--optimizer")
    chosen = []
    for name in optimizers:
        # jsonargparse takes a bare name only if one imported class has it, and bitsandbytes has an SGD and an Adam too.
        chosen.append(f"--optimizer={'torch.optim.' if name in torch.optim.__all__ else ''}{name}")
    return [*_as_options(configs), *chosen, *others]


def with_base_and_method(recipe: str, arguments: Sequence[str]) -> list[str]:
    """The arguments behind the recipe's ``base.yaml``, and with the configuration of ``--method``.

    The base is left out if a configuration chooses both a model and data. If a method's configuration is given,
    ``--method`` is added.

    Example:
        >>> given = ["--config", "my/own.yaml", "--method", "efmlora"]
        >>> [Path(each).name for each in with_base_and_method("vqa", given)]
        ['base.yaml', 'own.yaml', 'efmlora.yaml', '--method=efmlora']

    Raises:
        MisconfigurationException: the recipe has no such method, or a configuration can't be read.
    """
    configs, others = split(arguments, "--config")
    methods, others = split(others, "--method")
    base = base_file(recipe)
    configs = [config for config in configs if not _is_file(config, base)]
    is_whole = any(_chooses_model_and_data(_read(config)) for config in configs)
    names = methods_of(recipe)
    for name in methods[-1:]:
        if name not in names:
            raise MisconfigurationException(f"--method {name}: there are {', '.join(names)}")
        overlay = method_file(recipe, name)
        # Behind all others, of which one may replace the list of callbacks.
        if name != "lora" and not _is_among(overlay, configs):
            configs.append(str(overlay))
    if not methods:
        methods = [name for name in names if _is_among(method_file(recipe, name), configs)]
    if base.exists() and not is_whole:
        configs.insert(0, str(base))
    return [*_as_options(configs), *(f"--method={name}" for name in methods[-1:]), *others]


def names_method(recipe: str, arguments: Sequence[str]) -> bool:
    """Whether arguments choose a method: by ``--method``, by its file, or among the callbacks."""
    configs, others = split(with_base_and_method(recipe, arguments), "--config")
    return option(others, "--method") is not None or any(map(is_method, _callbacks_given(configs, others)))


def with_run(recipe: str, arguments: Sequence[str], checkpoint: Path, trains: bool) -> list[str]:
    """The arguments behind the settings of the run that has saved a checkpoint, if its ``config.yaml`` is there.

    Only what :func:`recipes.shared.taken.taken` allows is read from it. Whatever is given goes before that. If the
    method or callbacks are given, the callbacks are as in a new run. The method that the run had is not laid over it
    again, so that its rho stays.

    Args:
        recipe: name of the recipe's folder.
        arguments: behind the command, from :func:`with_base_and_method`.
        checkpoint: file or folder.
        trains: whether the command is "fit".

    Raises:
        MisconfigurationException: what is given would take the place of the run's method without a word of it.
    """
    run, left_out = settings_of_run(checkpoint, recipe)
    if not run:
        return list(arguments)
    configs, others = split(arguments, "--config")
    base = [config for config in configs if _is_file(config, base_file(recipe))]
    overlays = [str(method_file(recipe, name)) for name in methods_of(recipe)]
    given = configs[len(base) :]
    own = [config for config in given if not _is_among(Path(config), overlays)]
    taken = "model and data"
    method, had = option(others, "--method"), run.get("method")
    callbacks = _callbacks_given(own, others)
    if trains and callbacks and methods_of_run(run) and method is None and not any(map(is_method, callbacks)):
        methods = [f"{name} with rho {each.get('rho')}" for name, each in methods_of_run(run).items()]
        raise MisconfigurationException(
            f"callbacks are given, which take the place of those of the run of {checkpoint}, and so of "
            f"its {', '.join(methods)}: give --method and --rho too"
        )
    if callbacks or method not in (None, had):
        run.get("trainer", {}).pop("callbacks", None)
    else:
        given = own
        taken = f"model, data and method ({', '.join(methods_of_run(run)) or 'LoRA'})"
    source = checkpoint.parent.parent / "config.yaml"
    rank_zero_info(f"The {taken} are as in {source}, except for what is given here")
    options = {each.partition("=")[0].rstrip("+") for each in others}
    lacking = [name for name in left_out if f"--{name.partition(' ')[0]}" not in options]
    if lacking:
        rank_zero_info(
            f"Not taken from {source}, since they choose other code or where files are written: {', '.join(lacking)}. "
            "If you trust the file and need them, give them here"
        )
    # The parser takes settings in place of a file, too.
    return [*_as_options([*base, yaml.safe_dump(run), *given]), *others]


def _as_options(configs: Sequence[str]) -> list[str]:
    return [f"--config={config}" for config in configs]


def _is_file(config: str, path: Path) -> bool:
    return Path(config).resolve() == path.resolve()


def _is_among(path: Path, configs: Sequence[str]) -> bool:
    return any(_is_file(config, path) for config in configs)


def _read(config: str) -> dict[str, Any]:
    """What a configuration holds; one that does not exist is left to the parser.

    Raises:
        MisconfigurationException: it is empty or no YAML; of several the parser does not say which one it is.
    """
    path = Path(config)
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MisconfigurationException(f"--config {path} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise MisconfigurationException(f"--config {path} holds no settings: write lines such as `trainer:`")
    return settings


def _chooses_model_and_data(settings: dict[str, Any]) -> bool:
    parts = [settings.get(name) for name in ("model", "data")]
    return all(isinstance(part, str) or (isinstance(part, dict) and "class_path" in part) for part in parts)


def _callbacks_given(configs: Sequence[str], options: Sequence[str]) -> list[str]:
    """The words, classes among them, in which callbacks are given, one by one or in a configuration."""
    # All of them, since a value may be a word of its own.
    texts = list(options) if any(option.startswith("--trainer.callbacks") for option in options) else []
    for config in configs:
        trainer = _read(config).get("trainer") or {}
        texts += [str(trainer[name]) for name in ("callbacks", "callbacks+") if name in trainer]
    return re.findall(r"[\w.]+", " ".join(texts))


def refuse_unknown_fields(lora: Any) -> None:
    """Refuse a misspelt field of an adapter before a model is loaded.

    Args:
        lora: fields of peft's LoraConfig, and on CLIP models where the adapter goes; anything else is left alone.

    Raises:
        MisconfigurationException: there is no such field, or a value that peft would misread.
    """
    known = [field.name for field in dataclasses.fields(LoraConfig)] + list(CLIP_FIELDS)
    for name, value in lora.items() if isinstance(lora, dict) else ():
        if value == "None":  # which jsonargparse makes of a null that is given for a single field
            raise MisconfigurationException(f"lora: leave {name} out, or write null for it in a file")
        if name == "modules_to_save" and isinstance(value, str):
            raise MisconfigurationException(f"lora: modules_to_save must be a list, such as [{value}]")
        if name not in known:
            raise MisconfigurationException(f"lora: peft's LoraConfig has no field {name!r}.{_nearest(name, known)}")


def refuse_nulls(part: str, kind: Any, given: Mapping[str, Any]) -> None:
    """Refuse a null for an argument that takes none, which the parser lets pass.

    Args:
        part: "model" or "data".
        kind: its class.
        given: its arguments.

    Raises:
        MisconfigurationException: names such an argument.
    """
    types: dict[str, Any] = {}
    for owner in reversed(getattr(kind, "__mro__", ())):
        for name, parameter in inspect.signature(owner.__init__).parameters.items():
            types[name] = parameter.annotation
    for name, value in given.items():
        if value is None and not _takes_null(types.get(name)):
            raise MisconfigurationException(f"--{part}.{name} can't be null: give a value, or leave it out")


def _takes_null(annotation: Any) -> bool:
    """Return whether an argument may be null; one of an unknown type may."""
    members = get_args(annotation)
    return type(None) in members if members else annotation not in (bool, int, float, str)


def hint(message: str, names: Iterable[str]) -> str:
    """The nearest name for a misspelt option; empty if a parser's message is about something else.

    Args:
        message: of a parser, which may be that of a class whose options are given.
        names: of the parser's options.
    """
    unknown = re.search(r"^(?:unrecognized arguments: --|Option ')([\w.]+)", message)
    return _nearest(unknown[1], list(names)) if unknown else ""


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"\nDid you mean {close[0]}?" if close else ""
