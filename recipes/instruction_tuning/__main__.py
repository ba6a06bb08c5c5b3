"""``python -m recipes.instruction_tuning fit|validate|test|predict --config FILE``."""

from typing import Any

import lightning as L
from lightning.pytorch.cli import ArgsType, LightningCLI
from typing_extensions import override


class RecipeCLI(LightningCLI):
    """LightningCLI whose loggers write into one folder a run."""

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        for logger in trainer.loggers:
            _ = logger.version  # fixed at first sight: all must look before the first has made its folder
        return trainer


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
