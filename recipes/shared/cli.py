"""The command line that all recipes share."""

import re
import sys
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, cast

import lightning as L
import yaml
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar
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
from recipes.shared.checkpoints import LAST_IF_ANY, differing_settings, last_checkpoint, own_checkpoint, problem_of
from recipes.shared.command_line import (
    hint,
    in_order,
    option,
    refuse_nulls,
    refuse_unknown_fields,
    with_base_and_method,
    with_run,
)
from recipes.shared.configs import is_method, listed, methods_of, settings_help, settings_of_run, shipped_configs
from recipes.shared.files import set_aside
from recipes.shared.precision import fast_precision
from recipes.shared.progress import progress_bar, without_missing_weights
from recipes.shared.ranks import gathered
from recipes.shared.training import RecipeModule

_SWITCHES = {
    "enable_progress_bar": ProgressBar,
    "enable_checkpointing": Checkpoint,
    "enable_model_summary": ModelSummary,
}


class RecipeParser(LightningArgumentParser):
    """Lightning's parser, which names the shipped configurations in its help and where one is missing.

    Abbreviations are no options: ``--ckpt`` would be read as ``--ckpt_path`` too late for the run's settings.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.recipe = ""

    @override
    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return f"{settings_help(self.recipe)}{super().format_help(*args, **kwargs)}\n{shipped_configs(self.recipe)}\n"

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse's own words, of a file that does not exist and of a command line without a model and data.
        if 'key "config"' in message or re.search(r"required: (\w+\.)?(data|model)", message):
            message = f"{message}\n{shipped_configs(self.recipe)}"
        super().error(f"{message}{hint(message, self.get_defaults().keys())}", ex)


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
        folder = trainer.log_dir  # every rank has to ask
        assert folder is not None  # without a logger it is the Trainer's default_root_dir
        path = Path(folder, self.config_filename)
        if self.save_to_log_dir and not self.already_saved and trainer.is_global_zero:
            set_aside(path)
        super().setup(trainer, pl_module, stage)


class RecipeCLI(LightningCLI):
    """LightningCLI for any module and data module, whose loggers write into one folder a run.

    ``run_name`` is the name of all loggers whose own name is null: an overlay of a method names its runs in one line.

    The recipe's ``base.yaml`` is laid below all that is given. With ``--ckpt_path`` the settings of the checkpoint's
    run come between the two, from its ``config.yaml``: its model, data, method and the Trainer's plain values, see
    :func:`recipes.shared.taken.taken`. ``--ckpt_path last`` is the newest last checkpoint of the runs that log into the
    same folder, and an error if there is none. In a fit a warning names what is given otherwise than there: of the
    model, the data, the method, the optimizer, the seed, the precision, accumulation and clipping. ``--ckpt_path
    last-if-any`` makes one command both a run's first start and its return: a fit that goes on saves where the run has
    saved before, and what is given otherwise is an error.

    ``--method`` chooses a method's configuration, ``--rho`` its radius. ``--optimizer`` and ``--lr_scheduler`` each
    replace their own part of what the recipe trains with. Switching the progress bar, the checkpoints or the model
    summary off drops the callbacks that the configuration lists for them.

    ``trainer.precision: null`` is what the device computes fast (:func:`recipes.shared.precision.fast_precision`). The
    choice is printed and written into the run's ``config.yaml``: a run that is resumed with that file keeps it.

    Args:
        args: of the command line; None takes those of the process.
        recipe: name of the recipe's folder; empty for a program without one.
        settings: further ones of LightningCLI.
    """

    def __init__(self, args: ArgsType = None, recipe: str = "", **settings: Any) -> None:
        self._recipe = recipe
        self._goes_on = False
        if recipe:
            settings["parser_kwargs"] = {"prog": f"python -m recipes.{recipe}"}
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
                parser_class=RecipeParser,
                args=args,
                **settings,
            )
        except SystemExit:
            self._say_how_to_resume()
            raise

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        # Among the Trainer's hundred options nobody would find them.
        cast("RecipeParser", parser).recipe = self._recipe
        return parser

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
        # Lightning would read sys.argv itself, without what is added here.
        given = sys.argv[1:] if args is None else args
        if not isinstance(given, list):
            super().parse_arguments(parser, given)
            return
        command = given[:1] if given and given[0] in self.subcommands() else []
        given = given[len(command) :]
        if command:
            given = self._with_defaults(parser, command[0], given)
        # LightningCLI warns of arguments that it is given beside the process's.
        self.config = parser.parse_args([*command, *in_order(given)])

    def _with_defaults(self, parser: LightningArgumentParser, command: str, given: list[str]) -> list[str]:
        """The arguments behind all that they leave out."""
        given = with_base_and_method(self._recipe, given)
        checkpoint = option(given, "--ckpt_path")
        if checkpoint in ("last", LAST_IF_ANY):
            settings = parser.parse_args([command, *in_order(given)])[command]
            found = last_checkpoint(settings) if checkpoint == "last" else own_checkpoint(settings, command)
            self._goes_on = checkpoint == LAST_IF_ANY
            checkpoint = str(found) if found else None
            given.append(f"--ckpt_path={checkpoint or 'null'}")
        # "hpc" and addresses are no files of a run.
        if checkpoint is None or not Path(checkpoint).exists():
            return given
        return with_run(self._recipe, given, Path(checkpoint), trains=command == "fit")

    @override
    def before_instantiate_classes(self) -> None:
        self._set_rho()
        for part in ("model", "data"):
            chosen = self._get(self.config, part)
            refuse_nulls(part, resolve_name(chosen.class_path), chosen.get("init_args", {}))
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
        callbacks = wanted_callbacks(settings, self.subcommand or "run")
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

    @override
    def after_instantiate_classes(self) -> None:
        # What a class inherits may be of no use to it: ContrastiveData has the method of all data in parts.
        predicts = is_overridden("predict_dataloader", self.datamodule) and getattr(self.datamodule, "predicts", True)
        if self.subcommand == "predict" and not predicts:
            raise MisconfigurationException(
                f"predict: {type(self.datamodule).__name__} holds nothing to predict, as this recipe has only fit, "
                "validate and test"
            )
        if self.subcommand is not None:
            self._check_checkpoint()
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
        saved = chain.from_iterable(Path(saver.dirpath or "").glob("last*.ckpt") for saver in savers)
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

    def _check_checkpoint(self) -> None:
        """Refuse a checkpoint that can't be read, and name what its run had otherwise."""
        settings = self.config_init[self.subcommand]
        if settings.ckpt_path:
            without_missing_weights()
        problem = problem_of(settings.ckpt_path, settings.trainer.enable_checkpointing is not False)
        if problem:
            raise MisconfigurationException(f"--ckpt_path {settings.ckpt_path}: {problem}")
        # An evaluation on other data is meant to have them, and "hpc" and addresses are no files of a run.
        checkpoint = Path(settings.ckpt_path or "")
        before = settings_of_run(checkpoint)[0] if settings.ckpt_path and checkpoint.exists() else {}
        if self.subcommand != "fit" or not before:
            return
        now = yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False))
        differences = differing_settings(before, now)
        if differences and self._goes_on:
            raise MisconfigurationException(
                f"--ckpt_path {LAST_IF_ANY}: {checkpoint} is of another run: {'; '.join(differences)}. Give this run a "
                "--run_name, or leave these settings out to go on with that one"
            )
        if differences:
            rank_zero_warn(f"--ckpt_path {checkpoint} is of a run with other settings: {'; '.join(differences)}")


def wanted_callbacks(settings: Any, name: str) -> list[L.Callback]:
    """The callbacks of the Trainer's settings without those that another setting switches off, and a progress bar."""
    off = tuple(kind for name, kind in _SWITCHES.items() if settings[name] is False)
    callbacks = [callback for callback in listed(settings.callbacks) if not isinstance(callback, off)]
    has_own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    if settings.enable_progress_bar is not False and not has_own_bar:
        callbacks.append(progress_bar(name))
    return callbacks
