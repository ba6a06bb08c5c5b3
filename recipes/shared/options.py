"""A command line whose options are the fields of a dataclass, and its help their documentation."""

from collections.abc import Sequence
from typing import Any, TypeVar

import docstring_parser
from transformers import HfArgumentParser
from typing_extensions import override

Kind = TypeVar("Kind")


class _Parser(HfArgumentParser):  # type: ignore[misc]
    """The parser that transformers makes of a dataclass, with the docstring's texts as help."""

    def __init__(self, kind: type, **settings: Any) -> None:
        documented = docstring_parser.parse(kind.__doc__ or "").params
        self._helps = {parameter.arg_name: parameter.description for parameter in documented}
        super().__init__(kind, **settings)

    @override
    def add_argument(self, *names: Any, **settings: Any) -> Any:
        name = names[0].removeprefix("--")
        return super().add_argument(*names, **{"help": self._helps.get(name, "leave that out"), **settings})


def parse_options(kind: type[Kind], arguments: Sequence[str] | None, prog: str, description: str | None) -> Kind:
    """The options of a command.

    Args:
        kind: a dataclass with an ``Attributes`` section in its docstring. A list takes several values, and a field that
            is True by default has an option with ``--no-`` before its name.
        arguments: of the command line; None takes the process's.
        prog: as the command is called.
        description: for ``--help``.
    """
    return kind(**vars(_Parser(kind, prog=prog, description=description).parse_args(arguments)))
