"""Requeue: a signal that ends the job is held back until a step is complete and the run is saved."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_flatlora.methods.checks import refuse
from lightning_flatlora.patching import put_on

# Seconds within which repeated signals count as one: torchrun and systemd may both send it to a process.
_PATIENCE = 5.0
# The sender of these, such as scancel, decides whether the job comes back.
_ENDS = {signal.SIGINT, signal.SIGTERM}
_SAID = b"\nSignal: the run saves itself and ends after this step; a repeat after 5 s ends it now, unsaved\n"


class Requeue(Callback):
    """Save a job that is about to be killed, and end it between two optimizer steps, so that it can resume.

    A signal is held back until the end of the optimizer step, which is the same step on all ranks. Then
    AdapterCheckpoint (or a ModelCheckpoint, which includes the base) writes ``last.ckpt``, a SLURM job is requeued, and
    the process exits with status 128 + signal. A validation is cut short after one of its batches; the resumed run
    repeats it from the start. A second signal after more than five seconds ends the process at once, unsaved. A handler
    that the program had set before the fit is called when the fit has ended. In a thread other than the main one
    nothing is held back, with a warning.

    Start the job by ``trainer.fit(..., ckpt_path="last")``, which starts a new run if nothing is saved yet, and give
    AdapterCheckpoint a fixed ``dirpath``. See docs/many_devices.md.

    Args:
        signals: names of the signals to hold back. SIGTERM and SIGINT only end the run; all others, and the
            ``requeue_signal`` of Lightning's SLURMEnvironment, also requeue a SLURM job.

    Raises:
        MisconfigurationException: an unknown signal (here), or no checkpoint callback with ``save_last=True`` (at the
            start of fit).

    Example:
        >>> import lightning as L
        >>> from lightning_flatlora import AdapterCheckpoint
        >>> callbacks = [AdapterCheckpoint("checkpoints/my-run", save_last=True), Requeue()]
        >>> trainer = L.Trainer(callbacks=callbacks, accelerator="cpu", logger=False)
    """

    def __init__(self, signals: Sequence[str] = ("SIGUSR1", "SIGTERM")) -> None:
        unknown = set(signals) - signal.Signals.__members__.keys()
        refuse(self, [f"signals must be names such as 'SIGTERM', got {each!r}" for each in sorted(unknown)])
        self.signals = [signal.Signals[each] for each in signals]
        self._held: dict[int, float] = {}  # when each signal first arrived
        self._patches = ExitStack()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return  # nothing is saved
        if not _savers(trainer):
            refuse(self, ["a run comes back from last.ckpt: add AdapterCheckpoint(dirpath, save_last=True)"])
        self._patches.close()
        self._held.clear()
        self._step = -1  # before the last batch
        # These replace the handlers that Lightning sets for a fit; it restores the former ones afterwards.
        self._after(trainer._signal_connector, "register_signal_handlers", self._hold, trainer)
        # However the fit ends, Lightning calls this after it has restored them; no hook of a callback comes that late.
        self._after(trainer._signal_connector, "teardown", self._deliver)
        # After everything that a loop does for a batch or an epoch: hooks, validation, schedulers.
        for loop in (trainer.fit_loop.epoch_loop, trainer.fit_loop):
            self._after(loop, "on_advance_end", self._end_if_asked, trainer, loop)

    def _after(self, owner: Any, name: str, more: Callable[..., None], *given: Any) -> None:
        """Extend a method of an object until the fit is over."""
        method = getattr(owner, name)

        def longer(*args: Any) -> None:
            method(*args)
            more(*given)

        self._patches.enter_context(put_on(owner, {name: longer}))

    def _hold(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn(
                "Requeue: only the main thread gets signals, so a fit in another thread can't hold them back"
            )
            return
        of_slurm: Any = getattr(trainer._accelerator_connector.cluster_environment, "requeue_signal", None)
        for number in {*self.signals, of_slurm} - {None}:
            # Shells make their background jobs ignore SIGINT.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if now - self._held.setdefault(number, now) > _PATIENCE:
            raise SystemExit(128 + number)
        # Not print: if the signal arrived during a print, another one raises an error.
        with suppress(OSError):
            os.write(2, _SAID)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In a resumed run Lightning counts the batch in which the validation ended as begun, and would resume it again.
        total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
        total.ready = total.started = total.completed
        # Ranks with different numbers of batches can't agree in each batch, so they end after the validation.
        batches = torch.tensor(float(sum(trainer.num_val_batches)), device=trainer.strategy.root_device)
        self._is_even = bool((trainer.strategy.all_gather(batches) == batches).all() and batches.isfinite())

    @override
    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._is_even:
            self._end_if_asked(trainer, trainer.fit_loop.epoch_loop.val_loop)

    def _end_if_asked(self, trainer: Trainer, loop: Any) -> None:
        """Save and end if any rank has received a signal, and the last batch ended in an optimizer step."""
        reduce = trainer.strategy.reduce_boolean_decision
        # A checkpoint does not hold accumulated gradients.
        if trainer.global_step == self._step or not reduce(bool(self._held), all=False):
            return
        if loop is trainer.fit_loop.epoch_loop.val_loop:
            # Lightning resumes a validation that ended within a batch, but skips the batches that were done.
            loop.batch_progress.increment_started()
            loop.batch_progress.current.reset()
        elif loop.done or (loop is trainer.fit_loop and trainer.max_steps != -1):
            # The loop around this one ends the run, or the fit is over; and with max_steps Lightning would resume in
            # the finished epoch, so wait for the next step.
            return
        for saver in _savers(trainer):
            saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))
            rank_zero_info(f"Requeue: saved step {trainer.global_step} to {saver.last_model_path}")
        comes_back = reduce(bool(self._held.keys() - _ENDS), all=False)
        if comes_back and trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
            _requeue()
        raise SystemExit(128 + max(self._held, default=signal.SIGTERM))

    def _deliver(self) -> None:
        """Give held signals to the handlers from before the fit: the program may go on, or have its own plans."""
        self._patches.close()
        is_ending = isinstance(sys.exc_info()[1], SystemExit)
        for number in list(self._held):
            del self._held[number]
            is_users = signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
            if is_users or (number in _ENDS and not is_ending):
                signal.raise_signal(number)


def _savers(trainer: Trainer) -> list[Any]:
    """Return the callbacks that write a last.ckpt to resume from; a link may point to an earlier step."""
    savers: list[Any] = [each for each in trainer.checkpoint_callbacks if getattr(each, "save_last", None) is True]
    return [saver for saver in savers if not saver.save_weights_only]


def _requeue() -> None:
    """Put this process's SLURM job back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # the last task's own id is the array's, which would requeue all tasks
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"Requeue: {error}. The run is saved: submit job {job} again to resume it")
