"""A signal saves and ends a run between steps; the resumed run ends bit for bit like an uninterrupted one."""

import os
import signal
import stat
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Classifier,
    Send,
    assert_same_run,
    build,
    fit,
    make_loader,
    same,
    trainer_of,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from requeued_runs import EPOCHS, USR1, run

from lightning_flatlora import AdapterCheckpoint, Requeue


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
