"""A signal saves and ends a run between steps; the resumed run ends bit for bit like an uninterrupted one."""

import os
import signal
import stat
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ByHand,
    Classifier,
    ResumableLoader,
    Send,
    assert_same_run,
    build,
    calling,
    fit,
    make_loader,
    same,
    trainer_of,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatlora import AdapterCheckpoint, Requeue

BATCHES, EPOCHS = 5, 3
USR1, TERM = 128 + signal.SIGUSR1, 128 + signal.SIGTERM


class Notes(Callback):
    """Notes what a run does, over all of its starts."""

    def __init__(self, notes: list[Any]) -> None:
        self.notes = notes

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.notes.append((trainer.current_epoch, args[-1]))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.notes.append(f"val_loss {float(trainer.callback_metrics['val_loss'])}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.notes.append("epoch")


def run(
    folder: Path,
    method: str = "efmlora",
    *others: Callback,
    resume: bool = False,
    accumulate: int = 1,
    requeue: Any = None,
    monitor: str | None = "val_loss",
    batches: int = BATCHES,
    kind: Any = AdapterCheckpoint,
    **settings: Any,
) -> Any:
    """Train three epochs of five batches, each with a validation of three, unless ``settings`` differ."""
    classes = {"classes": (ByHand, ByHand)} if method == "by hand" else {}
    module, callbacks, kwargs = build("plain" if classes else method, accumulate=accumulate, **classes)
    if classes:
        kwargs = {}
    saver = kind(folder / "saved", monitor=monitor, save_last=True, save_top_k=1)
    callbacks = [requeue or Requeue(), *callbacks, *others, saver]
    loader = ResumableLoader(list(make_loader(batches)))
    kwargs = {"max_epochs": EPOCHS, "plugins": LightningEnvironment(), **kwargs, **settings}
    val = make_loader(3, seed=7) if monitor == "val_loss" else None
    return fit(folder, module, callbacks, loader, val=val, ckpt_path="last" if resume else None, **kwargs)


def assert_comes_back(tmp_path: Path, method: str, send: Send, status: int = USR1, **settings: Any) -> list[Any]:
    """The run ends with this status and, resumed, ends like an uninterrupted one; returns the notes of what it did."""
    expected: list[Any] = []
    notes: list[Any] = []
    whole = run(tmp_path / "whole", method, Notes(expected), **settings)
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "ended", method, Notes(notes), send, **settings)
    assert end.value.code == status
    assert send.left < 0
    assert len(notes) < len(expected)
    again = run(tmp_path / "ended", method, Notes(notes), resume=True, **settings)
    assert notes == expected
    assert_same_run(whole, again)
    assert same(whole.optimizers[0].state_dict(), again.optimizers[0].state_dict())
    best, expected_best = again.checkpoint_callback, whole.checkpoint_callback
    assert Path(best.best_model_path).name == Path(expected_best.best_model_path).name
    assert best.best_model_score == expected_best.best_model_score
    assert {path.name for path in (tmp_path / "ended/saved").iterdir()} == {
        path.name for path in (tmp_path / "whole/saved").iterdir()
    }
    return notes


METHODS = ("plain", "efmlora", "fmlora", "module", "efmlora+module", "by hand")
MOMENTS = {
    "start": ("on_train_batch_start", 6),
    "backward": ("on_after_backward", 6),
    "between the average and the optimizer": ("on_before_optimizer_step", 6),
    "end": ("on_train_batch_end", 6),
    "last batch": ("on_train_batch_start", 4),
    "end of the last batch": ("on_train_batch_end", 9),
    "validation": ("on_validation_batch_start", 4),
    "end of validation": ("on_validation_end", 0),
    "end of an epoch": ("on_train_epoch_end", 1),
    "sanity check": ("on_sanity_check_start", 0),
}
WHERE_METHODS_DIFFER = ("between the average and the optimizer", "last batch", "validation")


@pytest.mark.parametrize(
    ("method", "moment"),
    [*(("efmlora", moment) for moment in MOMENTS), *product(("plain", *METHODS[2:]), WHERE_METHODS_DIFFER)],
)
def test_it_comes_back(tmp_path: Path, method: str, moment: str) -> None:
    assert_comes_back(tmp_path, method, Send(*MOMENTS[moment]), num_sanity_val_steps=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [2, 3])
def test_it_does_not_end_within_an_accumulation(tmp_path: Path, method: str, call: int) -> None:
    """Neither between its batches nor in a validation there, since no checkpoint holds the gradients."""
    if method != "by hand":
        settings: dict[str, Any] = {"accumulate": 2, "val_check_interval": 1}
        assert_comes_back(tmp_path, method, Send("on_train_batch_start", call), **settings)
    with pytest.raises(SystemExit):
        run(tmp_path / "other", method, Send("on_validation_batch_start", 3 * call), accumulate=2, val_check_interval=1)


WITHOUT_VALIDATION = {"limit_val_batches": 0, "monitor": None}
VALIDATIONS = [
    {"val_check_interval": 2},
    {"check_val_every_n_epoch": 2},
    {"max_steps": 13},
    {"batches": 1, **WITHOUT_VALIDATION},
    {"kind": ModelCheckpoint},
]
LAST_BATCHES = [{"max_steps": 13}, {"max_steps": 13, **WITHOUT_VALIDATION}]


@pytest.mark.parametrize(("settings", "call"), [*product(VALIDATIONS, (0, 1)), *product(LAST_BATCHES, (4,))], ids=str)
def test_it_comes_back_whenever_the_run_validates(tmp_path: Path, settings: dict[str, Any], call: int) -> None:
    """Even if an epoch is a single step, or at an epoch's last batch with max_steps."""
    assert_comes_back(tmp_path, "efmlora", Send("on_train_batch_start", call), **settings)


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_start", "on_train_batch_start"])
def test_it_comes_back_many_times(tmp_path: Path, hook: str) -> None:
    """Even from a validation that an earlier start has not finished."""
    expected: list[Any] = []
    whole = run(tmp_path / "whole", "efmlora", Notes(expected))
    notes: list[Any] = []
    for start in range(40):
        try:
            call = (0, 1, 4)[start % 3]
            again = run(tmp_path / "ended", "efmlora", Notes(notes), Send(hook, call), resume=start > 0)
            break
        except SystemExit:
            pass
    assert start > 1
    assert notes == expected
    assert_same_run(whole, again)


# -- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_it_holds_the_signals_that_it_is_given(tmp_path: Path, number: signal.Signals) -> None:
    requeue = Requeue(signals=[number.name])
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "efmlora", Send("on_train_batch_start", 2, number), requeue=requeue)
    assert end.value.code == 128 + number
    assert torch.load(tmp_path / "saved/last.ckpt", weights_only=True)["global_step"] == 3


def test_it_puts_the_handlers_back(tmp_path: Path) -> None:
    """However the fit ends; Lightning's own handlers last only until this callback replaces them."""

    calls = []

    def handler(number: int, frame: Any) -> None:
        calls.append(number)

    before = [signal.signal(number, handler) for number in (signal.SIGUSR1, signal.SIGTERM)]
    ends: list[Any] = [None, Send("on_train_batch_start"), Send("on_train_batch_start", 0, signal.SIGTERM)]
    ends.append(calling(on_train_batch_end=lambda *_: 1 / 0))
    try:
        for index, end in enumerate(ends):
            try:
                run(tmp_path / str(index), "efmlora", *[end] * (end is not None))
            except (SystemExit, ZeroDivisionError):
                assert end is not None
            found = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
            assert found == [handler, handler], end
            assert calls == [signal.SIGUSR1, signal.SIGTERM][: index if index < 3 else 2]
    finally:
        for number, old in zip((signal.SIGUSR1, signal.SIGTERM), before, strict=True):
            signal.signal(number, old)


class Never(Callback):
    """Stays in one step, and sends the signal to its own process again and again, with these pauses."""

    def __init__(self, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.pauses, self.time, self.sent = pauses, 100.0, 0
        monkeypatch.setattr("lightning_flatlora.callbacks.requeue.time.monotonic", lambda: self.time)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 1:
            for pause in self.pauses:
                self.time += pause
                self.sent += 1
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("pauses", "step"), [([0, 0.1, 4.8], 2), ([0, 0.1, 5.0, 1.0], None)])
def test_a_signal_that_is_repeated_late_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], step: int | None
) -> None:
    """An early repetition, by senders that send each signal twice, doesn't."""
    never = Never(pauses, monkeypatch)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "efmlora", never)
    assert end.value.code == TERM
    assert never.sent == 3
    file = tmp_path / "saved/last.ckpt"
    assert (torch.load(file, weights_only=True)["global_step"] if file.exists() else None) == step


@pytest.fixture(params=[signal.SIGUSR1, signal.SIGTERM])
def handled(request: pytest.FixtureRequest) -> Any:
    """A signal with a handler of the user's, and a list of its calls."""
    calls: list[int] = []
    before = signal.signal(request.param, lambda number, _: calls.append(number))
    yield request.param, calls
    signal.signal(request.param, before)


def test_a_signal_after_the_last_step_is_delivered_when_the_fit_is_over(tmp_path: Path, handled: Any) -> None:
    number, calls = handled
    trainer = run(tmp_path, "efmlora", Send("on_train_epoch_end", EPOCHS - 1, number))
    assert trainer.current_epoch == EPOCHS
    trainer.test(trainer.lightning_module, make_loader())
    assert calls == [number]


def test_a_signal_is_delivered_if_the_step_fails(tmp_path: Path, handled: Any) -> None:
    """A sweep catches the error of a diverged trial, and must still end. Twice, since a lost one may come again."""
    number, calls = handled

    def fail(trainer: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), number)
            raise ZeroDivisionError

    for trial in range(2):
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / str(trial), "efmlora", calling(on_after_backward=fail))
        assert calls == [number] * (trial + 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_without_a_handler_ends_a_program_that_catches_the_error(tmp_path: Path, number: int) -> None:
    program = f"""
import os, signal, test_requeue
from helpers import calling
def fails(*args):
    os.kill(os.getpid(), {number})
    raise ValueError
requeue = test_requeue.Requeue(signals=[signal.Signals({number}).name])
try:
    test_requeue.run(test_requeue.Path("saved"), "plain", calling(on_train_batch_start=fails), requeue=requeue)
except ValueError:
    print("goes on")
"""
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True)
    assert ended.returncode == (-number if number == signal.SIGTERM else 1)
    assert b"goes on" not in ended.stdout
    assert (b"KeyboardInterrupt" in ended.stderr) == (number == signal.SIGINT)


def test_the_users_handler_is_called_once_the_run_is_saved(tmp_path: Path, handled: Any) -> None:
    number, calls = handled
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "efmlora", Send("on_train_batch_start", 2, number))
    assert end.value.code == 128 + number
    assert calls == [number]
    assert torch.load(tmp_path / "saved/last.ckpt", weights_only=True)["global_step"] == 3


def test_a_signal_in_a_fit_within_the_fit_is_not_lost(tmp_path: Path, handled: Any) -> None:
    """Lightning ends the inner fit, which has no Requeue, by an exit with status 0."""
    number, calls = handled

    def fit_within(trainer: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            module, callbacks, _ = build("plain")
            trainer = trainer_of(tmp_path, [*callbacks, Send("on_train_batch_start", 1, number)], max_epochs=1)
            trainer.fit(module, make_loader(), make_loader(1))

    with pytest.raises(SystemExit):
        run(tmp_path, "efmlora", calling(on_train_batch_start=fit_within))
    assert calls.count(number) >= 1


def test_a_fit_in_a_thread_trains_and_holds_nothing(tmp_path: Path) -> None:
    """As in optuna with n_jobs, Ray Tune and servers."""
    done = []

    def train() -> None:
        with pytest.warns(UserWarning, match="Requeue: only the main thread gets signals"):
            done.append(run(tmp_path, "efmlora").global_step)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert done == [BATCHES * EPOCHS]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_fit_leaves_no_trace_on_the_trainer(tmp_path: Path) -> None:
    """A later validation would hold signals back for ever."""
    trainers = []

    def fail(trainer: Any, *args: Any) -> None:
        trainers.append(trainer)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, "efmlora", calling(on_train_batch_end=fail))
    [trainer] = trainers
    for owner in (trainer._signal_connector, trainer.fit_loop, trainer.fit_loop.epoch_loop):
        assert not {"register_signal_handlers", "teardown", "on_advance_end"} & vars(owner).keys()


def test_it_holds_the_signal_of_lightnings_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = slurm(tmp_path, monkeypatch)
    plugins = SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "efmlora", Send("on_train_batch_start", 2, signal.SIGUSR2), plugins=plugins)
    assert end.value.code == 128 + signal.SIGUSR2
    assert calls() == [["requeue", "77"]]


# -- SLURM


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int = 0, **more: str) -> Any:
    """Set up one task of a SLURM job; returns a function that reads the arguments of the calls of scontrol."""
    of_job = {"ID": "77", "NAME": "train", "NODELIST": "localhost"}
    of_task = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NNODES": "1"}
    for name, value in {**{f"JOB_{key}": of_job[key] for key in of_job}, **of_task, **more}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    tools = folder / "tools"
    tools.mkdir()
    scontrol = tools / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tools}/calls\nexit {status}\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)

    def calls() -> list[list[str]]:
        file = tools / "calls"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    return calls


@pytest.mark.parametrize(
    ("number", "job", "requeued"),
    [
        (signal.SIGUSR1, {}, ["requeue", "77"]),
        (signal.SIGTERM, {}, None),  # sent by scancel
        (signal.SIGUSR1, {"ARRAY_JOB_ID": "70", "ARRAY_TASK_ID": "3"}, ["requeue", "70_3"]),
    ],
)
def test_a_slurm_job_or_its_task_of_an_array_is_requeued_by_its_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, job: dict[str, str], requeued: list[str] | None
) -> None:
    calls = slurm(tmp_path, monkeypatch, **job)
    with pytest.raises(SystemExit):
        run(tmp_path, "efmlora", Send("on_train_batch_start", 2, number), plugins=SLURMEnvironment())
    assert calls() == [requeued] * (requeued is not None)
    assert not list(tmp_path.glob("hpc*"))  # the files of Lightning's own requeueing
    assert torch.load(tmp_path / "saved/last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("status", [1, None])
def test_a_job_that_can_not_be_requeued_is_saved_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    """scontrol fails, or is not on the path, as in containers."""
    slurm(tmp_path, monkeypatch, status or 0)
    if status is None:
        monkeypatch.setenv("PATH", "")
    with (
        pytest.warns(UserWarning, match=r"Requeue: .*scontrol.* The run is saved: submit job 77 again to resume it"),
        pytest.raises(SystemExit) as end,
    ):
        run(tmp_path, "plain", Send("on_train_batch_start"), plugins=SLURMEnvironment())
    assert end.value.code == USR1
    assert (tmp_path / "saved/last.ckpt").exists()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("command", ["fit", "test"])
def test_lightnings_checkpoint_of_another_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """It would be loaded silently, though it may belong to another job, which was requeued and needs it."""
    slurm(tmp_path, monkeypatch)
    stale = tmp_path / "hpc_ckpt_1.ckpt"
    trainer = run(tmp_path, "efmlora", plugins=SLURMEnvironment())
    trainer.save_checkpoint(stale)
    callbacks: list[Callback] = [AdapterCheckpoint(tmp_path)]
    again = trainer_of(tmp_path, callbacks, plugins=SLURMEnvironment(), limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match=r"hpc_ckpt_1.ckpt is of another run, .*default_root_.* rename"):
        getattr(again, command)(Classifier(), make_loader())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(tmp_path, "efmlora", plugins=SLURMEnvironment(), max_epochs=EPOCHS + 1).global_step == 20


# -- refusals


@pytest.mark.parametrize(
    "saver", [[], [{"save_last": None}], [{"save_last": True, "save_weights_only": True}]], ids=str
)
def test_a_fit_that_could_not_come_back_is_refused(tmp_path: Path, saver: list[dict[str, Any]]) -> None:
    module, callbacks, _ = build("efmlora")
    callbacks += [Requeue(), *(AdapterCheckpoint(tmp_path, **each) for each in saver)]
    with pytest.raises(MisconfigurationException, match=r"Requeue: a run comes back from last.ckpt: add AdapterCheckp"):
        fit(tmp_path, module, callbacks)


def test_unknown_signals_are_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"Requeue: signals must be names such as 'SIGTERM', got 'USR1'"
    ):
        Requeue(signals=["USR1", "SIGTERM"])
