"""Command lines that only build the parser of the command to run, since building all takes as long as a short run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typing_extensions import override

from recipes.command_line.cli import RecipeCLI


@contextmanager
def one_command() -> Iterator[None]:
    """Within it, ``RecipeCLI(["fit", ...])`` knows only fit; if the first argument is not a command, it knows all.

    If no arguments are given, this holds for the process's own arguments.
    """
    begin, commands = RecipeCLI.__init__, RecipeCLI.subcommands()

    def begin_with_one(self: RecipeCLI, args: Any = None, **settings: Any) -> None:
        given = sys.argv[1:] if args is None else args
        if isinstance(given, list) and given and given[0] in commands:
            self.subcommands = lambda: {given[0]: commands[given[0]]}  # type: ignore[method-assign]
        begin(self, args, **settings)

    RecipeCLI.__init__ = begin_with_one  # type: ignore[method-assign]
    try:
        yield
    finally:
        RecipeCLI.__init__ = begin  # type: ignore[method-assign]


class ParsingCLI(RecipeCLI):
    """Only parses; creating the objects would need models and data."""

    @override
    def instantiate_classes(self) -> None:
        pass

    @override
    def after_instantiate_classes(self) -> None:
        pass
