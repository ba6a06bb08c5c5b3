"""A recipe's command in its own process, and its results."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.command_line.configs import RECIPES
from recipes.studies.rows import Row

_STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""Requests to end: SIGUSR1 is SLURM's, when the job's time is over."""
OF_WORKER = "FLATLORA_OF_WORKER"
"""The environment variable that marks a run started by a worker."""


class StoppedError(Exception):
    """Ctrl-C, a request to terminate or SLURM ended a run in its own process."""


class FailedError(Exception):
    """A run in its own process ended with an error.

    Attributes:
        status: its exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


def fit(recipe: str, folder: Path, arguments: Sequence[str]) -> Row:
    """Train, unless that is done; a training that was stopped resumes from its last checkpoint.

    Args:
        recipe: name of its folder, or a module that is a LightningCLI.
        folder: folder of the run.
        arguments: arguments of the recipe's ``fit``.

    Returns:
        What :class:`recipes.studies.result.RunResult` has written.

    Raises:
        FailedError: the command failed.
        StoppedError: the user stopped it.
        MisconfigurationException: it left no results.
    """
    if not (folder / "fit.json").exists():
        if module_of(recipe) == recipe:  # Lightning's command line refuses to write it again
            (folder / "fit" / "config.yaml").unlink(missing_ok=True)
        given = [*arguments, *resuming(folder / "fit")]
        run_process(command(recipe, "fit", folder, given))
    return written(folder / "fit.json")


def tested(recipe: str, folder: Path, arguments: Sequence[str], kept: str | Path) -> Row:
    """Test a checkpoint, unless that is done; the arguments are those of :func:`fit`.

    Returns:
        The metrics that the test logged.
    """
    if not (folder / "test.json").exists():
        run_process(command(recipe, "test", folder, [*arguments, f"--ckpt_path={kept}"]))
    return written(folder / "test.json")


def module_of(recipe: str) -> str:
    """Return the module for a recipe's name; any other name is that of a LightningCLI."""
    return f"recipes.{recipe}" if (RECIPES / recipe / "__main__.py").exists() else recipe


def command(recipe: str, name: str, folder: Path, arguments: Sequence[str]) -> list[str]:
    """Return a recipe's command that leaves its results in a folder.

    Args:
        recipe: name of its folder.
        name: "fit" or "test".
        folder: folder of the run.
        arguments: arguments of the command. Options of the last callback belong to the last one among them.
    """
    return [
        *(sys.executable, "-m", module_of(recipe), name, *arguments),
        "--trainer.callbacks+=recipes.studies.result.RunResult",
        f"--trainer.callbacks.folder={folder}",
        *logging_in(folder / name),
    ]


def logging_in(folder: Path) -> list[str]:
    """Return arguments that make a recipe log into a folder, with its checkpoints in ``checkpoints`` there.

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
    """Return arguments that resume a training from its log's last checkpoint; none if there is none."""
    # From the end of an epoch, or by time within a long one.
    lasts = sorted(folder.glob("checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    return [f"--ckpt_path={lasts[-1]}"] if lasts else []


def written(path: Path) -> Row:
    """Read the file that a command has left.

    Raises:
        MisconfigurationException: it has left none.
    """
    if not path.exists():
        raise MisconfigurationException(
            f"{path} is missing: a run ended without writing it. Leave out options such as fast_dev_run"
        )
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    return found


def run_process(command: Sequence[str]) -> None:
    """Run a command to its end; Ctrl-C reaches it too.

    Raises:
        FailedError: it failed.
        StoppedError: the user stopped it.
    """
    is_stopped = False
    # The command ends when this process does, see recipes.studies.result.
    with subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, OF_WORKER: "1"}) as process:

        def stop(number: int, _: Any) -> None:
            # It may end with status 0, as a Trainer does.
            nonlocal is_stopped
            is_stopped = True
            process.send_signal(number)

        # Ctrl-C reaches the command by itself, but a request to end only this process would leave it running.
        before = {number: signal.signal(number, stop) for number in _STOPS}
        try:
            while process.poll() is None:
                try:
                    process.wait()
                except KeyboardInterrupt:
                    # The command got it too, and saves a checkpoint before it ends; a second one ends it at once.
                    is_stopped = True
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    # For a signal that ends a process, Python reports its negative number, and a shell 128 plus the number.
    status = process.returncode
    ended_by = -status if status < 0 else status - 128
    if is_stopped or ended_by in (signal.SIGINT, *_STOPS):
        raise StoppedError
    if status:
        raise FailedError(status)


@cache  # the code that runs stays the same, whatever is checked out meanwhile
def commit() -> str | None:
    """Return the commit of this code, with a plus sign if files differ from it; None outside of a clone."""
    # Without tags, which would replace the commit's hash.
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None
