"""The size of a perturbation over time: which steps take a fresh one, and how large it is."""

import math
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_flatlora.callbacks.methods import sizes
from lightning_flatlora.callbacks.methods.checks import refuse, written_name
from lightning_flatlora.callbacks.methods.horizon import horizon_problems, no_end, optimizer_steps
from lightning_flatlora.callbacks.methods.module_passes import module_passes_of, window_of
from lightning_flatlora.callbacks.methods.pair_callback import PairCallback
from lightning_flatlora.callbacks.methods.pair_groups import PairGroup
from lightning_flatlora.schedules import RhoSchedule


class ScheduledSize(PairCallback):
    """Base of the callbacks that perturb by a size which a schedule gives for every optimizer step.

    Attributes:
        size: the size of the perturbation, constant or scheduled.
        size_name: what the method calls its size: "rho", "alpha" or "sigma".
        start_step: optimizer steps before the first perturbation.
        every_n_steps: optimizer steps from one fresh perturbation to the next.
    """

    size_name: ClassVar[str] = "rho"
    size: RhoSchedule
    start_step: int
    every_n_steps: int

    @override
    def begin(self) -> None:
        super().begin()
        self._horizon = math.inf

    # -- which steps

    @property
    def is_refresh_step(self) -> bool:
        """Whether the coming step of the main group takes a fresh perturbation."""
        return self.refreshes(self.main_group)

    def refreshes(self, pair_group: PairGroup) -> bool:
        """Whether the coming step of a pair group takes a fresh perturbation."""
        return sizes.refreshes(pair_group.step, self.start_step, self.every_n_steps)

    # -- which size

    def current_size(self, trainer: Trainer, pair_group: PairGroup | None = None) -> float:
        """The size of the coming step of a pair group; None takes the main group."""
        pair_group = pair_group or self.main_group
        param_groups = self._followed_groups(trainer, pair_group) if self.size.needs_learning_rate else []
        size = sizes.size_at(self.size, pair_group, self._horizon, param_groups)
        refuse(self, sizes.size_problems(self._size_argument, size, pair_group.step))
        return size

    @property
    def _size_argument(self) -> str:
        """The argument as a user would write it."""
        return f"{self.size_name}={self.size}"

    # -- schedules that follow the learning rate

    @override
    def rate_problems(self, trainer: Trainer) -> list[str]:
        """A size that follows the learning rate needs a single one, and one that the host knows."""
        if not self.size.needs_learning_rate:
            return []
        problems = []
        for pair_group in self.pair_groups:
            problems += sizes.rate_problems(self._size_argument, self._followed_groups(trainer, pair_group))
        return problems

    @property
    def followed(self) -> list[nn.Parameter]:
        """The parameters whose learning rate a schedule may follow."""
        return [pair.B for pair in self.search.pairs]

    def _followed_groups(self, trainer: Trainer, pair_group: PairGroup) -> list[dict[str, Any]]:
        """The optimizer's parameter groups that hold a followed parameter."""
        if not trainer.optimizers:
            return []
        return sizes.followed_groups(trainer.optimizers[pair_group.index], self.followed)

    # -- schedules that spread over the run

    def horizon_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Why the length of the run can't be known, where the schedule needs it."""
        if not sizes.lacks_horizon(self.size):
            return []
        return horizon_problems(self._size_argument, trainer, pl_module, module_passes_of(trainer) is not None)

    def set_horizon(self, trainer: Trainer) -> None:
        """Take the number of optimizer steps of the run, which is known once the loaders are set up."""
        self._horizon = optimizer_steps(trainer, window_of(trainer))
        if sizes.lacks_horizon(self.size) and math.isinf(self._horizon):
            refuse(self, [no_end(self._size_argument)])

    def warn_of_late_start(self, trainer: Trainer) -> None:
        """Say that a schedule over the whole run begins in the middle of it, where no count has come with a checkpoint.

        To be called as training starts, once the state of a checkpoint is restored.
        """
        if self.main_group.step == 0 and trainer.global_step > 0 and sizes.lacks_horizon(self.size):
            rank_zero_warn(
                f"{written_name(self)} was not part of this run until now, at step {trainer.global_step} of "
                f"{self._horizon:g}. {self._size_argument} begins at its own step 0 and will not come to its end: set "
                "its total_steps to the steps that are left"
            )
