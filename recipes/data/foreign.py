"""Small files of somebody else's: parsed within bounds, each ends in data or in an error that names it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

EVENTS: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
"""Reads all that the parser of command lines does, and makes nothing but texts of it."""
_DATA: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BYTES = 2**21  # some seconds of the parser
_VALUES, _LEVELS = 100_000, 50


def read_json(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        MisconfigurationException: it can't be read or parsed, or has more values or levels than any such file.
    """
    return _read(path, json.loads)


def read_yaml(path: Path) -> Any:
    """Read a file of YAML, in which a value counts wherever an alias stands for it.

    Raises:
        MisconfigurationException: as for :func:`read_json`.
    """
    return _read(path, _parse_yaml)


def _read(path: Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        if path.stat().st_size > _BYTES:
            raise ValueError(f"it is larger than {_BYTES:,} bytes")
        found = parse(path.read_bytes())
        _check_size(found)
    except Exception as error:  # YAML's constructors raise any type, such as KeyError for "!!bool x"
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise MisconfigurationException(f"{path} can't be read: {reason}. Copy it again, or remove it") from error
    return found


def _check_size(found: Any) -> None:
    waiting, seen = [(found, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen + len(waiting) > _VALUES or depth > _LEVELS:
            raise ValueError(f"it stands for more than {_VALUES:,} values or {_LEVELS} levels of them")
        parts = value.values() if isinstance(value, dict) else value
        if isinstance(parts, Iterable) and not isinstance(parts, str | bytes):
            waiting += [(part, depth + 1) for part in parts]


def _parse_yaml(content: bytes) -> Any:
    check_levels(content)
    return yaml.load(content, Loader=_DATA)


def check_levels(content: str | bytes) -> None:
    """Refuse YAML that is dangerous to load: of many levels, over which PyYAML 6.0.2 crashes, or with a merge key.

    Merge keys of merge keys double what they stand for.

    Raises:
        ValueError: it is so.
        yaml.YAMLError: it is no YAML.
    """
    depth = 0
    for event in yaml.parse(content, Loader=EVENTS):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        is_merge = isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]
        if depth > _LEVELS or is_merge:
            raise ValueError(f"it has more than {_LEVELS} levels, or a merge key (<<): write its values out")
