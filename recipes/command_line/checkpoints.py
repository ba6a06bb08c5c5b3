"""The checkpoints that ``--ckpt_path`` names, and the settings of their runs."""

from pathlib import Path

from jsonargparse import Namespace, dict_to_namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from recipes.command_line.configs import listed, methods_of_run, written_settings
from recipes.command_line.taken import Settings, taken

LAST = "last*.ckpt"
LAST_IF_ANY = "last-if-any"
"""Value of ``--ckpt_path``: the run's own last checkpoint, or none at its first start."""
_STEP_SETTINGS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


def last_checkpoint(name: str, settings: Namespace, command: str) -> Path | None:
    """Find the newest last checkpoint of the runs that log into the same folder as one with these settings.

    Args:
        name: "last", or "last-if-any", which begins a fit without one.
        settings: the settings of the current run.
        command: "fit" or another one.

    Raises:
        MisconfigurationException: there is none, or "last-if-any" would have to choose between runs.
    """
    folders, checkpoints = _folders(settings), []
    for folder in folders:
        checkpoints += [*folder.glob(f"*/checkpoints/{LAST}"), *folder.glob(LAST)]
    runs = sorted({str(path.parent) for path in checkpoints})
    if name == LAST_IF_ANY and len(runs) > 1:
        raise MisconfigurationException(
            f"--ckpt_path {name}: several runs have saved: {', '.join(runs)}. Give a file, or another --run_name"
        )
    if not checkpoints and (name == "last" or command != "fit"):
        searched = " and ".join(map(str, folders)) or "no folder, as no logger names one"
        raise MisconfigurationException(
            f"--ckpt_path {name}: there is no last checkpoint, searched for in {searched}. "
            "Leave it out to start again, or give a file, or the --method or --run_name of the run"
        )
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
    rank_zero_info(f"--ckpt_path {name}: {newest or 'none yet, so the run begins'}")
    return newest


def _folders(settings: Namespace) -> list[Path]:
    """Return the folders that savers set themselves, and the runs' folder, which the first logger names."""
    folders = []
    for callback in listed(settings.trainer.callbacks):
        if callback.get("init_args", {}).get("dirpath"):
            folders.append(Path(callback.init_args.dirpath))
    for logger in listed(settings.trainer.logger)[:1]:
        if isinstance(logger, Namespace):
            folders.append(Path(logger.init_args.save_dir, logger.init_args.name or settings.run_name))
    return list(dict.fromkeys(folders))


def settings_of_run(checkpoint: str) -> Settings:
    """Return the settings of a checkpoint's run that may be taken, and report the others; empty without its file.

    Raises:
        MisconfigurationException: there is no such checkpoint.
    """
    path = Path(checkpoint).expanduser()
    # PyTorch's sharded checkpoints are folders with this file, and other names are Lightning's own.
    is_there = path.is_file() or (path / ".metadata").exists()
    if not is_there and "://" not in checkpoint and not checkpoint.startswith(("hpc", "registry")):
        raise MisconfigurationException(
            f"--ckpt_path {checkpoint}: there is no such file: give one, such as runs/.../checkpoints/last.ckpt"
        )
    written = written_settings(path)
    if not is_there or not written:
        return {}
    run, left_out = taken(written)
    # The checkpoint that a run started from no longer matters: its own holds all that it took over.
    run.get("model", {}).get("init_args", {}).pop("start_from", None)
    file = path.parent.parent / "config.yaml"
    rank_zero_info(f"The settings are as in {file}, except for strategy, plugins, loggers and what is given here")
    if left_out:
        rank_zero_info(f"Not taken, as they may run code or write files: {', '.join(left_out)}. Give them here")
    return run


def differing_settings(before: Settings, now: Settings) -> list[str]:
    """Return a text for each setting in which a resumed fit differs from the run before."""
    there, here = _compared(before), _compared(now)
    differences = []
    for name in dict.fromkeys([*there, *here]):
        one, other = there.get(name), here.get(name)
        # A longer run may set what was null in the model or the data.
        is_added = one is None and name.startswith(("model.", "data."))
        if one != other and not is_added:
            differences.append(f"{name} {one!r} there, {other!r} here")
    return differences


def _compared(settings: Settings) -> Settings:
    """Return the settings of the model, the data and the training steps, by dotted names."""
    compared = {name: settings.get(name) for name in ("model", "data", "optimizer", "seed_everything")}
    methods = methods_of_run(settings)
    compared["trainer"] = {name: settings["trainer"].get(name) for name in _STEP_SETTINGS} | methods
    return dict(dict_to_namespace(compared).items())
