"""``python -m recipes.clip_fewshot fit|validate|test|predict --config FILE``, or ``sweep``."""

import sys
from typing import Any

from lightning.pytorch.cli import ArgsType

from recipes.cli import RecipeCLI
from recipes.clip_fewshot import sweep


def main(args: ArgsType = None) -> Any:
    """Run the command line, or a list of arguments; what it has built, or sweep's exit status."""
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["sweep"]:
        return sweep.main(given[1:])
    epilog = "Beside these: sweep, over methods, shots and seeds (sweep --help)."
    return RecipeCLI(args, parser_kwargs={"epilog": epilog})


if __name__ == "__main__":
    result = main()
    sys.exit(result if isinstance(result, int) else 0)
