"""The checkpoints that ``--ckpt_path`` names, and the settings of their runs."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from recipes.shared.configs import listed, methods_of_run

_STEP_SETTINGS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


def last_checkpoint(settings: Namespace) -> Path:
    """The newest last checkpoint of the runs that log into the same folder as one with these settings.

    Raises:
        MisconfigurationException: there is none.
    """
    pattern = f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}*{ModelCheckpoint.FILE_EXTENSION}"
    searched = _places(settings)
    checkpoints: list[Path] = []
    for folder, within in searched:
        checkpoints += folder.glob(within + pattern)
    if not checkpoints:
        places = " and ".join(str(folder / (within + pattern)) for folder, within in searched)
        raise MisconfigurationException(
            f"--ckpt_path last: there is no last checkpoint, searched for in {places or 'nowhere: nothing saves any'}. "
            "Leave it out to start anew, or give a file, or the --method or --run_name of the run"
        )
    # By time and not by name, in which version_10 comes before version_9.
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime)
    rank_zero_info(f"--ckpt_path last is {newest}")
    return newest


def _places(settings: Namespace) -> list[tuple[Path, str]]:
    """Where the savers of a configuration save: folders, and a pattern of those within, for any version of a run."""
    if settings.trainer.enable_checkpointing is False:
        return []
    places = []
    for callback in listed(settings.trainer.callbacks):
        arguments = callback.get("init_args", {})
        if "dirpath" in arguments:
            places.append((Path(arguments["dirpath"]), "") if arguments["dirpath"] else _of_runs(settings))
    # Without any, Lightning adds one.
    return list(dict.fromkeys(places or [_of_runs(settings)]))


def _of_runs(settings: Namespace) -> tuple[Path, str]:
    """Where a ModelCheckpoint saves by itself."""
    trainer = settings.trainer
    root = Path(trainer.default_root_dir or "")
    if trainer.logger in (None, True):
        return root / "lightning_logs", "*/checkpoints/"
    if not trainer.logger:
        return root / "checkpoints", ""
    first = listed(trainer.logger)[0].get("init_args", {})
    name = first.get("name") or first.get("project") or settings.run_name or ""
    return Path(first.get("save_dir") or root, name), "*/checkpoints/"


def problem_of(path: str | None) -> str | None:
    """Why a checkpoint can't be read, if it is a local file, or a folder of a sharded one; None where nothing is wrong.

    "hpc" and names of a registry are Lightning's own, and other places have an address.
    """
    if path is None or path == "hpc" or "://" in path or path.startswith("registry"):
        return None
    place = Path(path).expanduser()
    if not place.exists():
        return "there is no such file"
    # A sharded checkpoint of PyTorch's is a folder with this file.
    if place.is_dir() and not (place / ".metadata").exists():
        files = sorted(place.glob("*.ckpt")) or sorted(place.parent.glob(f"{place.name}.ckpt"))
        return "it is a folder" + (f"; give a file, such as {files[0]}" if files else " without a checkpoint")
    return None


def differing_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings in which a fit that goes on differs from the run before, a text for each."""
    differences = _differences("trainer", _of_a_step(before), _of_a_step(now), or_null=True)
    for section in ("model", "data", "optimizer"):
        # What was null in the model or the data may be what a longer run adds.
        differences += _differences(section, before.get(section), now.get(section), section == "optimizer")
    return differences


def _differences(name: str, before: Any, now: Any, or_null: bool = False) -> list[str]:
    """The settings that differ, a text for each; those that were null only where they are asked for."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in dict.fromkeys([*before, *now]):
            # What a run started from is of no account any more: its checkpoint holds all that it took over.
            if key != "start_from":
                found += _differences(f"{name}.{key}", before.get(key), now.get(key), or_null)
        return found
    if before == now or (before is None and not or_null):
        return []
    return [f"{name.replace('.init_args', '')} {before!r} there, {now!r} here"]


def _of_a_step(settings: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's settings that change what a step does; the method has its name, or "none" where there is none."""
    trainer = settings.get("trainer") or {}
    chosen = {name: trainer.get(name) for name in _STEP_SETTINGS}
    methods = methods_of_run(settings)
    return {**chosen, "method": ", ".join(methods) or "none", **methods}
