"""Ctrl-C ends a run behind a whole optimizer step, so that the checkpoint that is saved then resumes exactly."""

import signal
from threading import current_thread, main_thread
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override


class InterruptAfterStep(Callback):
    """Hold the first Ctrl-C back until an optimizer step is done; a second one ends the run at once, unsaved.

    After the first the last of the Trainer's savers writes a checkpoint. In the middle of a step some weights might be
    moved and others not. With several processes, which would end at different steps, Lightning's way stays. Releases of
    Lightning before 2.5.3 save nothing here.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._is_pressed = False
        self._step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_pressed = False
        # A shell lets its background jobs ignore the signal, and only the main thread may handle it.
        is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if trainer.world_size == 1 and not is_ignored and current_thread() is main_thread():
            self._before = signal.signal(signal.SIGINT, self._press)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        # Not among the batches of an accumulation, whose gradients no checkpoint holds.
        if self._is_pressed and trainer.global_step > self._step:
            for saver in trainer.checkpoint_callbacks[-1:]:
                saver.save_on_exception = True  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _press(self, number: int, frame: Any) -> None:
        if self._is_pressed:
            raise KeyboardInterrupt
        self._is_pressed = True
        rank_zero_info("Ctrl-C: the run ends and saves itself after this step; once more ends it at once, unsaved")
