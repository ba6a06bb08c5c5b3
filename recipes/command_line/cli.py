"""The command line that all recipes share."""

import os
import shlex
import sys
from argparse import RawDescriptionHelpFormatter
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
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora import Requeue
from recipes.command_line.arguments import refuse_unknown_fields, taken_apart
from recipes.command_line.checkpoints import LAST_IF_ANY, differing_settings, last_checkpoint, settings_of_run
from recipes.command_line.configs import is_method, listed, methods_of, settings_help
from recipes.command_line.model_card import model_card
from recipes.command_line.precision import fast_precision
from recipes.command_line.progress import progress_bar
from recipes.command_line.taken import Settings
from recipes.data.files import set_aside
from recipes.training.module import RecipeModule
from recipes.training.ranks import gathered

_OF_FOLDERS = ("CSVLogger", "TensorBoardLogger")
"""Loggers that write into save_dir/name/version."""


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of the texts before and after the options."""


class ConfigSaver(SaveConfigCallback):
    """Write the run's ``config.yaml``, if all ranks agree, after renaming another file of that name.

    A run that is resumed into its old folder finds one there. A run without a logger writes into the current folder,
    in which a user may keep a file of that name.
    """

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        precisions = set(gathered(str(trainer.precision)))
        if len(precisions) > 1:
            raise MisconfigurationException(
                f"the processes would compute in different precisions ({', '.join(sorted(precisions))}), since their "
                "machines differ: give them one by --trainer.precision"
            )
        path = Path(trainer.log_dir or "", self.config_filename)  # every rank has to ask
        if self.save_to_log_dir and not self.already_saved and trainer.is_global_zero:
            set_aside(path)
        super().setup(trainer, pl_module, stage)


class RecipeCLI(LightningCLI):
    """LightningCLI for any recipe's module and data module, whose loggers write into one folder per run.

    ``run_name`` names all loggers whose own name is null: a method's overlay names its runs in one line.

    The recipe's ``base.yaml`` comes before all that is given. With ``--ckpt_path`` the settings of the checkpoint's run
    come between the two, from its ``config.yaml`` (:func:`recipes.command_line.taken.taken`), and in a fit a warning
    names the settings that differ from it. ``--ckpt_path last`` is the newest last checkpoint of the runs that log
    into the same folder. ``--ckpt_path last-if-any`` lets one command both start a run and resume it: a resumed fit
    saves where the run has saved before, and a setting that differs is an error.

    ``--method`` chooses a method's configuration, ``--rho`` its radius. ``--optimizer`` and ``--lr_scheduler`` each
    replace only their own part of the recipe's training. Switching the checkpoints off drops the callbacks that the
    configuration lists for them.

    ``trainer.precision: null`` is the device's fast precision
    (:func:`recipes.command_line.precision.fast_precision`). The choice is printed and written into the run's
    ``config.yaml``: a run that is resumed with that file keeps it.

    Args:
        args: the command line's arguments; None takes those of the process.
        recipe: name of the recipe's folder; empty for a program without one.
        settings: further arguments of LightningCLI.
    """

    def __init__(self, args: ArgsType = None, recipe: str = "", **settings: Any) -> None:
        self._recipe = recipe
        self._run: Settings = {}
        self._goes_on = False
        self._place: Path | None = None
        super().__init__(
            RecipeModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=ConfigSaver,
            save_config_kwargs={"overwrite": True},  # ConfigSaver has set aside whatever must not be lost
            auto_configure_optimizers=False,  # it wants the parameters before configure_model has made them
            parser_kwargs=self._parser_settings(),
            args=args,
            **settings,
        )

    def _parser_settings(self) -> dict[str, Any]:
        """Return the settings of the parsers: no abbreviations, and a help that names the configuration files."""
        program = f"python -m recipes.{self._recipe}"
        about, files = settings_help(self._recipe)
        common = {"allow_abbrev": False, "formatter_class": _HelpFormatter, "description": about, "epilog": files}
        described: dict[str, Any] = {**common, "prog": program}
        for command in self.subcommands():
            described[command] = {**common, "usage": f"{program} {command} [OPTION ...]"}
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
        # LightningCLI warns of arguments that it is given in addition to the process's.
        self.config = parser.parse_args([command, *line.arguments(self._run)])

    @override
    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand] if self.subcommand else self.config
        self._set_rho(settings)
        self._choose_precision(settings.trainer)
        refuse_unknown_fields(settings.model.get("init_args", {}).get("lora"))
        self._place = self._place_in_run(settings)
        for logger in listed(settings.trainer.logger):
            arguments = getattr(logger, "init_args", {})
            if "name" not in arguments or arguments["name"] is not None:
                continue
            arguments["name"] = settings.run_name
            if self._place and logger.class_path.endswith(_OF_FOLDERS):
                *parents, arguments["name"], arguments["version"] = self._place.parts
                arguments["save_dir"] = str(Path(*parents))

    def _place_in_run(self, settings: Namespace) -> Path | None:
        """Return the folder, within that of its run, of a checkpoint's evaluation; None if it can't be written."""
        if self.subcommand == "fit" or not self._run:
            return None
        run = Path(settings.ckpt_path).expanduser().resolve().parent.parent
        return run / str(self.subcommand) if os.access(run, os.W_OK) else None

    def _choose_precision(self, trainer: Namespace) -> None:
        # A precision with a plugin for it is an error of the Trainer's.
        if trainer.precision is not None or "Precision" in str(trainer.plugins):
            return
        trainer.precision = fast_precision(trainer.accelerator if isinstance(trainer.accelerator, str) else "auto")
        rank_zero_info(f"Precision {trainer.precision}, which is fast on this device; --trainer.precision sets another")

    def _set_rho(self, settings: Namespace) -> None:
        """Pass ``--rho`` to the method, and remove it, so that the run's ``config.yaml`` has it once."""
        rho, settings.rho = settings.rho, None
        if rho is None:
            return
        chosen = [each for each in listed(settings.trainer.callbacks) if is_method(each.class_path)]
        if len(chosen) != 1 or "rho" not in chosen[0].init_args:
            raise MisconfigurationException(
                "--rho is the radius of one method: choose it with --method, or set --trainer.callbacks.rho or "
                "--model.rho"
            )
        chosen[0].init_args.rho = rho

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
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
        if self._place:
            rank_zero_only(set_aside)(self._place)  # of an earlier evaluation, which a CSVLogger would delete
        # Each run has its own, in which Lightning under SLURM finds no checkpoint of another run.
        folders = [getattr(each, "log_dir", None) for each in listed(settings.logger)]
        folder = settings.default_root_dir or next(filter(None, folders), None)
        trainer = super().instantiate_trainer(**{"callbacks": callbacks, "default_root_dir": folder, **kwargs})
        for logger in trainer.loggers:
            _ = logger.version  # fixed when first read: all must read it before the first has made its folder
        return trainer

    def _wanted_callbacks(self, settings: Namespace) -> list[L.Callback]:
        """Return the callbacks of the Trainer's settings, and a progress bar, without those that are switched off."""
        callbacks: list[L.Callback] = [*listed(settings.callbacks)]
        # A checkpoint lacks the frozen weights, and needs its saver: with one Lightning refuses enable_checkpointing.
        # In a fast_dev_run Lightning suppresses every file but the one at the end of training.
        saves = settings.enable_checkpointing is not False and not settings.fast_dev_run
        if not saves and not self._get(self.config_init, "ckpt_path"):
            callbacks = [each for each in callbacks if not isinstance(each, Checkpoint)]
        if settings.enable_progress_bar is not False:
            callbacks.append(progress_bar(self.subcommand or "run"))
        return callbacks

    @override
    def after_instantiate_classes(self) -> None:
        self.model.chosen_optimizer = self._get(self.config_init, "optimizer")
        self.model.chosen_scheduler = self._get(self.config_init, "lr_scheduler")
        if self.subcommand == "fit":
            now = yaml.safe_load(self._parser("fit").dump(self.config["fit"], skip_none=False))
            base = str(getattr(self.model, "model_name", type(self.model).__name__))
            self.model.adapter_card = str(model_card(base, self.model.lora, now, self.model.task, "peft"))
            if self._run:
                self._compare_with_run(now)

    def after_fit(self) -> None:
        """Print the run's folder, its best checkpoint, and the next command; called by Lightning."""
        folder = self.trainer.log_dir  # every rank has to ask
        saver: Any = self.trainer.checkpoint_callback
        path = saver and (saver.best_model_path or saver.last_model_path)
        if not path:
            return
        is_best = saver.monitor is not None and saver.best_model_score is not None
        figure = f", {saver.monitor} {saver.best_model_score:.4g}" if is_best else ""
        division = getattr(self.datamodule, "division", None)
        option = "test_dataset" if getattr(division, "own_datasets", None) else "test_split"
        more = "" if division is None or division.is_wanted("test") else f" --data.{option} FILE"
        rank_zero_info(
            f"The run is in {folder}\n"
            f"Its {'best' if is_best else 'last'} checkpoint: {path}{figure}\n"
            f"Next: {self.parser.prog} test --ckpt_path {shlex.quote(path)}{more}"
        )

    @override
    def _parse_ckpt_path(self) -> None:
        """Ignore the hyper-parameters in a checkpoint, with which Lightning would override the model's.

        They may name any class, and the recipes save none.
        """

    def _compare_with_run(self, now: Settings) -> None:
        """Report settings of a resumed fit that differ from its run's; an evaluation may use other data."""
        differences = "; ".join(differing_settings(self._run, now))
        problem = f"--ckpt_path {self._get(self.config, 'ckpt_path')} is of a run with other settings: {differences}"
        if differences and self._goes_on:
            raise MisconfigurationException(f"{problem}. Give this run a --run_name, or leave these settings out")
        if differences:
            rank_zero_warn(problem)
