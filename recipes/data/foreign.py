"""Small files of somebody else's: parsed within bounds, each ends in data or in an error that names it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

EVENTS: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
"""Reads all that the parser of command lines does, and makes nothing but texts of it."""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_JSON_BYTES = 2**22  # an adapter may name each expert's layer
_YAML_BYTES = 2**20  # three seconds of the parser; a run's settings have some kilobytes
_MOST, _DEEPEST = 100_000, 50
"""How many values, and levels of them, are read; what an alias stands for counts each time."""


def read_json(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        MisconfigurationException: it can't be read or parsed, or it is larger than such a file can be.
    """
    return _read(path, _JSON_BYTES, json.loads)


def read_yaml(path: Path) -> Any:
    """Read a file of YAML, of which aliases can make a short one stand for endless data.

    Raises:
        MisconfigurationException: as for :func:`read_json`, or it stands for too many values or levels.
    """
    return _read(path, _YAML_BYTES, _parse_yaml)


def _read(path: Path, most: int, parse: Callable[[bytes], Any]) -> Any:
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"it is larger than {most:,} bytes")
        return parse(content)
    except Exception as error:  # YAML's constructors raise any type, such as KeyError for "!!bool x"
        reason = " ".join(str(error).split())[:300]
        raise MisconfigurationException(
            f"{path} can't be read: {type(error).__name__}: {reason}. Copy it again from where it was written, or "
            "remove it"
        ) from error


class _BoundedLoader(_Loader):  # type: ignore[misc]
    def flatten_mapping(self, node: Any) -> None:
        """Copy what merge keys name, which may double with each level."""
        super().flatten_mapping(node)
        if len(node.value) > _MOST:
            raise ValueError(f"its merge keys stand for more than {_MOST:,} values")


def check_depth(content: str | bytes) -> None:
    """Refuse YAML of too many levels before it is loaded: PyYAML 6.0.2 in C would end the process with a fault.

    Raises:
        ValueError: it has too many levels.
        yaml.YAMLError: it is no YAML.
    """
    depth = 0
    for event in yaml.parse(content, Loader=EVENTS):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it has more than {_DEEPEST} levels")


def _parse_yaml(content: bytes) -> Any:
    check_depth(content)
    found = yaml.load(content, Loader=_BoundedLoader)
    waiting, seen = [(found, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen + len(waiting) > _MOST or depth > _DEEPEST:
            raise ValueError(f"with its aliases it stands for more than {_MOST:,} values or {_DEEPEST} levels of them")
        parts = value.values() if isinstance(value, dict) else value
        if isinstance(parts, Iterable) and not isinstance(parts, str | bytes):
            waiting += [(part, depth + 1) for part in parts]
    return found
