"""The checkpoints that ``--ckpt_path`` names, and the settings of their runs."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from recipes.shared.configs import listed, methods_of_run

LAST_IF_ANY = "last-if-any"
"""Of ``--ckpt_path``: the last checkpoint of the run itself, and none at its first start."""
_STEP_SETTINGS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


def last_checkpoint(settings: Namespace) -> Path:
    """The newest last checkpoint of the runs that log into the same folder as one with these settings.

    Raises:
        MisconfigurationException: there is none.
    """
    searched, checkpoints = _folders(settings), _last_checkpoints(settings)
    if not checkpoints:
        places = " and ".join(map(str, searched)) or "nowhere: nothing saves any"
        raise MisconfigurationException(
            f"--ckpt_path last: there is no last checkpoint, searched for in {places}. Leave it out to start again, or "
            "give a file, or the --method or --run_name of the run"
        )
    rank_zero_info(f"--ckpt_path last is {checkpoints[-1]}")
    return checkpoints[-1]


def own_checkpoint(settings: Namespace, command: str) -> Path | None:
    """The last checkpoint of the one run that logs as one with these settings; None if none has saved yet.

    Raises:
        MisconfigurationException: several have, or nothing is to be trained.
    """
    checkpoints = _last_checkpoints(settings)
    runs = sorted({str(path.parent) for path in checkpoints})
    if command != "fit" or len(runs) > 1:
        problem = f"several runs have saved there, in {', '.join(runs)}" if command == "fit" else "it is for fit"
        raise MisconfigurationException(f"--ckpt_path {LAST_IF_ANY}: {problem}. Give a file, or another --run_name")
    newest = checkpoints[-1] if checkpoints else None
    found = f"resumes {newest}" if newest else "none yet, so the run begins"
    rank_zero_info(f"--ckpt_path {LAST_IF_ANY}: {found}")
    return newest


def _last_checkpoints(settings: Namespace) -> list[Path]:
    """All last checkpoints of the runs that log into the same folder, the newest at the end."""
    name = f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}*{ModelCheckpoint.FILE_EXTENSION}"
    checkpoints: list[Path] = []
    for folder in _folders(settings):
        # Of any version of a run, or without versions.
        checkpoints += [*folder.glob(f"*/checkpoints/{name}"), *folder.glob(name)]
    # By time and not by name, in which version_10 comes before version_9.
    return sorted(checkpoints, key=lambda path: path.stat().st_mtime)


def _folders(settings: Namespace) -> list[Path]:
    """Where the savers of a configuration save."""
    if settings.trainer.enable_checkpointing is False:
        return []
    folders = []
    for callback in listed(settings.trainer.callbacks):
        arguments = callback.get("init_args", {})
        if "dirpath" in arguments:
            folders.append(Path(arguments["dirpath"] or _of_runs(settings)))
    # Without any, Lightning adds one.
    return list(dict.fromkeys(folders or [_of_runs(settings)]))


def _of_runs(settings: Namespace) -> Path:
    """Where a ModelCheckpoint saves by itself."""
    trainer = settings.trainer
    root = Path(trainer.default_root_dir or "")
    if trainer.logger in (None, True):
        return root / "lightning_logs"
    if not trainer.logger:
        return root / "checkpoints"
    first = listed(trainer.logger)[0].get("init_args", {})
    name = first.get("name") or first.get("project") or settings.run_name or ""
    return Path(first.get("save_dir") or root, name)


def problem_of(path: str | None, has_savers: bool = True) -> str | None:
    """Why a checkpoint can't be read, if it is a local file, or a folder of a sharded one; None where nothing is wrong.

    "hpc" and names of a registry are Lightning's own, and other places have an address.

    Args:
        path: as it is given.
        has_savers: the configuration's AdapterCheckpoint takes part.
    """
    if path is not None and not has_savers:
        return "it lacks the frozen weights, which --trainer.enable_checkpointing=false lets nobody add: leave it out"
    if path is None or path == "hpc" or "://" in path or path.startswith("registry"):
        return None
    if path == "best":
        return "which one is the best is known only to the run that has saved it: give the file, named after its step"
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
    there, here = _compared(before), _compared(now)
    differences = []
    for name in dict.fromkeys([*there, *here]):
        one, other = there.get(name), here.get(name)
        # What was null in the model or the data may be what a longer run adds.
        is_added = one is None and name.startswith(("model.", "data."))
        if one != other and not is_added:
            differences.append(f"{name} {one!r} there, {other!r} here")
    return differences


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the model, the data, and of what a step does, by dotted names."""
    trainer = settings.get("trainer") or {}
    methods = methods_of_run(settings)
    of_a_step = {name: trainer.get(name) for name in _STEP_SETTINGS}
    compared = {section: settings.get(section) for section in ("model", "data", "optimizer", "seed_everything")}
    compared["trainer"] = {**of_a_step, "method": ", ".join(methods) or "none", **methods}
    flat = _flat(compared)
    # What a run started from is of no account any more: its checkpoint holds all that it took over.
    return {name.replace(".init_args", ""): flat[name] for name in flat if not name.endswith(".start_from")}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
