"""A recipe's command in its own process, and what it leaves."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.command_line.configs import RECIPES
from recipes.studies.ledger import Row, run_process


def fit(recipe: str, folder: Path, arguments: Sequence[str]) -> Row:
    """Train, unless that has been done; a training that was stopped resumes from its last checkpoint.

    Args:
        recipe: name of its folder, or a module that is a LightningCLI.
        folder: of the run.
        arguments: of the recipe's ``fit``.

    Returns:
        What :class:`recipes.studies.result.RunResult` has written.

    Raises:
        StoppedError: the command has failed, or the user has stopped it.
        SystemExit: it has left nothing.
    """
    if not (folder / "fit.json").exists():
        if module_of(recipe) == recipe:  # Lightning's command line refuses to write it again
            (folder / "fit" / "config.yaml").unlink(missing_ok=True)
        run_process(command(recipe, "fit", folder, [*arguments, *resuming(folder / "fit")]))
    return written(folder / "fit.json")


def tested(recipe: str, folder: Path, arguments: Sequence[str], kept: str | Path) -> Row:
    """Test a checkpoint, unless that has been done; the arguments are those of :func:`fit`.

    Returns:
        What the test has logged.
    """
    if not (folder / "test.json").exists():
        run_process(command(recipe, "test", folder, [*arguments, f"--ckpt_path={kept}"]))
    return written(folder / "test.json")


def module_of(recipe: str) -> str:
    """Return the module that a recipe's name stands for; any other name is that of a LightningCLI."""
    return f"recipes.{recipe}" if (RECIPES / recipe / "__main__.py").exists() else recipe


def command(recipe: str, name: str, folder: Path, arguments: Sequence[str]) -> list[str]:
    """Return a recipe's command that leaves what it has found in a folder.

    Args:
        recipe: name of its folder.
        name: "fit" or "test".
        folder: of the run.
        arguments: of the command. Options of the last callback are meant for the last one among them.
    """
    return [
        *(sys.executable, "-m", module_of(recipe), name, *arguments),
        "--trainer.callbacks+=recipes.studies.result.RunResult",
        f"--trainer.callbacks.folder={folder}",
        *logging_in(folder / name),
    ]


def logging_in(folder: Path) -> list[str]:
    """Return arguments by which a recipe leaves its log in a folder, and its checkpoints in ``checkpoints`` there.

    The folder is fixed, so that a resumed run finds its own checkpoints.
    """
    logger = "--trainer.logger"
    return [
        f"{logger}=lightning.pytorch.loggers.CSVLogger",
        f"{logger}.init_args.save_dir={folder.parent.parent}",
        f"{logger}.init_args.name={folder.parent.name}",
        f"{logger}.init_args.version={folder.name}",
    ]


def resuming(folder: Path) -> list[str]:
    """Return arguments by which a training resumes from its log's last checkpoint; none where there is none."""
    # Of an epoch's end, or by time within a long one.
    lasts = sorted(folder.glob("checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    return [f"--ckpt_path={lasts[-1]}"] if lasts else []


def written(path: Path) -> Row:
    """Read what a command has left in a file.

    Raises:
        SystemExit: it has left nothing.
    """
    if not path.exists():
        raise SystemExit(f"{path} is missing: a run has ended without it. Leave out options such as fast_dev_run")
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    return found
