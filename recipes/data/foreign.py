"""Small files of somebody else's: parsed within bounds, each ends in data or in an error that names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

EVENTS: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
"""Reads all that the parser's own loader does, and makes nothing but texts of it."""
_DATA: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_JSON_BYTES = 2**22  # an adapter may name each expert's layer
_YAML_BYTES = 2**20  # three seconds of the parser; a run's settings have some kilobytes
_DEEPEST = 50


def read_json(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        MisconfigurationException: it can't be read or parsed, or it is larger than such a file can be.
    """
    return _read(path, _JSON_BYTES, json.loads)


def read_yaml(path: Path) -> Any:
    """Read a file of YAML without aliases, with which a short one could stand for endless data.

    Raises:
        MisconfigurationException: as for :func:`read_json`, or it has an alias or is nested too deeply.
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


def _parse_yaml(content: bytes) -> Any:
    depth = 0
    for event in yaml.parse(content, Loader=EVENTS):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"write out what its alias *{event.anchor} stands for")
        # Counted before anything is built, since building takes a call for each level.
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    return yaml.load(content, Loader=_DATA)
