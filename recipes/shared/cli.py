"""The command line that all recipes share."""

import sys
from argparse import RawDescriptionHelpFormatter
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeTuple,
    SaveConfigCallback,
)
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora import Requeue
from recipes.shared.checkpoints import LAST, LAST_IF_ANY, differing_settings, last_checkpoint, settings_of_run
from recipes.shared.command_line import refuse_unknown_fields, taken_apart
from recipes.shared.configs import is_method, listed, methods_of, settings_help, shipped_configs
from recipes.shared.files import set_aside
from recipes.shared.precision import fast_precision
from recipes.shared.progress import progress_bar, without_missing_weights
from recipes.shared.ranks import gathered
from recipes.shared.taken import Settings
from recipes.shared.training import RecipeModule


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of what is written before and after the options."""


class ConfigSaver(SaveConfigCallback):
    """Writes the run's ``config.yaml``, if all ranks agree, and gives another file of that name a new one first.

    A run that is resumed into its old folder finds one there, and a run without a logger writes where it was started,
    which may be where a user keeps a file of that name.
    """

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        precisions = gathered(str(trainer.precision))
        if len(set(precisions)) > 1:
            raise MisconfigurationException(
                f"the processes would compute in different precisions ({', '.join(precisions)}), since their machines "
                "differ: give them one by --trainer.precision"
            )
        path = Path(trainer.log_dir or "", self.config_filename)  # every rank has to ask
        if self.save_to_log_dir and not self.already_saved and trainer.is_global_zero:
            set_aside(path)
        super().setup(trainer, pl_module, stage)


class RecipeCLI(LightningCLI):
    """LightningCLI for any module and data module, whose loggers write into one folder a run.

    ``run_name`` is the name of all loggers whose own name is null: an overlay of a method names its runs in one line.

    The recipe's ``base.yaml`` comes before all that is given. With ``--ckpt_path`` the settings of the checkpoint's run
    come between the two, from its ``config.yaml``, see :func:`recipes.shared.taken.taken`, and in a fit a warning names
    what is given otherwise than there. ``--ckpt_path last`` is the newest last checkpoint of the runs that log into the
    same folder. ``--ckpt_path last-if-any`` makes one command both a run's first start and its return: a fit that goes
    on saves where the run has saved before, and what is given otherwise is an error.

    ``--method`` chooses a method's configuration, ``--rho`` its radius. ``--optimizer`` and ``--lr_scheduler`` each
    replace their own part of what the recipe trains with. Switching the checkpoints off drops the callbacks that the
    configuration lists for them.

    ``trainer.precision: null`` is what the device computes fast (:func:`recipes.shared.precision.fast_precision`). The
    choice is printed and written into the run's ``config.yaml``: a run that is resumed with that file keeps it.

    Args:
        args: of the command line; None takes those of the process.
        recipe: name of the recipe's folder; empty for a program without one.
        settings: further ones of LightningCLI.
    """

    def __init__(self, args: ArgsType = None, recipe: str = "", **settings: Any) -> None:
        self._recipe = recipe
        self._run: Settings = {}
        self._goes_on = False
        try:
            super().__init__(
                L.LightningModule,
                L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_callback=ConfigSaver,
                # ConfigSaver has set aside whatever must not be lost.
                save_config_kwargs={"overwrite": True},
                auto_configure_optimizers=False,  # it wants the parameters before configure_model has made them
                parser_kwargs=self._parser_settings(),
                args=args,
                **settings,
            )
        except SystemExit:
            self._say_how_to_resume()
            raise

    def _parser_settings(self) -> dict[str, Any]:
        """Return the settings of the parsers: no abbreviations, and a help that names the recipe's own settings."""
        common = {"allow_abbrev": False, "formatter_class": _HelpFormatter, "epilog": shipped_configs(self._recipe)}
        if not self._recipe:
            return common
        program = f"python -m recipes.{self._recipe}"
        described: dict[str, Any] = {**common, "prog": program}
        for command in self.subcommands():
            usage = f"{program} {command} [OPTION ...]"
            described[command] = {**common, "usage": usage, "description": settings_help(self._recipe)}
        return described

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        methods = ", ".join(methods_of(self._recipe))
        parser.add_argument("--method", type=str | None, default=None, help=f"One of {methods}; lora if none is given.")
        rho = "Radius of the method's perturbation, in place of the one in its configuration."
        parser.add_argument("--rho", type=float | None, default=None, help=rho)
        parser.add_argument("--run_name", type=str | None, default=None, help="Name of the loggers whose name is null.")
        parser.add_optimizer_args((Optimizer,))
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = sys.argv[1:] if args is None else args
        if not isinstance(given, list) or not given or given[0] not in self.subcommands():
            super().parse_arguments(parser, args)
            return
        command, line = given[0], taken_apart(self._recipe, given[1:])
        if line.checkpoint in ("last", LAST_IF_ANY):
            self._goes_on = line.checkpoint == LAST_IF_ANY
            settings = parser.parse_args([command, *line.arguments({})])[command]
            found = last_checkpoint(line.checkpoint, settings, command)
            line.checkpoint = str(found) if found else None
        if line.checkpoint is not None:
            self._run = settings_of_run(line.checkpoint)
        # LightningCLI warns of arguments that it is given beside the process's.
        self.config = parser.parse_args([command, *line.arguments(self._run)])

    @override
    def before_instantiate_classes(self) -> None:
        self._set_rho()
        refuse_unknown_fields(self._get(self.config, "model").get("init_args", {}).get("lora"))
        for logger in listed(self._get(self.config, "trainer").logger):
            arguments = getattr(logger, "init_args", {})
            if "name" in arguments and arguments["name"] is None:
                arguments["name"] = self._get(self.config, "run_name")

    def _set_rho(self) -> None:
        """Hand ``--rho`` to what has one, and forget it, so that the run's ``config.yaml`` has it in one place."""
        settings = self.config[self.subcommand] if self.subcommand else self.config
        rho, settings.rho = settings.rho, None
        if rho is None:
            return
        chosen = [each for each in listed(settings.trainer.callbacks) if is_method(each.class_path)]
        owners = chosen or [settings.model]
        if len(owners) > 1 or "rho" not in owners[0].init_args:
            raise MisconfigurationException(
                "--rho is the radius of one method: choose it with --method, or name the callback or the module, as in "
                "--trainer.callbacks.rho or --model.rho"
            )
        owners[0].init_args.rho = rho

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self._choose_precision()
        settings = self._get(self.config_init, "trainer")
        # In place of the configuration's list; LightningCLI still adds the callbacks that it makes itself.
        callbacks = self._wanted_callbacks(settings)
        savers = [each for each in callbacks if isinstance(each, ModelCheckpoint)]
        has_own = any(isinstance(each, Requeue) for each in callbacks)
        if not has_own and any(each.save_last is True and not each.save_weights_only for each in savers):
            # Ctrl-C, too, ends a run between two steps.
            callbacks.append(Requeue(["SIGUSR1", "SIGTERM", "SIGINT"]))
        checkpoint: Any = self._get(self.config_init, "ckpt_path") if self._goes_on else None
        for saver in savers if checkpoint else []:
            saver.dirpath = saver.dirpath or str(Path(checkpoint).parent)
        # Each run has its own, in which Lightning under SLURM finds no checkpoint of another run.
        folders = [getattr(each, "log_dir", None) for each in listed(settings.logger)]
        folder = settings.default_root_dir or next(filter(None, folders), None)
        trainer = super().instantiate_trainer(**{"callbacks": callbacks, "default_root_dir": folder, **kwargs})
        for logger in trainer.loggers:
            _ = logger.version  # fixed at first sight: all must look before the first has made its folder
        if settings.fast_dev_run:
            # Lightning suppresses every other file, but not the one at the end of training.
            for each in trainer.checkpoint_callbacks:
                each.save_last = None  # type: ignore[attr-defined]
        return trainer

    def _choose_precision(self) -> None:
        settings = self._get(self.config_init, "trainer")
        # A precision beside a plugin for it is an error of the Trainer's.
        if settings.precision is not None or any(isinstance(each, Precision) for each in listed(settings.plugins)):
            return
        chosen = fast_precision(settings.accelerator if isinstance(settings.accelerator, str) else "auto")
        for config in (self.config_init, self.config):  # of the trainer, and of the file that the run leaves
            self._get(config, "trainer").precision = chosen
        rank_zero_info(f"Precision {chosen}, in which this device computes fast; --trainer.precision sets another")

    def _wanted_callbacks(self, settings: Namespace) -> list[L.Callback]:
        """Return the callbacks of the Trainer's settings, and a progress bar, without what is switched off."""
        callbacks: list[L.Callback] = [*listed(settings.callbacks)]
        # A checkpoint lacks the frozen weights, and needs its saver: with one Lightning refuses the setting.
        if settings.enable_checkpointing is False and not self._get(self.config_init, "ckpt_path"):
            callbacks = [each for each in callbacks if not isinstance(each, Checkpoint)]
        if settings.enable_progress_bar is not False:
            callbacks.append(progress_bar(self.subcommand or "run"))
        return callbacks

    @override
    def after_instantiate_classes(self) -> None:
        if self.subcommand == "predict" and not is_overridden("predict_dataloader", self.datamodule):
            raise MisconfigurationException(
                f"predict: {type(self.datamodule).__name__} holds nothing to predict, as this recipe has only fit, "
                "validate and test"
            )
        if self.subcommand is not None and self._get(self.config_init, "ckpt_path"):
            without_missing_weights()
            self._compare_with_run()
        optimizer, scheduler = (self._get(self.config_init, name) for name in ("optimizer", "lr_scheduler"))
        if not (optimizer or scheduler):
            return
        if not isinstance(self.model, RecipeModule):
            raise MisconfigurationException(
                f"--optimizer and --lr_scheduler are for the recipes' modules, and {type(self.model).__name__} is "
                "another one: set both in its configure_optimizers"
            )
        self.model.chosen_optimizer = optimizer
        self.model.chosen_scheduler = scheduler

    def after_fit(self) -> None:
        """Say where the run is, and what comes next; Lightning calls it."""
        folder = self.trainer.log_dir  # every rank has to ask
        savers: list[Any] = self.trainer.checkpoint_callbacks
        kept = [saver.best_model_path or saver.last_model_path for saver in savers]
        path = next(filter(None, kept), None)
        if path is not None:
            rank_zero_info(f"The run is in {folder}. To test it: {self.parser.prog} test --ckpt_path {path}")

    def _say_how_to_resume(self) -> None:
        """After Ctrl-C, which ends a fit by an exit."""
        if not hasattr(self, "trainer") or not self.trainer.interrupted:
            return
        savers: list[Any] = self.trainer.checkpoint_callbacks
        saved = chain.from_iterable(Path(saver.dirpath or "").glob(LAST) for saver in savers)
        newest = max(saved, key=lambda path: path.stat().st_mtime, default=None)
        if self.subcommand == "fit" and newest:
            # Another would begin a second run's folder, and this one then refuses to choose.
            command = f": {self.parser.prog} fit --ckpt_path {newest}"
            rank_zero_info(f"To resume{', give the same command again' if self._goes_on else command}")

    @override
    def _parse_ckpt_path(self) -> None:
        """Take nothing from the hyper-parameters in a checkpoint, which Lightning would lay over the model's.

        They may name any class, and the recipes save none.
        """

    def _compare_with_run(self) -> None:
        """Name what a fit that goes on has otherwise than its run; an evaluation on other data is meant to."""
        if self.subcommand != "fit" or not self._run:
            return
        now = yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False))
        differences = "; ".join(differing_settings(self._run, now))
        checkpoint = self._get(self.config, "ckpt_path")
        if differences and self._goes_on:
            raise MisconfigurationException(
                f"--ckpt_path {LAST_IF_ANY}: {checkpoint} is of another run: {differences}. Give this run a "
                "--run_name, or leave these settings out to go on with that one"
            )
        if differences:
            rank_zero_warn(f"--ckpt_path {checkpoint} is of a run with other settings: {differences}")
