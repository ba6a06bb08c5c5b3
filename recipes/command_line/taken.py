"""Choose which of another run's settings may be taken over: its folder may come from somebody else.

Nothing is taken that chooses code other than the recipes', this package's and PyTorch's optimizers, or where files are
written.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

from recipes.command_line.configs import listed
from recipes.data.foreign import EVENTS, check_levels

Settings = dict[str, Any]

_CLASSES = re.compile(
    r"recipes\.\w+\.(module|data|protocol)\.\w+|recipes\.training\.random_state\.RandomState|"
    r"lightning_flatlora(\.\w+){1,3}|torch\.optim(\.\w+){1,2}|"
    r"lightning\.pytorch\.(callbacks\.ModelCheckpoint|cli\.ReduceLROnPlateau)"
)
"""The paths of the classes that are taken; the parser checks that each is of the right kind."""
_WORDS = re.compile(r"([\w {}:=,+@-]|\.\d)*")
"""Texts that are neither the path of a class nor that of a file, even after Lightning has put metrics into them."""
_PLAIN = ("seed_everything", "method", "run_name", "optimizer", "lr_scheduler")
_OF_MACHINE = ("strategy", "plugins", "profiler", "logger", "default_root_dir", "model_registry")
"""Settings of the Trainer that are never taken."""
_CODE = re.compile(
    r"class_path|trust|code_revision|weights_only|attn_implementation|kernel|cache|offload|auto_map|megatron|_config$|__"
)
"""Entries within a dict by which the parser, transformers or peft import code or write files."""


def taken(run: Settings) -> tuple[Settings, list[str]]:
    """Divide the settings of a run into those that may be taken over, and the names of the others.

    Some are never taken and not named: ``weights_only``, and the Trainer's strategy, plugins, profiler and loggers.

    Args:
        run: the settings as LightningCLI has written them.
    """
    found, others = _divided({name: run.get(name) for name in _PLAIN}, "", _is_plain)
    for name in ("model", "data"):
        part = _dict(run.get(name))
        path = str(part.get("class_path"))
        if _CLASSES.fullmatch(path):
            arguments, left_out = _divided(_dict(part.get("init_args")), f"{name}.", _is_setting)
            found[name] = {"class_path": path, "init_args": arguments}
            others += left_out
        else:
            others.append(f"{name} ({path})")
    trainer = {name: value for name, value in _dict(run.get("trainer")).items() if name not in _OF_MACHINE}
    callbacks = listed(trainer.pop("callbacks", None))
    found["trainer"], left_out = _divided(trainer, "trainer.", _is_plain)
    found["trainer"]["callbacks"] = kept = [each for each in callbacks if _dict(each) and _is_plain("callbacks", each)]
    left_out += [f"trainer.callbacks ({_dict(each).get('class_path', each)})" for each in callbacks if each not in kept]
    return found, [*others, *left_out]


def _divided(settings: Settings, prefix: str, allows: Callable[[str, Any], bool]) -> tuple[Settings, list[str]]:
    """Return the settings that are allowed, and the names of the others."""
    kept = {name: value for name, value in settings.items() if allows(name, value)}
    return kept, [f"{prefix}{name}" for name in settings if name not in kept]


def _is_plain(name: str, value: Any) -> bool:
    """Return whether a value is a number, words, an object of a known class with such arguments, or a list of these."""
    # The parser reads a dot in a name as a way inside.
    if not str(name).isidentifier() or (name == "dirpath" and value):
        return False
    if isinstance(value, list):
        return all(_is_plain(name, each) for each in value)
    if isinstance(value, dict):
        is_known = _CLASSES.fullmatch(str(value.get("class_path"))) and value.keys() <= {"class_path", "init_args"}
        return bool(is_known) and not _divided(_dict(value.get("init_args")), "", _is_plain)[1]
    if isinstance(value, str):
        return bool(_WORDS.fullmatch(value))
    return value is None or isinstance(value, bool | int | float)


def _is_setting(name: str, value: Any) -> bool:
    """Return whether a value of the model or the data runs no code and writes no file outside of the run's folder."""
    # With a slash they are another folder, and a repository of code.
    if name in ("predictions", "attn_implementation"):
        return "/" not in str(value)
    return str(name).isidentifier() and runs_no_code(value)


def runs_no_code(value: Any) -> bool:
    """Return whether no parser, and neither transformers nor peft, imports code or writes files for a value.

    A text that YAML reads as a list or a dict is refused, since the parser does so too, or may fail over its levels.
    """
    if isinstance(value, str):
        try:
            check_levels(value)
            node = yaml.compose(value, Loader=EVENTS)
        except yaml.YAMLError:
            return True  # nor can the parser
        except ValueError:
            return False
        return node is None or isinstance(node, yaml.ScalarNode)
    if isinstance(value, list):
        return all(map(runs_no_code, value))
    entries = _dict(value)
    return not any(_CODE.search(str(name)) for name in entries) and all(map(runs_no_code, entries.values()))


def _dict(value: Any) -> Settings:
    return value if isinstance(value, dict) else {}
