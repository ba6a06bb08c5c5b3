"""LR schedulers under manual optimization, as long and stepped as under automatic optimization."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_flatlora.callbacks.patches import put_on_instance
from lightning_flatlora.lightning_names import MisconfigurationException

_PLATEAU_KEYS = ("monitor", "strict", "reduce_on_plateau")


class ManualSchedulers:
    """The LR schedulers of a module with manual optimization.

    There Lightning never steps them, and drops the keys of plateau schedulers (monitor, strict, reduce_on_plateau) from
    the module's configuration with a warning. So the keys are taken out before Lightning sees them, and put into its
    scheduler configurations afterwards.

    Nor does Lightning know there of an accumulation window, so that ``trainer.estimated_stepping_batches``, by which a
    schedule is made as long as the run, would count batches in place of optimizer steps. So the trainer is told the
    window while ``configure_optimizers`` runs.
    """

    def __init__(self) -> None:
        self._plateau: dict[int, dict[str, Any]] = {}
        self._waiting: list[tuple[str, int]] = []
        self._is_in_epoch = False
        self._listening = ExitStack()

    def listen(self, pl_module: LightningModule, window: int) -> None:
        """From now on, note the plateau keys of what ``configure_optimizers`` returns, and take them out.

        Args:
            pl_module: whose schedulers they are.
            window: batches of one optimizer step.
        """
        # The class's, or one that LightningCLI has set.
        original = pl_module.configure_optimizers

        @functools.wraps(original)
        def configure_optimizers() -> Any:
            with counting_windows(pl_module.trainer, window):
                return self._without_plateau_keys(original())

        self._listening.callback(put_on_instance(pl_module, "configure_optimizers", configure_optimizers))

    def complete_configs(self, trainer: Trainer) -> None:
        """Put the noted keys into Lightning's scheduler configurations."""
        self.release()
        for config in trainer.lr_scheduler_configs:
            for key, value in self._plateau.get(id(config.scheduler), {}).items():
                setattr(config, key, value)
            if isinstance(config.scheduler, ReduceLROnPlateau):
                config.reduce_on_plateau = True

    def problems(self, trainer: Trainer) -> list[str]:
        """What is wrong with the completed configurations, one line for each problem."""
        problems = []
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.monitor is None:
                problems.append(
                    "ReduceLROnPlateau needs a metric: return "
                    '{"scheduler": ..., "monitor": "val_loss"} from configure_optimizers'
                )
        return problems

    def release(self) -> None:
        """Give the module its own ``configure_optimizers`` back."""
        self._listening.close()

    def step(self, trainer: Trainer, interval: str, index: int) -> None:
        """Step what is due at a batch's or epoch's index; plateau schedulers wait for :meth:`step_waiting`.

        Args:
            trainer: the running trainer.
            interval: "step" or "epoch".
            index: of the batch or epoch, from 0.
        """
        if interval == "epoch":
            self._is_in_epoch = False
        self._step(trainer, interval, index, plateau=False)
        # Plateau schedulers need a metric that the validation after this step may be about to log.
        self._waiting.append((interval, index))

    def begin_batch(self, trainer: Trainer) -> None:
        """Step the plateau schedulers that wait, and expect the end of the epoch; before each batch."""
        self.step_waiting(trainer)
        self._is_in_epoch = True

    def end_epoch(self, trainer: Trainer) -> None:
        """Step what is due at an epoch's end, where its last batch was left out, as by an on_train_batch_start."""
        # Not where the run was stopped within the epoch, nor where a resumed run has found it at its end.
        if self._is_in_epoch and trainer.is_last_batch:
            self.step(trainer, "epoch", trainer.current_epoch)

    def step_waiting(self, trainer: Trainer) -> None:
        """Step the plateau schedulers that became due, now that validation and epoch-end metrics are there."""
        for interval, index in self._waiting:
            self._step(trainer, interval, index, plateau=True)
        self._waiting = []

    def _step(self, trainer: Trainer, interval: str, index: int, plateau: bool) -> None:
        for config in trainer.lr_scheduler_configs:
            due = config.interval == interval and (index + 1) % config.frequency == 0
            if not due or config.reduce_on_plateau != plateau:
                continue
            metric = trainer.callback_metrics.get(str(config.monitor)) if plateau else None
            if metric is not None or not plateau:
                trainer.lightning_module.lr_scheduler_step(config.scheduler, metric)
            elif config.strict:
                raise MisconfigurationException(
                    f"ReduceLROnPlateau monitors {config.monitor!r}, which was not logged; "
                    f"logged: {sorted(trainer.callback_metrics)}. Log it, or set strict=False"
                )

    def _without_plateau_keys(self, configured: Any) -> Any:
        """What ``configure_optimizers`` returned, in the same shape, less the noted keys."""
        if isinstance(configured, dict) and "scheduler" in configured:
            others = {key: value for key, value in configured.items() if key not in _PLATEAU_KEYS}
            noted = {key: configured[key] for key in _PLATEAU_KEYS if key in configured}
            # By identity: Lightning's own configuration keeps the scheduler itself, but none of these keys.
            self._plateau[id(configured["scheduler"])] = noted
            return others
        if isinstance(configured, dict):
            return {key: self._without_plateau_keys(value) for key, value in configured.items()}
        if isinstance(configured, (list, tuple)):
            return type(configured)(self._without_plateau_keys(value) for value in configured)
        return configured


@contextmanager
def counting_windows(trainer: Trainer, window: int) -> Iterator[None]:
    """Inside, ``trainer.estimated_stepping_batches`` counts so many batches as one optimizer step."""
    before = trainer.accumulate_grad_batches
    trainer.accumulate_grad_batches = window
    try:
        yield
    finally:
        trainer.accumulate_grad_batches = before
