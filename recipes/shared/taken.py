"""What of another run's settings may be taken over: a run's folder may come from somebody else.

Nothing is taken that chooses code other than the recipes' and this package's, or where files are written.
"""

import re
from typing import Any

import yaml

Settings = dict[str, Any]
_LOADER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # reads all that the parser's own does

# The kinds of objects that are taken, by the paths of their classes.
_PARTS = re.compile(r"recipes\.\w+\.(module|data)\.\w+")
_CALLBACKS = re.compile(
    r"lightning_flatlora\.(baselines\.(\w+\.)?)?\w+|lightning\.pytorch\.callbacks\.ModelCheckpoint|"
    r"recipes\.shared\.random_state\.RandomState"
)
_SCHEDULES = re.compile(r"lightning_flatlora\.(schedules\.)?\w+Rho")
_OPTIMIZERS = re.compile(r"torch\.optim\.(lr_scheduler\.)?\w+|lightning\.pytorch\.cli\.ReduceLROnPlateau")

_OBJECTS = ("rho", "sigma", "alpha", "finder")
"""Arguments for which a text may be the path of a class or a file, which the parser would import or read."""
_TEXTS = re.compile(
    "accelerator|adapter_name|anneal_strategy|data|deterministic|devices|estimator|filename|gradient_clip_algorithm|"
    "kind|max_time|measures|method|mode|monitor|norm_scope|precision|run_name|save_last|threshold_mode|"
    "train_time_interval"
)
"""What may be a text outside of the model and the data, which have their own."""
_INSIDE = re.compile(r"(?!/)([\w=,:/+ -]|\.(?!\.)|\{[\w/]+(:\.?\d*[df]?)?\})*")
"""A name that leads to no other folder, also after Lightning has put metrics into it."""
_CODE = re.compile(r"class_path|trust|code_revision|weights_only|kernel|cache|offload|auto_map|megatron|_config$|__")
"""Entries within a dict by which the parser, transformers or peft import code or write files."""


def taken(run: Settings, usual: Settings) -> tuple[Settings, list[str]]:
    """Divide the settings of a run into those that may be taken over, and the names of the others.

    Args:
        run: as LightningCLI has written them.
        usual: of the recipe's base, whose loggers and strategy need no mention.
    """
    found: Settings = {}
    others = ["weights_only"] if run.get("weights_only") is not None else []
    for name in ("seed_everything", "method", "run_name"):
        if _is_plain(name, run.get(name)):
            found[name] = run.get(name)
        else:
            others.append(name)
    kinds = {"model": _PARTS, "data": _PARTS, "optimizer": _OPTIMIZERS, "lr_scheduler": _OPTIMIZERS}
    for name, classes in kinds.items():
        if run.get(name):
            found[name] = _object(name, run[name], classes, others)
    trainer, of_base = _dict(run.get("trainer")), _dict(usual.get("trainer"))
    # Without a logger a run would write into the folder in which it is started.
    plain = {name: value for name, value in trainer.items() if name != "logger" and _is_plain(name, value)}
    found["trainer"] = plain
    for name in trainer.keys() - plain.keys() - {"callbacks"}:
        if not _is_like(trainer[name], {"strategy": "auto", **of_base}.get(name)):
            others.append(f"trainer.{name}")
    callbacks = trainer.get("callbacks") or []
    if isinstance(callbacks, list):
        objects = [_object("trainer.callbacks", callback, _CALLBACKS, others) for callback in callbacks]
        plain["callbacks"] = [callback for callback in objects if callback]
    return {name: value for name, value in found.items() if value is not None}, sorted(others)


def _object(name: str, given: Any, classes: re.Pattern[str], others: list[str]) -> Settings | None:
    """Return a class and those of its arguments that are taken; None if it is not of these classes."""
    given = {"class_path": given} if isinstance(given, str) else _dict(given)
    path = str(given.get("class_path"))
    if not classes.fullmatch(path):
        others.append(f"{name} ({path})")
        return None
    arguments = {}
    for key, value in _dict(given.get("init_args")).items():
        label = f"{name if classes is _PARTS else path.rpartition('.')[2]}.{key}"
        if not str(key).isidentifier():  # the parser reads a dot in a name as a way inside
            others.append(label)
        elif isinstance(value, dict) and _SCHEDULES.fullmatch(str(value.get("class_path"))):
            arguments[key] = _object(label, value, _SCHEDULES, others)
        elif (_is_setting if classes is _PARTS else _is_plain)(key, value):
            arguments[key] = value
        else:
            others.append(label)
    return {"class_path": path, "init_args": arguments}


def _is_plain(name: str, value: Any) -> bool:
    """Return whether a value is a number, a list of them, or one of the known texts."""
    if isinstance(value, list):
        return all(_is_plain(name, each) for each in value)
    if isinstance(value, str):
        return bool(_TEXTS.fullmatch(name) and _INSIDE.fullmatch(value))
    return value is None or isinstance(value, bool | int | float)


def _is_setting(name: str, value: Any) -> bool:
    """Return whether a value of the model or the data runs no code and writes no file outside of the run's folder."""
    if name in _OBJECTS:
        return _is_plain(name, value)
    if name in ("download", "predictions"):
        return not value or (isinstance(value, str) and bool(_INSIDE.fullmatch(value)))
    return runs_no_code(value) and _is_no_kernel(name, value)


def runs_no_code(value: Any) -> bool:
    """Return whether no parser, and neither transformers nor peft, imports code or writes files for a value."""
    if isinstance(value, str):
        try:
            # The parser does so, too, with texts within dicts.
            value = yaml.load(value, Loader=_LOADER)
        except yaml.YAMLError as error:
            return not isinstance(error, yaml.constructor.ConstructorError)  # the parser reads recursive texts
    if isinstance(value, list):
        return all(map(runs_no_code, value))
    for name, each in _dict(value).items():
        if _CODE.search(str(name)) or not _is_no_kernel(name, each) or not runs_no_code(each):
            return False
    return True


def _is_no_kernel(name: object, value: Any) -> bool:
    """Return whether a value is not the repository of an attention kernel."""
    return name != "attn_implementation" or "/" not in str(value)


def _is_like(value: Any, usual: Any) -> bool:
    """Return whether a value is the usual one, with its nulls filled in and with defaults added, perhaps."""
    if isinstance(value, dict) and isinstance(usual, dict):
        return all(each is None or _is_like(value.get(name), each) for name, each in usual.items())
    if isinstance(value, list) and isinstance(usual, list):
        return len(value) == len(usual) and all(map(_is_like, value, usual))
    return bool(value == usual)


def _dict(value: Any) -> Settings:
    return value if isinstance(value, dict) else {}
