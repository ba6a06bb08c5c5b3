"""``python -m recipes.clip_contrastive fit|validate|test --config FILE``."""

import lightning as L
from lightning.pytorch.cli import ArgsType

from recipes.instruction_tuning.__main__ import RecipeCLI


def main(args: ArgsType = None) -> RecipeCLI:
    """Run the command line, or a list of arguments; what it has built."""
    return RecipeCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


if __name__ == "__main__":
    main()
