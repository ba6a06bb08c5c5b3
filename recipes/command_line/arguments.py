"""Complete a command line with the configurations of the recipe, the method, and the run that is resumed."""

import argparse
import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig

from recipes.command_line.configs import base_file, is_method, method_file, methods_of
from recipes.command_line.taken import Settings

CLIP_FIELDS = ("projections", "blocks", "towers")
"""Fields that say where an adapter on a CLIP model goes."""
_SETS_CALLBACKS = re.compile(r"--trainer\.callbacks|\bcallbacks\+?[\"']?\s*:")


def option(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value of an option, written in one argument or in two; None if it is not given.

    Example:
        >>> option(["--seed=1", "--ckpt_path", "last"], "--ckpt_path")
        'last'
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, dest="value")
    value: str | None = parser.parse_known_args(arguments)[0].value
    return value


def config_digests(arguments: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of each file that is given by ``--config``, as "content of" its path."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    files = parser.parse_known_args(arguments)[0].config
    digests = {}
    for file in files:
        if Path(file).is_file():
            digests[f"content of {file}"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return digests


@dataclasses.dataclass
class CommandLine:
    """The arguments after a command, sorted.

    Args:
        recipe: name of the recipe's folder.
        configs: files given by ``--config``, without the recipe's base and the files of methods.
        method: given by ``--method``, or by a method's file.
        checkpoint: given by ``--ckpt_path``.
        options: all other arguments.
    """

    recipe: str
    configs: list[str]
    method: str | None
    checkpoint: str | None
    options: list[str]

    def arguments(self, run: Settings) -> list[str]:
        """Return them as the parser takes them: configurations first, so that the options override them.

        The order is the recipe's base, the settings of a run, those that are given, and the method. If the method
        or callbacks are given, the callbacks are those of a new run, and only the run's method is added to them.

        Args:
            run: settings taken from the run that is resumed; empty for a new one.
        """
        configs = [str(base_file(self.recipe))] if base_file(self.recipe).exists() else []
        method, had = self.method or run.get("method"), run.get("method")
        overlays = [] if method in (None, "lora") else [str(method_file(self.recipe, method))]
        if run:
            trainer = dict(run["trainer"])
            if method == had and not self.callbacks():
                overlays = []  # the method is among the run's callbacks, with its rho
            else:
                methods = [each for each in trainer.pop("callbacks", []) if is_method(each["class_path"])]
                if method == had and methods:
                    overlays = [] if self.gives_method() else [yaml.safe_dump({"trainer": {"callbacks+": methods}})]
            configs.append(yaml.safe_dump({**run, "trainer": trainer}))  # the parser takes settings in place of a file
        given = [f"--config={config}" for config in [*configs, *self.configs, *overlays]]
        for name, value in (("method", self.method), ("ckpt_path", self.checkpoint)):
            if value is not None:
                given.append(f"--{name}={value}")
        return [*given, *self.options]

    def callbacks(self) -> str:
        """Return the texts that set callbacks, in configurations and options; empty if none does."""
        texts = [" ".join(self.options)]
        for config in self.configs:
            texts.append(Path(config).read_text(encoding="utf-8") if Path(config).is_file() else config)
        return " ".join(filter(_SETS_CALLBACKS.search, texts))

    def gives_method(self) -> bool:
        """Return whether a method is among the callbacks that are given."""
        return any(map(is_method, re.findall(r"[\w.]+", self.callbacks())))


def taken_apart(recipe: str, arguments: Sequence[str]) -> CommandLine:
    """Sort the arguments after a command.

    Example:
        >>> line = taken_apart("nlg", ["--rho=1", f"--config={method_file('nlg', 'efmlora')}", "-c=own.yaml"])
        >>> line.configs, line.method, line.options
        (['own.yaml'], 'efmlora', ['--rho=1'])

    Raises:
        SystemExit: the recipe has no such method.
    """
    parser = argparse.ArgumentParser(f"python -m recipes.{recipe}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    names = methods_of(recipe)
    parser.add_argument("--method", choices=names)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--optimizer")
    found, options = parser.parse_known_args(arguments)
    files = {method_file(recipe, name).resolve(): name for name in names}
    configs, method = [], found.method
    for config in found.config:
        path = Path(config).resolve()
        if path in files:
            method = method or files[path]
        elif path != base_file(recipe).resolve():
            configs.append(config)
    if found.optimizer is not None:
        # jsonargparse takes a bare name only if one imported class has it, and bitsandbytes has an SGD and an Adam too.
        module = "torch.optim." if found.optimizer in torch.optim.__all__ else ""
        options.insert(0, f"--optimizer={module}{found.optimizer}")
    return CommandLine(recipe, configs, method, found.ckpt_path, options)


def names_method(recipe: str, arguments: Sequence[str]) -> bool:
    """Return whether arguments choose a method, by ``--method``, by its file, or among the callbacks."""
    line = taken_apart(recipe, arguments)
    return line.method is not None or line.gives_method()


def refuse_unknown_fields(lora: Any) -> None:
    """Refuse a misspelt field of an adapter before a model is loaded.

    Args:
        lora: fields of peft's LoraConfig, and on CLIP models where the adapter goes; anything else is ignored.

    Raises:
        MisconfigurationException: there is no such field, or a value that peft would misread.
    """
    fields = lora if isinstance(lora, dict) else {}
    known = [field.name for field in dataclasses.fields(LoraConfig)]
    unknown = sorted(fields.keys() - known - set(CLIP_FIELDS))
    if unknown:
        raise MisconfigurationException(f"lora: peft's LoraConfig has no {', '.join(unknown)}, only {', '.join(known)}")
    if isinstance(fields.get("modules_to_save"), str):  # peft would take each letter as a name
        raise MisconfigurationException(f"lora: modules_to_save must be a list, such as [{fields['modules_to_save']}]")
