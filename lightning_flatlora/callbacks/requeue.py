"""Requeue: a signal that is to end the job waits for a step's end, where the run saves itself and ends."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from threading import current_thread, main_thread
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_flatlora.callbacks.adapter_checkpoint import SavesAdapters
from lightning_flatlora.callbacks.patches import put_on
from lightning_flatlora.methods.checks import refuse

_PATIENCE = 5.0
"""Seconds in which a repeated signal is one signal: torchrun and systemd may both send it to a process."""
_ENDS = (signal.SIGINT, signal.SIGTERM)
"""Whoever sends these, such as ``scancel``, decides whether the job comes back."""
_SAID = b"\nA signal: the run saves itself after this step and ends; again in more than 5 s ends it now, unsaved\n"


class Requeue(Callback):
    """End a job that is about to be killed between two optimizer steps, saved so that it can come back.

    A signal is held back until the end of the optimizer step, on all ranks at one step. Then AdapterCheckpoint writes
    ``last.ckpt``, a SLURM job is requeued, and the process exits with status 128 + signal. A validation ends after one
    of its batches, and the resumed run repeats all of it. A signal that is repeated after more than five seconds ends
    the process at once, unsaved.

    Start the job by ``trainer.fit(..., ckpt_path="last")``, which begins at the start if nothing is saved yet, and give
    AdapterCheckpoint a ``dirpath``, which does not change from one start to the next. See docs/many_devices.md.

    Args:
        signals: names of those that are held back. SIGTERM and SIGINT end the run; all others requeue a SLURM job, too,
            and so does the ``requeue_signal`` of Lightning's SLURMEnvironment.

    Raises:
        MisconfigurationException: there is no such signal (here), or no AdapterCheckpoint with ``save_last=True`` (at
            the start of fit).

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
        self._patches = ExitStack()
        self._begin()

    def _begin(self) -> None:
        self._patches.close()
        self._held: dict[int, float] = {}  # when each signal came first
        self._step = -1  # before the last batch
        self._is_even = True

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _savers(trainer):
            refuse(self, ["a run comes back from last.ckpt: add AdapterCheckpoint(dirpath, save_last=True)"])
        if current_thread() is not main_thread():
            rank_zero_warn("Requeue: only a process's main thread can hold signals back, and fit runs in another one")

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hold(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hold(trainer)
        if not trainer.global_step and int(os.environ.get("SLURM_RESTART_COUNT", 0)):
            advice = "give fit ckpt_path='last', and AdapterCheckpoint a dirpath, if it has saved anything"
            rank_zero_warn(f"Requeue: this job was requeued, and begins at its start: {advice}")
        for loop in (trainer.fit_loop.epoch_loop, trainer.fit_loop):
            self._patches.enter_context(put_on(loop, {"on_advance_end": self._then_end(trainer, loop)}))

    def _hold(self, trainer: Trainer) -> None:
        """Take the signals from Lightning, which has just set handlers, and restores those of before when fit ends."""
        if getattr(trainer, "fast_dev_run", False) or current_thread() is not main_thread():
            return
        of_slurm = getattr(trainer._accelerator_connector.cluster_environment, "requeue_signal", None)
        for number in [*self.signals, *([of_slurm] if of_slurm else [])]:
            # A shell lets its background jobs ignore SIGINT.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if now - self._held.setdefault(number, now) > _PATIENCE:
            raise SystemExit(128 + number)
        # Not print, in which this very signal may have come, and which then raises an error.
        with suppress(OSError):
            os.write(2, _SAID)

    def _then_end(self, trainer: Trainer, loop: Any) -> Callable[..., None]:
        """Put the end behind all that a loop does after a batch, or an epoch: hooks, validation, schedulers."""
        on_advance_end = loop.on_advance_end

        def method(*args: Any) -> None:
            on_advance_end(*args)
            # A loop that is done leaves the end to the one around it, or to the fit, which is over.
            if self._is_asked(trainer) and not loop.done:
                self._end(trainer)

        return method

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def _is_asked(self, trainer: Trainer) -> bool:
        """Return whether the last batch ended in an optimizer step, and a signal has come to any rank."""
        # No checkpoint holds the gradients of an accumulation.
        is_between_steps = trainer.global_step != self._step
        return is_between_steps and trainer.strategy.reduce_boolean_decision(bool(self._held), all=False)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Ranks with different numbers of batches can't agree in each, and end after the validation.
        batches = torch.tensor(float(sum(trainer.num_val_batches)), device=trainer.strategy.root_device)
        of_ranks = set(trainer.strategy.all_gather(batches).flatten().tolist())
        self._is_even = trainer.world_size == 1 or (len(of_ranks) == 1 and of_ranks != {float("inf")})

    @override
    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        is_in_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if is_in_fit and self._is_even and self._is_asked(trainer):
            # Lightning resumes a validation that ended within a batch, but leaves out as many batches as were done.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.increment_started()
            progress.current.reset()
            self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        for saver in _savers(trainer):
            saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))
            rank_zero_info(f"Requeue: step {trainer.global_step} is saved in {saver.last_model_path}")
        for logger in trainer.loggers:
            logger.save()
        comes_back = trainer.strategy.reduce_boolean_decision(bool(self._held.keys() - set(_ENDS)), all=False)
        if comes_back and trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
            _requeue()
        raise SystemExit(128 + max(self._held, default=signal.SIGTERM))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._begin()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        late = [number for number in _ENDS if number in self._held]
        self._begin()
        for number in late:  # after the last step; what follows the fit may take long
            signal.raise_signal(number)


def _savers(trainer: Trainer) -> list[Any]:
    """Return the callbacks that write a last.ckpt from which a run resumes."""
    savers: list[Any] = [each for each in trainer.checkpoint_callbacks if isinstance(each, SavesAdapters)]
    return [saver for saver in savers if saver.save_last and not saver.save_weights_only]


def _requeue() -> None:
    """Put this process's SLURM job back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # the last task's own id is that of the array, and would requeue all tasks
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = f"{done.stderr.strip()} (status {done.returncode})" if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        rank_zero_warn(f"Requeue: scontrol requeue {job} failed: {problem}. Submit the job again, and it resumes")
