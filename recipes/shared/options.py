"""The command line of a program: its options are the fields of a dataclass, and their documentation is the help."""

import json
import sys
from collections.abc import Sequence
from typing import Any, TypeVar, get_origin, get_type_hints

from jsonargparse import ArgumentParser

Kind = TypeVar("Kind")


def options_parser(kind: type, prog: str, description: str | None, **settings: Any) -> ArgumentParser:
    """Make the parser of a program.

    Args:
        kind: a dataclass with an ``Attributes`` section in its docstring.
        prog: as the program is called.
        description: for ``--help``.
        settings: of jsonargparse's ``add_class_arguments``.
    """
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_class_arguments(kind, as_group=False, **settings)
    return parser


def parse_options(kind: type[Kind], arguments: Sequence[str] | None, prog: str, description: str | None) -> Kind:
    """Read the command line of a program, None for the process's own, as a dataclass."""
    parser = options_parser(kind, prog, description)
    options, others = parse_known_options(kind, parser, arguments)
    if others:
        parser.error(f"there is no option {others[0]}")
    return options


def parse_known_options(
    kind: type[Kind], parser: ArgumentParser, arguments: Sequence[str] | None
) -> tuple[Kind, list[str]]:
    """Read a command line in which a list takes several values and a switch none, as in ``--seeds 13 21 --plan``.

    Args:
        kind: the dataclass.
        parser: from :func:`options_parser`.
        arguments: of the command line; None takes the process's own.

    Returns:
        The dataclass, and the options that the parser does not know, for another program.
    """
    hints = get_type_hints(kind)
    known = {*hints, *parser.get_defaults().keys(), "help"}
    own: list[str] = []
    others: list[str] = []
    for option, *values in _groups(sys.argv[1:] if arguments is None else arguments):
        name, equals, _ = option.removeprefix("--").partition("=")
        hint = None if equals else hints.get(name)
        if option.startswith("--") and name not in known:
            others += [option, *values]
        elif option.startswith("--") and get_origin(hint) is list:
            own.append(f"{option}={json.dumps(values)}")
        elif option.startswith("--") and hint is bool and not values:
            own.append(f"{option}=true")
        else:
            own += [option, *values]
    return kind(**parser.parse_args(own).as_dict()), others


def _groups(arguments: Sequence[str]) -> list[list[str]]:
    """Each option with the values that follow it, and before them what comes before the first option.

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
