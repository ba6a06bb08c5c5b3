"""Which runs are done: a file of JSON lines with a row for each, so that the same command resumes where it stopped."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.data.files import begin_folder, write_whole

Row = dict[str, Any]


class Run(Protocol):
    """One piece of work; ``str(run)`` describes it to the user."""

    def key(self) -> Row:
        """Return the entries of its row that make it this run and no other."""


AnyRun = TypeVar("AnyRun", bound=Run)
_WAIT = 1.0  # seconds


class Ledger:
    """The rows of finished runs, each found again by its key.

    A row holds the run's key and what the run has found. Of several rows with one key the last one counts. Several
    processes may append to one file, which is whole at any time.

    Args:
        path: of the file, which need not exist yet.
        key: names of the entries of a row that make it its run's.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path = path
        self._key = key
        self._rows: dict[str, Row] = {}
        self.reload()

    @property
    def folder(self) -> Path:
        """That the file is in."""
        return self.path.parent

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order of the file."""
        return list(self._rows.values())

    def reload(self) -> None:
        """Read the file again, to which other processes may have appended."""
        self._rows = {self._name(row): row for row in read(self.path)}

    def find(self, run: Run) -> Row | None:
        """Return the row of a run, or None while the run is not done."""
        return self._rows.get(self._name(run.key()))

    def append(self, row: Row) -> None:
        """Add the row of a finished run."""
        with self._lock("append"):
            lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in (*read(self.path), row)]
            write_whole(self.path, "".join(lines))
        self._rows[self._name(row)] = row

    def perform_all(
        self,
        open_runs: Callable[[], Sequence[AnyRun]],
        perform: Callable[[AnyRun], Row | None],
        report: Callable[[AnyRun], None],
    ) -> None:
        """Perform runs, or wait for other processes that do them, until none is left.

        Args:
            open_runs: returns those that may start now, by the rows that there are.
            perform: does a run and returns its row, key included, or None if there is none.
            report: is called with the run before it starts.
        """
        has_waited = False
        runs = open_runs()
        while runs:
            is_waiting = not self.perform_first(runs, perform, report)
            if is_waiting and not has_waited:
                print("\nThis process waits for runs of others; Ctrl-C loses nothing", flush=True)
            if is_waiting:
                time.sleep(_WAIT)
            has_waited = is_waiting
            self.reload()
            runs = open_runs()

    def perform_first(
        self, runs: Sequence[AnyRun], perform: Callable[[AnyRun], Row | None], report: Callable[[AnyRun], None]
    ) -> bool:
        """Perform the first run that no other process does, as in :meth:`perform_all`; whether there was one."""
        for run in runs:
            with self.claimed(run) as is_mine:
                if is_mine:
                    report(run)
                    row = perform(run)
                    if row is not None:
                        self.append(row)
                    return True
        return False

    @contextmanager
    def claimed(self, run: Run) -> Iterator[bool]:
        """Say whether this process is the one to do a run, among several processes that share the file.

        The claim ends with the block. If this process is killed, it ends with the command of :func:`run_process` that
        does the run and outlives it.
        """
        name = self._name(run.key())
        # Of the key itself, which is JSON, no file name can be made.
        lock = self._lock(hashlib.sha256(name.encode()).hexdigest()[:16])
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        # A descriptor that the command inherits keeps the lock; filelock has no public name for it.
        if lock._context.lock_file_fd is not None:
            os.set_inheritable(lock._context.lock_file_fd, True)
        try:
            self.reload()
            yield name not in self._rows  # another process may have finished it since this one last looked
        finally:
            lock.release()

    def _lock(self, name: str) -> FileLock:
        """Return a lock that the processes share; its file stays in the folder ``claims``."""
        claims = self.path.parent / "claims"
        claims.mkdir(parents=True, exist_ok=True)
        return FileLock(claims / name)

    def _name(self, row: Row) -> str:
        return json.dumps({name: row.get(name) for name in self._key}, sort_keys=True)


def read(path: Path) -> list[Row]:
    """Return the rows of a file of JSON lines; none where there is no file."""
    if not path.exists():
        return []
    # Not splitlines(), which also splits at characters that may stand in a row, such as U+2028.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def keep_options(folder: Path, options: Sequence[str], written: Sequence[str]) -> None:
    """Refuse to mix runs of other options into a folder: their results would not be comparable.

    Args:
        folder: of the runs; the options are written into its ``options.json``.
        options: that all runs share.
        written: names of the files that the command replaces in its folder; those of others are set aside.

    Raises:
        MisconfigurationException: the folder was begun with others.
    """
    path = folder / "options.json"
    claims = folder / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    # One process at a time, of several that share the runs and start together.
    with FileLock(claims / "options"):
        if not path.exists():
            begin_folder(folder, path.name, written)
            write_whole(path, json.dumps(list(options)) + "\n")
    before = json.loads(path.read_text(encoding="utf-8"))
    if before != list(options):
        raise MisconfigurationException(
            f"--folder={folder} was begun with the options {before}, and now they are {list(options)}: name another "
            "folder, or delete this one"
        )


_STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""Requests to end: SIGUSR1 is SLURM's, when the job's time is over."""


class StoppedError(Exception):
    """A run in its own process has failed, or the user has stopped it.

    Attributes:
        status: its exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status

    @property
    def is_by_user(self) -> bool:
        """Whether Ctrl-C, a request to terminate or SLURM has ended it, and not an error."""
        # Of a signal that ends a process, Python reports the negative number, and a shell 128 more than the number.
        number = -self.status if self.status < 0 else self.status - 128
        return number in (signal.SIGINT, *_STOPS)


def run_process(command: Sequence[str]) -> None:
    """Run a command to its end; Ctrl-C reaches it too.

    Raises:
        StoppedError: it has failed, or was stopped.
    """
    process = subprocess.Popen(command, close_fds=False)  # it keeps the claim, see Ledger.claimed
    status, is_stopped = None, False

    def stop(number: int, _: Any) -> None:
        # It may end with status 0, as a Trainer does.
        nonlocal is_stopped
        is_stopped = True
        process.send_signal(number)

    # Ctrl-C reaches the command by itself, but a request to end this process would leave it running.
    before = {number: signal.signal(number, stop) for number in _STOPS}
    while status is None:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # The command got it too, and saves a checkpoint before it ends; a second one ends it at once.
            is_stopped = True
    for number, handler in before.items():
        signal.signal(number, handler)
    if is_stopped:
        status = 130  # as a shell reports a command that Ctrl-C has ended
    if status:
        raise StoppedError(status)


@cache  # the code that runs stays the same, whatever is checked out meanwhile
def commit() -> str | None:
    """Return the commit of this code, with a plus sign if files differ from it; None outside of a clone."""
    # Without tags, which would stand in place of the commit's hash.
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None
