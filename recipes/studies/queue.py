"""Runs that several workers share: trials of an Optuna study, each done by one of them.

A worker is the same command, started again on any machine that reaches the storage. If a worker is killed, its trial
loses its heartbeat, and the run is queued again.
"""

import json
import random
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import optuna
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna import Study, Trial
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, event
from sqlalchemy.exc import SQLAlchemyError

from recipes.data.files import write_whole
from recipes.studies.process import FailedError
from recipes.studies.rows import Row

HEARTBEAT = 15  # seconds
GRACE = 60  # seconds without a heartbeat, after which a worker counts as killed
_WAIT = 1.0  # seconds
_ATTEMPTS = 5
_QUEUED = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)


class Run(Protocol):
    """One piece of work; ``str(run)`` describes it to the user."""

    @property
    def name(self) -> str:
        """A name that no other run of the study has."""

    def key(self) -> Row:
        """Return what restores the run, as JSON."""


AnyRun = TypeVar("AnyRun", bound=Run)


class DroppedError(Exception):
    """A trial came to nothing, but its worker continues: the run failed, or another worker does it."""


class Queue(Generic[AnyRun]):
    """The runs of a study and their results.

    Args:
        study: study whose trials are the runs.
        restore: makes a run from its key, since another worker may have queued it.

    Attributes:
        rows: results of the finished runs, each with its run's key, in the order in which they were queued.
    """

    def __init__(self, study: Study, restore: Callable[[Row], AnyRun]) -> None:
        self.study = study
        self.restore = restore
        _silence()
        self._was_given_away = False
        self._has_done = False  # any run
        self.reload()

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return list(self._rows.values())

    def find(self, run: Run) -> Row | None:
        """Return the row of a run, or None while the run is not done."""
        return self._rows.get(run.name)

    def failures(self, run: Run) -> int:
        """Count how often a run has failed."""
        failed = self._trials(TrialState.FAIL)
        return sum(trial.user_attrs["name"] == run.name and "failed" in trial.user_attrs for trial in failed)

    def reload(self) -> None:
        """Read the results of other workers."""
        self._rows: dict[str, Row] = {}
        for trial in self._trials(TrialState.COMPLETE):
            found = trial.user_attrs
            self._rows.setdefault(found["name"], {**found["run"], **found["row"]})

    def work(
        self,
        open_runs: Callable[[], Sequence[AnyRun]],
        perform: Callable[[AnyRun, Trial], Row],
        report: Callable[[AnyRun], None],
    ) -> None:
        """Do runs, or wait for other workers that do them, until none is left.

        Args:
            open_runs: returns the runs that may start now, by the rows so far.
            perform: does a run and returns its results; ``value`` is that of the trial.
            report: called with the run before it starts.

        Raises:
            FailedError: this worker's first run failed, and that run had not failed before. Later ones are queued again
                while ``open_runs`` returns them.
            StoppedError: the user stopped a run; the next worker that looks queues it again.
        """
        is_waiting = False
        while True:
            runs = open_runs()
            if not runs:
                return
            if self._may_take(runs):
                self._take(partial(self._perform, perform, report))
            else:
                if not is_waiting:
                    print("\nThis worker waits for other workers' runs; Ctrl-C loses nothing", flush=True)
                is_waiting = True
                time.sleep(_WAIT)
                fail_stale_trials(self.study)
            self.reload()

    def _may_take(self, runs: Iterable[AnyRun]) -> bool:
        """Say whether a trial waits to be taken; if there is none, queue the first run without a trial."""
        if self._trials(TrialState.WAITING):
            return True
        queued = {trial.user_attrs["name"] for trial in self._trials(*_QUEUED)}
        failed = [trial.user_attrs["name"] for trial in self._trials(TrialState.FAIL) if "failed" in trial.user_attrs]
        for run in sorted(runs, key=lambda run: failed.count(run.name)):
            if run.name not in queued:
                self.study.enqueue_trial(run.key().get("config", {}), user_attrs={"name": run.name, "run": run.key()})
                return True
        return False

    def _take(self, objective: Callable[[Trial], float]) -> None:
        """Do the run of the first trial that waits."""
        self._was_given_away = False
        try:
            self.study.optimize(objective, n_trials=1, catch=(DroppedError,))
        except ValueError:  # Optuna can't end a trial that has ended
            if not self._was_given_away:
                raise

    def _perform(
        self, perform: Callable[[AnyRun, Trial], Row], report: Callable[[AnyRun], None], trial: Trial
    ) -> float:
        others = self._trials(*_QUEUED)
        names = [other.user_attrs["name"] for other in others if other.number < trial.number]
        # Another worker has taken the trial that waited, and this one is new; or both have queued the same run.
        if trial.user_attrs.get("name") in (None, *names):
            time.sleep(random.uniform(0, _WAIT))  # so that the two do not meet again
            raise DroppedError
        self.reload()  # another worker may have queued this run, and after it had seen more
        run = self.restore(trial.user_attrs["run"])
        report(run)
        try:
            row = perform(run, trial)
            trial.set_user_attr("row", row)
            self._has_done = True
        except FailedError as failure:
            # If its first run fails, a worker may lack what all of them need, and must not fail one after the other.
            is_usual = self._has_done or (self.rows and self.failures(run))
            trial.set_user_attr("failed", failure.status)
            if is_usual:
                raise DroppedError from failure
            raise
        except UpdateFinishedTrialError:
            print(f"\nThis worker was silent for {GRACE} s, so another does this run: {run}", flush=True)
            self._was_given_away = True
            raise
        return float(row["value"])

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials that are runs; others may have been added to the study."""
        trials = self.study.get_trials(deepcopy=False, states=states)
        return [trial for trial in trials if "run" in trial.user_attrs]


def open_study(url: str, name: str, mode: str, settings: Row, decided: Row) -> Study:
    """Create a study, or load the one that another worker has created.

    Args:
        url: URL of Optuna's storage, as in "postgresql://user@host/database".
        name: name of the study.
        mode: "min" or "max" of a run's value.
        settings: settings that all runs share, since their results would not be comparable otherwise.
        decided: what the worker that creates the study decides for all, kept in ``study.user_attrs``.

    Raises:
        MisconfigurationException: the storage can't be reached, or the study was begun with other settings.
    """
    storage = open_storage(url)
    direction = StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction=direction)
        for each, value in {**decided, "settings": settings}.items():
            study.set_user_attr(each, value)
    except DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
    before, trials = _settings_of(study), study.get_trials(deepcopy=False)
    has_only_failed = bool(trials) and all(trial.state == TrialState.FAIL for trial in trials)
    if before and has_only_failed and study.direction == direction:
        study.set_user_attr("settings", settings)  # the options may have been the fault
        return study
    remedy = "another --folder; with --storage also another --study"
    _refuse_others(f"the study {name!r} was", before, settings, remedy)
    return study


def begin_runs(folder: Path, settings: Row) -> None:
    """Record the settings of a folder's runs: a run that is found there is not trained again, in whatever study.

    Args:
        folder: folder of the runs.
        settings: settings that all of them share.

    Raises:
        MisconfigurationException: they were begun with other settings.
    """
    path = folder / "options.json"
    has_runs = any(any(folder.rglob(left)) for left in ("*.ckpt", "fit.json"))
    if path.exists() and has_runs:
        before = json.loads(path.read_text(encoding="utf-8"))
        _refuse_others(f"the runs in {folder} were", before, settings, "another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings, indent=2) + "\n")


def study_so_far(url: str, name: str) -> Study:
    """Load a study to look at, whatever its settings; an empty one if it has not begun.

    Args:
        url: URL of Optuna's storage.
        name: name of the study.

    Raises:
        MisconfigurationException: the storage can't be reached.
    """
    with suppress(KeyError):
        return optuna.load_study(storage=open_storage(url), study_name=name)
    return optuna.create_study()


def file_storage(folder: Path) -> str:
    """Return the URL of the SQLite file that holds a folder's runs by default."""
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder.absolute() / 'study.db'}"


def open_storage(url: str) -> RDBStorage:
    """Connect to a storage; if two workers make the tables at the same time, one of them tries again.

    Raises:
        MisconfigurationException: the storage can't be reached.
    """
    _silence()
    # SQLite's own wait for another process's transaction is 5 s.
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    problem: Exception | None = None
    for _ in range(_ATTEMPTS):
        try:
            storage = RDBStorage(url, engine_kwargs=engine, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
            if storage.engine.name == "sqlite":
                event.listen(storage.engine, "begin", _begin_immediately)
            return storage
        except (SQLAlchemyError, ImportError, ValueError) as error:
            problem = error
            time.sleep(random.uniform(0, _WAIT))
    first_line = str(problem).partition("\n")[0]
    # Without the URL, which may hold a password.
    raise MisconfigurationException(f"the study's storage can't be opened: {first_line}") from problem


def _silence() -> None:
    """Silence Optuna's own messages."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)


def _begin_immediately(connection: Connection) -> None:
    """Lock an SQLite file before a transaction reads, not only before it writes: one worker takes a trial."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _settings_of(study: Study) -> Row:
    """Return a study's settings, which the worker that creates it writes a moment later."""
    for _ in range(_ATTEMPTS):
        if "settings" in study.user_attrs:
            found: Row = study.user_attrs["settings"]
            return found
        time.sleep(_WAIT)
    return {}


def _refuse_others(what: str, before: Row, settings: Row, remedy: str) -> None:
    """Refuse settings that differ from those before."""
    differing = [each for each in {**before, **settings} if before.get(each) != settings.get(each)]
    if differing:
        changes = "; ".join(f"{each} was {before.get(each)} and is {settings.get(each)}" for each in differing)
        raise MisconfigurationException(
            f"{what} begun with other options: {changes}. Give the original ones, or {remedy}"
        )
