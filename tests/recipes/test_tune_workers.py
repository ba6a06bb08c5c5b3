"""Workers of one search, each in its own process: what they share, and what remains when one of them is ended."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pandas
import processes
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from slurm import free_ports
from tune_workers import ROOM, work

from recipes.studies.queue import file_storage

pytestmark = pytest.mark.skipif(not processes.CAN_FORK, reason="a run is forked from its worker, which CUDA forbids")

OPTIONS = [
    *("tune_workers", "--metric=val_loss", "--mode=min", "--budget=4", "--fresh=2", "--rho", "0.5"),
    *("--search", "model.lr", "1e-3", "1e-2", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"),
]
PATH = os.pathsep.join([os.environ["PATH"], *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")))])


class Workers:
    """The workers of one search; they all wait in their first training until :meth:`go`.

    Args:
        place: a new folder for what they write.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.room = place, place / "room"
        self.room.mkdir(parents=True)
        self.started: list[BaseProcess] = []

    def start(self, *options: str) -> BaseProcess:
        log = self.place / f"{len(self.started)}.log"
        worker = processes.start(work, [*OPTIONS, *options], output=log, environment={ROOM: str(self.room)})
        self.started.append(worker)
        return worker

    def training(self, worker: BaseProcess) -> int:
        """Wait until a worker's first run trains; returns that run's process id."""
        until(lambda: any(self.room.glob(f"{worker.pid}-*")), f"a training\n{self.said()}")
        return int(next(self.room.glob(f"{worker.pid}-*")).name.partition("-")[2])

    def go(self) -> list[int | None]:
        """Let all trainings continue, and wait for the workers; returns their exit codes."""
        (self.room / "go").touch()
        for worker in self.started:
            worker.join(240)
        return [worker.exitcode for worker in self.started]

    def said(self) -> str:
        return "\n".join(log.read_text() for log in sorted(self.place.glob("*.log")))

    def begun(self) -> list[int]:
        """The number of runs that each worker has begun."""
        return [log.read_text().count("Next: ") for log in sorted(self.place.glob("*.log"))]

    def end(self) -> None:
        for worker in self.started:
            processes.end(worker)


def until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    """Whether it runs; an orphan that has ended may stay a zombie if no parent collects its status."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "workers")
    yield made
    made.end()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of the storage on a PostgreSQL server, or the reason why none can be started."""
    lacking = [name for name in ("initdb", "postgres") if not shutil.which(name, path=PATH)]
    try:
        import psycopg
    except ImportError:
        lacking.append("psycopg")
    if lacking:
        yield f"needs {', '.join(lacking)}: apt-get install postgresql; pip install 'psycopg[binary]'"
        return
    folder = Path(tempfile.mkdtemp(prefix="flatlora-postgres-"))
    how: dict[str, Any] = {"cwd": folder, "env": {**os.environ, "PATH": PATH, "LC_ALL": "C"}}
    if os.geteuid() == 0:  # the server refuses to run as root
        how |= {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(folder, "nobody")
    (port,) = free_ports(1)
    url = f"postgresql://flatlora@127.0.0.1:{port}/postgres"
    initdb = ["initdb", "--pgdata=data", "--auth=trust", "--username=flatlora", "--encoding=UTF8", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True, **how)
    command = ["postgres", "-D", "data", "-p", str(port), "-c", "unix_socket_directories=", "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        postgres = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **how)

    def answers() -> bool:
        with suppress(psycopg.OperationalError), psycopg.connect(url):
            return True
        return False

    try:
        until(answers, "PostgreSQL")
        yield url.replace("postgresql", "postgresql+psycopg", 1)
    finally:
        postgres.send_signal(signal.SIGQUIT)
        postgres.wait(60)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def undisturbed(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A search of two workers that share only the server, or only a file if there is no server."""
    place = tmp_path_factory.mktemp("undisturbed")
    url = server if server.startswith("postgresql") else file_storage(place)
    made = Workers(place / "workers")
    try:
        for name in ("first", "second"):
            made.start(f"--folder={place / name}", f"--storage={url}")
        for worker in made.started:
            made.training(worker)
        assert made.go() == [0, 0], made.said()
        check_done_once(url)
        yield made
    finally:
        made.end()


def check_done_once(url: str) -> None:
    storage = RDBStorage(url)
    trials = optuna.load_study(study_name="tune_workers", storage=storage).trials
    storage.engine.dispose()
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    done = [trial.user_attrs["name"] for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(set(done)) == len(done) > 12


def results(folder: Path) -> pandas.DataFrame:
    """The results, without who found them and when."""
    table = pandas.read_csv(folder / "results.csv").drop(columns=["seconds", "commit"])
    return table.sort_values(["stage", "rho", "model.lr", "seed"], ignore_index=True)


def test_workers_share_a_server_and_no_folder(server: str, undisturbed: Workers) -> None:
    if not server.startswith("postgresql"):
        pytest.skip(server)
    first, second = (undisturbed.place.parent / name for name in ("first", "second"))
    assert (first / "results.csv").read_bytes() == (second / "results.csv").read_bytes()
    assert (first / "table.txt").read_bytes() == (second / "table.txt").read_bytes()
    assert min(undisturbed.begun()) > 0
    assert sum(undisturbed.begun()) == len(results(first))
    runs = {path.parent for path in (*first.rglob("fit.json"), *second.rglob("fit.json"))}
    assert len(runs) == len(results(first))


def test_no_run_is_lost_or_done_twice_if_workers_are_ended(
    workers: Workers, undisturbed: Workers, tmp_path: Path
) -> None:
    folder = f"--folder={tmp_path / 'search'}"
    killed, stopped, left = (workers.start(folder) for _ in range(3))
    trainings = [workers.training(worker) for worker in (killed, stopped, left)]
    os.kill(killed.pid or 0, signal.SIGKILL)
    until(lambda: not is_alive(trainings[0]), "the end of the training whose worker was killed")
    os.killpg(stopped.pid or 0, signal.SIGINT)  # as Ctrl-C does
    stopped.join(60)
    workers.start(folder)  # the same command resumes
    assert workers.go() == [-signal.SIGKILL, 130, 0, 0], workers.said()
    check_done_once(file_storage(tmp_path / "search"))
    found = results(tmp_path / "search")
    pandas.testing.assert_frame_equal(found, results(undisturbed.place.parent / "first"))
    assert sum(workers.begun()) == len(found) + 2
    table = (undisturbed.place.parent / "first" / "table.txt").read_text()
    assert (tmp_path / "search" / "table.txt").read_text() == table
