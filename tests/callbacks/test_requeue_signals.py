"""Requeue holds signals back, and delivers them on every way out of a fit."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Send, build, calling, make_loader, trainer_of
from lightning.pytorch import Callback
from requeued_runs import BATCHES, EPOCHS, TERM, run

from lightning_flatlora import Requeue


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
import os, signal, requeued_runs
from helpers import calling
def fails(*args):
    os.kill(os.getpid(), {number})
    raise ValueError
requeue = requeued_runs.Requeue(signals=[signal.Signals({number}).name])
try:
    requeued_runs.run(requeued_runs.Path("saved"), "plain", calling(on_train_batch_start=fails), requeue=requeue)
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
