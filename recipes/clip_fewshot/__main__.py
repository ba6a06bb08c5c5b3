"""``python -m recipes.clip_fewshot fit|validate|test|predict --config FILE``, or ``sweep``."""

import sys
from typing import Any

import lightning as L
from lightning.pytorch.cli import ArgsType

from recipes.clip_fewshot import sweep
from recipes.instruction_tuning.__main__ import RecipeCLI


def main(args: ArgsType = None) -> Any:
    """Run the command line, or a list of arguments; what it has built, or sweep's exit status."""
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["sweep"]:
        return sweep.main(given[1:])
    return RecipeCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"epilog": "Beside these: sweep, over methods, shots and seeds (sweep --help)."},
        args=args,
    )


if __name__ == "__main__":
    result = main()
    sys.exit(result if isinstance(result, int) else 0)
