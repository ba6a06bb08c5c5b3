"""Command lines from dataclasses: the fields are the options, and their documentation is the help."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

Kind = TypeVar("Kind")


def parse_options(kind: type[Kind], arguments: Sequence[str] | None, prog: str, description: str | None) -> Kind:
    """Read a command line in which a list takes several values and a switch none, as in ``--seeds 13 21 --plan``.

    Args:
        kind: a dataclass with an ``Attributes`` section in its docstring. A list of lists is an option that may be
            given several times.
        arguments: the command line's; None takes the process's own.
        prog: the program's name.
        description: text for ``--help``.
    """
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_class_arguments(kind, as_group=False)
    own, others = _split(kind, arguments)
    return kind(**parser.parse_args([*own, *others]).as_dict())


def parse_known_options(
    kind: type[Kind], arguments: Sequence[str] | None, prog: str, description: str | None
) -> tuple[Kind, list[str]]:
    """Read a command line like :func:`parse_options`, and pass unknown options on to another program.

    A field without a default has no ``--`` in front of it.

    Returns:
        The dataclass, and the arguments to pass on.
    """
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_class_arguments(kind, as_group=False, as_positional=True)
    own, others = _split(kind, arguments)
    return kind(**parser.parse_args(own).as_dict()), others


def known_names(option: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the names given to an option, each once.

    Raises:
        SystemExit: one of them is not known.

    Example:
        >>> known_names("--methods", ["lora", "lora"], ["lora", "efmlora"])
        ['lora']
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"{option}: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def _split(kind: type, arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the options of a dataclass, as jsonargparse takes them, and all others."""
    hints = get_type_hints(kind)
    own: list[str] = []
    others: list[str] = []
    lists: dict[str, list[list[str]]] = {}
    for group in _groups(sys.argv[1:] if arguments is None else arguments):
        option, *values = group
        name, equals, value = option.removeprefix("--").partition("=")
        hint = hints.get(name)
        if option.startswith("--") and name != "help" and hint is None:
            others += group
        elif get_origin(hint) is list:
            lists.setdefault(name, []).append([value, *values] if equals else values)
        elif hint is bool and group == [f"--{name}"]:
            own.append(f"--{name}=true")
        else:
            own += group
    for name, given in lists.items():
        is_repeated = get_origin(get_args(hints[name])[0]) is list
        own.append(f"--{name}={json.dumps(given if is_repeated else given[-1])}")
    return own, others


def _groups(arguments: Sequence[str]) -> list[list[str]]:
    """Return each option with the values that follow it, preceded by the values before the first option.

    Example:
        >>> _groups(["table1", "--plan", "--seeds", "13", "21"])
        [['table1'], ['--plan'], ['--seeds', '13', '21']]
    """
    groups: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(argument)
    return groups
