"""The command line that all recipes share."""

from typing import Any

import lightning as L
from lightning.pytorch.cli import ArgsType, LightningCLI
from typing_extensions import override


class RecipeCLI(LightningCLI):
    """LightningCLI for any module and data module, whose loggers write into one folder a run."""

    def __init__(self, args: ArgsType = None, **settings: Any) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            args=args,
            **settings,
        )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        for logger in trainer.loggers:
            _ = logger.version  # fixed at first sight: all must look before the first has made its folder
        return trainer
