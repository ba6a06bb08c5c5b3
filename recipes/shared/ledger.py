"""Which runs are done: a file of JSON lines with a row for each, so that the same command resumes where it stopped."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.shared.files import begin_folder, write_whole

Row = dict[str, Any]


class Run(Protocol):
    """One piece of work; ``str(run)`` describes it to the user."""

    def key(self) -> Row:
        """The entries of its row that make it this run and no other."""


AnyRun = TypeVar("AnyRun", bound=Run)
Value = TypeVar("Value")
_WAIT = 1.0  # seconds


class Ledger:
    """The rows of finished runs, each found again by its key.

    A row holds the run's key and what the run has found. A line that was cut off by a stop counts for nothing, and of
    several rows with one key the last one counts. Several processes may append to one file.

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
        self._rows = {}
        for row in read(self.path):
            # Rows of another program, or of other versions of this one, have other entries.
            with suppress(KeyError):
                self._rows[self._name(row)] = row

    def find(self, run: Run) -> Row | None:
        """The row of a run, or None while the run is not done."""
        return self._rows.get(self._name(run.key()))

    def append(self, row: Row) -> None:
        """Add the row of a finished run."""
        line = json.dumps(row, ensure_ascii=False) + "\n"
        # One process at a time: half of another one's row, on its way to the file, would pass for a line cut off.
        with self._lock("append"):
            # Behind a line that was cut off, the new row would be lost with it.
            if _ends_within_a_line(self.path):
                line = "\n" + line
            with self.path.open("ab") as file:
                file.write(line.encode())
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
        waits = False
        runs = open_runs()
        while runs:
            if self.perform_first(runs, perform, report):
                waits = False
            else:
                if not waits:
                    print("\nThis process waits for runs of others; Ctrl-C loses nothing", flush=True)
                waits = True
                time.sleep(_WAIT)
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
        """Whether this process is the one to do a run, among several processes that share the file.

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
        """A lock that the processes share; its file stays in the folder ``claims``."""
        claims = self.path.parent / "claims"
        claims.mkdir(parents=True, exist_ok=True)
        return FileLock(claims / name)

    def _name(self, row: Row) -> str:
        return json.dumps({name: row[name] for name in self._key}, sort_keys=True)


def read(path: Path) -> list[Row]:
    """The rows of a file of JSON lines, without lines that were cut off; none where there is no file."""
    rows: list[Row] = []
    if not path.exists():
        return rows
    # Not splitlines(), which also splits at characters that may stand in a row, such as U+2028.
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _ends_within_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def each_once(values: Iterable[Value]) -> list[Value]:
    """The values without repetitions, in their order: a seed that is named twice is still one seed.

    Example:
        >>> each_once([1, 0, 1])
        [1, 0]
    """
    return list(dict.fromkeys(values))


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


# Requests to end: SIGUSR1 is SLURM's, when the job's time is over.
_STOPS = (signal.SIGTERM, signal.SIGUSR1)
# Of a signal that ends a process, Python reports the negative number, and a shell 128 more than the number.
_STATUSES_OF_STOPS = {-number for number in (signal.SIGINT, *_STOPS)}
_STATUSES_OF_STOPS |= {128 + number for number in (signal.SIGINT, *_STOPS)}


class StoppedError(Exception):
    """A run in a process of its own has failed, or the user has stopped it.

    Attributes:
        status: its exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status

    @property
    def is_by_user(self) -> bool:
        """Whether Ctrl-C, a request to terminate or SLURM has ended it, and not an error."""
        return self.status in _STATUSES_OF_STOPS


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
    """The commit of this code, with a plus sign if files differ from it; None outside of a clone."""
    # Without tags, which would stand in place of the commit's hash.
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None
