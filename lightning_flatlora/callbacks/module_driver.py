"""The callback behind FMLoRAModule, through which it starts, counts, clips and ends."""

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.base import FlatLoRACallback, watched_parameters, window_of
from lightning_flatlora.callbacks.counted_once import CountedOnce
from lightning_flatlora.callbacks.efmlora import EFMLoRA
from lightning_flatlora.callbacks.manual_schedulers import ManualSchedulers
from lightning_flatlora.callbacks.perturbs_b import PerturbsB
from lightning_flatlora.callbacks.two_passes import gradient_holders
from lightning_flatlora.lightning_names import MisconfigurationException, callbacks_of
from lightning_flatlora.perturbation import FreshPerturbation, Perturbation


class FMLoRAModuleDriver(PerturbsB):
    """The callback through which an FMLoRAModule starts, counts, clips and ends; hooks of the module stay the user's.

    Beside an EFMLoRA callback it takes steps, rho, perturbation and average from that one.
    """

    is_module_driver = True

    def __init__(self, *args: Any, window: int, sync_ascent: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window = window
        self.sync_ascent = sync_ascent

    @override
    def begin(self) -> None:
        super().begin()
        self.counted: CountedOnce | None = None
        self.reached = True
        self._parameters: list[nn.Parameter] = []
        self._scheduler: EFMLoRA | None = None
        self._fresh: FreshPerturbation | None = None
        self._sum: FreshPerturbation | None = None
        self._ascents = 0
        self._is_set_up = False
        self.schedulers = ManualSchedulers()

    @property
    @override
    def perturbation(self) -> Perturbation | None:
        """EFMLoRA's, beside one: it may come later than this, or not before pairs do."""
        return super().perturbation if self._scheduler is None else self._scheduler.perturbation

    @override
    def works_beside(self, other: FlatLoRACallback) -> bool:
        return isinstance(other, EFMLoRA)

    @override
    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        problems = super().configuration_problems(trainer, pl_module)
        module: Any = pl_module  # an FMLoRAModule
        problems += module._subclass_problems()
        problems += self.schedulers.take_over(trainer)
        if len(trainer.optimizers) != 1:
            problems.append(
                f"configure_optimizers must return one optimizer, got {len(trainer.optimizers)}: for several, use "
                "manual optimization and the EFMLoRA callback"
            )
        scheduler = _scheduler_of(trainer)
        if sum(isinstance(callback, EFMLoRA) for callback in callbacks_of(trainer)) > 1:
            problems.append("one EFMLoRA can schedule the module's passes: keep one")
        for name in ("rho", "estimator", "norm_scope", "adapter_name") if scheduler else ():
            if getattr(self, name) != getattr(scheduler, name):
                problems.append(
                    f"{name} must be the same in the module and in EFMLoRA beside it, "
                    f"got {getattr(self, name)!r} and {getattr(scheduler, name)!r}"
                )
        if scheduler and (self.start_step, self.every_n_steps) != (0, 1):
            problems.append("EFMLoRA beside the module schedules the passes: give start_step and every_n_steps to it")
        if scheduler and not self.sync_ascent and trainer.world_size > 1:
            problems.append(
                "sync_ascent=False leaves each rank its own E, and EFMLoRA beside it keeps one average for all: "
                "leave it True"
            )
        return problems

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._is_set_up = True
        self._scheduler = None
        self.open_window()
        if stage == "fit":
            self.schedulers.listen(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._parameters = list(pl_module.parameters())
        self.counted = CountedOnce(pl_module)
        module: Any = pl_module  # an FMLoRAModule
        self.reached = not module._overrides_step
        self._scheduler = _scheduler_of(trainer)

    @override
    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _scheduler_of(trainer) is None:  # else the perturbation is that one's
            super().install(trainer, pl_module)

    @override
    def uninstall(self) -> None:
        super().uninstall()
        self.schedulers.release()
        self._is_set_up = False
        self._parameters, self.counted = [], None

    def ascends(self, trainer: Trainer) -> bool:
        """Whether the coming step has two passes; not while a tuner has put our callbacks away."""
        if not self._is_set_up:
            raise MisconfigurationException(
                "FMLoRAModule was not set up, so nothing would be perturbed: where you override configure_callbacks, "
                "return [*super().configure_callbacks(), ...]"
            )
        source = self._scheduler or self
        if source not in callbacks_of(trainer):
            return False
        if self.perturbation is None or not source.is_refresh_step:
            return False
        # With rho = 0 the step is plain, unless there is an average that a zero perturbation has to move.
        started = self._scheduler is not None and self.perturbation.started
        return started or source.current_rho(trainer) > 0

    def begin_window(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what has changed about the model, and forget what a window that was cut short has left."""
        if not self._is_sharded:  # else it was done before the forward, inside which other parameters are shown
            self.follow(trainer, pl_module)
        self.follow_scaling()
        self.open_window()

    def gradient_holders(self, trainer: Trainer) -> list[nn.Parameter]:
        """The parameters whose gradients a pass may change at this moment."""
        return gradient_holders(self._parameters, trainer.optimizers)

    def open_window(self) -> None:
        """Forget what a window that was cut short has left."""
        self._fresh, self._sum, self._ascents = None, None, 0

    def count_step(self) -> None:
        """Count an optimizer step, with EFMLoRA beside in its count."""
        (self._scheduler or self).step += 1

    def take_ascent(self, trainer: Trainer) -> None:
        """E from the gradients that the pairs hold; with EFMLoRA beside, Ê waits for the optimizer step."""
        assert self.perturbation is not None
        fresh = self.perturbation.ascend((self._scheduler or self).current_rho(trainer), at_perturbed=False)
        if self._scheduler is None:
            self.perturbation.assign(fresh)
            return
        self._fresh = total = fresh
        if self._sum is not None:
            stacks = list(torch._foreach_add(self._sum.stacks, fresh.stacks))
            total = FreshPerturbation(stacks, self._sum.finite & fresh.finite, fresh.is_zero)
        self._sum, self._ascents = total, self._ascents + 1

    def descending(self) -> Any:
        """Inside, the layers read B + E with the fresh E."""
        assert self.perturbation is not None
        return self.perturbation.applied(self._fresh.stacks if self._fresh else None)

    def between_ascents(self) -> Any:
        """Inside, the layers read B + Ê with EFMLoRA beside, else B."""
        if self._scheduler is None or self.perturbation is None or not self.perturbation.started:
            return nullcontext()
        return self.perturbation.applied()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._check_reached(pl_module)
        if self._scheduler is None:  # else EFMLoRA has counted it
            self.count_step()
        elif self._sum is not None:
            self._average(trainer, self._sum, self._scheduler.beta)
        module: Any = pl_module  # an FMLoRAModule
        if module.gradient_clip_val is not None:
            module.clip_gradients(optimizer, module.gradient_clip_val, module.gradient_clip_algorithm)

    def _check_reached(self, pl_module: LightningModule) -> None:
        """A training_step of a subclass has to come to FMLoRAModule's, which takes the passes."""
        if not self.reached:
            name = type(pl_module).__name__
            raise MisconfigurationException(
                f"{name}.training_step does not call super().training_step(batch, batch_idx), which takes the two "
                "passes and the optimizer step, so nothing would be perturbed or trained: remove it, or call super()"
            )

    def _average(self, trainer: Trainer, total: FreshPerturbation, beta: float) -> None:
        """Move Ê once, by the mean E of the window's micro-batches, if the step itself is not going to be skipped."""
        assert self.perturbation is not None
        finite = self.perturbation.all_finite(watched_parameters(trainer, optimizer_index=0)) & total.finite
        stacks = list(torch._foreach_div(total.stacks, self._ascents))
        self.perturbation.average(FreshPerturbation(stacks, finite, total.is_zero), beta)
        self.open_window()

    # Plateau schedulers step when automatic optimization would: after the validation that follows their step or epoch.

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.schedulers.step_waiting(trainer)
        if self.counted is not None:
            self.counted.look_again()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, *args)
        if outputs:  # a step that returns nothing may have skipped its batch before it came to ours
            self._check_reached(pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_reached(pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.schedulers.step_waiting(trainer)
        if self._is_sharded and batch_idx % window_of(trainer) == 0:
            self.follow(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.schedulers.step_waiting(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._scheduler is not None else super().state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            super().load_state_dict(state_dict)


def _scheduler_of(trainer: Trainer) -> EFMLoRA | None:
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, EFMLoRA)), None)
