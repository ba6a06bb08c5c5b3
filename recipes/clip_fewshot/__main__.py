"""``python -m recipes.clip_fewshot fit|validate|test|predict --config FILE``, or ``sweep``."""

import sys
from typing import Any

from lightning.pytorch.cli import ArgsType

from recipes.clip_fewshot import sweep
from recipes.shared.cli import RecipeCLI
from recipes.shared.mistakes import without_traceback


def main(args: ArgsType = None) -> Any:
    """Run the command line, or a list of arguments; what it has built, or sweep's exit status."""
    arguments = sys.argv[1:] if args is None else args
    if isinstance(arguments, list) and arguments[:1] == ["sweep"]:
        return sweep.main(arguments[1:])
    epilog = "There is also sweep, over methods, shots and seeds (sweep --help)."
    return RecipeCLI(args, recipe="clip_fewshot", parser_kwargs={"epilog": epilog})


if __name__ == "__main__":
    with without_traceback():
        result = main()
    sys.exit(result if isinstance(result, int) else 0)
