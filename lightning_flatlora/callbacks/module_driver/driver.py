"""The callback through which an FMLoRAModule starts, counts, clips and ends."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.methods.b_perturbation_callback import BPerturbationCallback
from lightning_flatlora.callbacks.methods.efmlora import EFMLoRA
from lightning_flatlora.callbacks.methods.method_callback import MethodCallback, watched_parameters
from lightning_flatlora.callbacks.methods.module_passes import ModulePasses, window_of
from lightning_flatlora.callbacks.module_driver.manual_schedulers import ManualSchedulers
from lightning_flatlora.lightning_names import MisconfigurationException, callback_of, callbacks_of
from lightning_flatlora.methods.replay import Replay
from lightning_flatlora.perturbation import FreshPerturbation, Perturbation


class FMLoRAModuleDriver(ModulePasses, BPerturbationCallback):
    """The callback through which an FMLoRAModule starts, counts, clips and ends, so that its hooks stay the user's.

    Beside an EFMLoRA callback it takes the step count, rho, the perturbation and the average from that callback.

    Attributes:
        lr_schedulers: steps the module's LR schedulers, which Lightning does not under manual optimization.
        second_pass: lets the second pass of a step follow the first.
        has_reached_step: whether a training_step of the user's own has ever called FMLoRAModule's.
        has_reached_batch: whether it has in this batch.
    """

    def __init__(self, *args: Any, window: int, step_problems: Sequence[str], **kwargs: Any) -> None:
        self.window = window
        self._step_problems = step_problems
        super().__init__(*args, **kwargs)

    @override
    def argument_problems(self) -> list[str]:
        return [*super().argument_problems(), *self._step_problems]

    @override
    def begin(self) -> None:
        super().begin()
        self.second_pass = Replay(nn.Module())
        self.has_reached_step = True
        self.has_reached_batch = False
        self._efmlora: EFMLoRA | None = None
        self._sum: FreshPerturbation | None = None
        self._ascents = 0
        self._is_set_up = False
        self.lr_schedulers = ManualSchedulers()

    @property
    @override
    def perturbation(self) -> Perturbation | None:
        """That of EFMLoRA, if there is one: it may be made after this callback's start, when pairs appear."""
        return super().perturbation if self._efmlora is None else self._efmlora.perturbation

    @override
    def works_beside(self, other: MethodCallback) -> bool:
        return isinstance(other, EFMLoRA)

    @override
    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        problems = super().configuration_problems(trainer, pl_module)
        module: Any = pl_module  # an FMLoRAModule
        problems += module._subclass_problems()
        problems += self.lr_schedulers.problems(trainer)
        if len(trainer.optimizers) != 1:
            problems.append(
                f"configure_optimizers must return one optimizer, got {len(trainer.optimizers)}: for several, use "
                "manual optimization and the EFMLoRA callback"
            )
        if sum(isinstance(callback, EFMLoRA) for callback in callbacks_of(trainer)) > 1:
            problems.append("one EFMLoRA can schedule the module's passes: keep one")
        efmlora = callback_of(trainer, EFMLoRA)
        if efmlora is not None:
            problems += self._problems_beside(efmlora, trainer)
        return problems

    def _problems_beside(self, efmlora: EFMLoRA, trainer: Trainer) -> list[str]:
        """What can't work with the EFMLoRA callback that schedules the passes."""
        problems = []
        for name in ("rho", "estimator", "norm_scope", "adapter_name", "finder"):
            own, other = getattr(self, name), getattr(efmlora, name)
            if own != other:
                problems.append(
                    f"{name} must be the same in the module and in EFMLoRA beside it, got {own!r} and {other!r}"
                )
        if (self.start_step, self.every_n_steps) != (0, 1):
            problems.append("EFMLoRA beside the module schedules the passes: give start_step and every_n_steps to it")
        if not self.sync_ascent and trainer.world_size > 1:
            problems.append(
                "sync_ascent=False leaves each rank its own E, and EFMLoRA beside it keeps one average for all: "
                "leave it True"
            )
        return problems

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # After super().setup(), whose begin() forgets the set-up of the last fit.
        self._is_set_up = True
        if stage == "fit":
            self.lr_schedulers.listen(pl_module, self.window)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lr_schedulers.complete_configs(trainer)
        super().on_fit_start(trainer, pl_module)
        self.second_pass = Replay(pl_module, trainer.optimizers, self._is_sharded)
        module: Any = pl_module  # an FMLoRAModule
        # Where nothing is overridden, training_step is FMLoRAModule's own, and there is nothing to check.
        self.has_reached_step = not module._overrides_step
        self._efmlora = callback_of(trainer, EFMLoRA)

    @override
    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Otherwise EFMLoRA has the perturbation.
        if callback_of(trainer, EFMLoRA) is None:
            super().install(trainer, pl_module)

    @override
    def uninstall(self) -> None:
        super().uninstall()
        self.lr_schedulers.release()
        self._is_set_up = False
        self.second_pass = Replay(nn.Module())

    @override
    def warn_of_late_start(self, trainer: Trainer) -> None:
        # Beside EFMLoRA that callback has the count.
        if self._efmlora is None:
            super().warn_of_late_start(trainer)

    def ascends(self, trainer: Trainer) -> bool:
        """Whether the coming step has two passes; never while a tuner has removed our callbacks."""
        if not self._is_set_up:
            raise MisconfigurationException(
                "FMLoRAModule was not set up, so nothing would be perturbed: where you override configure_callbacks, "
                "return [*super().configure_callbacks(), ...]"
            )
        source = self._efmlora or self
        # A tuner, such as the batch size finder, removes callbacks for its trial steps, and these must be plain.
        if source not in callbacks_of(trainer):
            return False
        if self.perturbation is None or not source.is_refresh_step:
            return False
        # With rho = 0 the step is plain, unless there is an average, which the zero perturbation must move.
        has_average = self._efmlora is not None and self.perturbation.may_be_nonzero
        return has_average or source.current_size(trainer) > 0

    def begin_window(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what has changed about the model, and forget what an interrupted window has left."""
        # A sharded model was followed in on_train_batch_start: inside its forward it shows other parameters.
        if not self._is_sharded:
            self.follow(trainer, pl_module)
        self.follow_scaling()
        self._sum, self._ascents = None, 0

    def count_step(self) -> None:
        """Count an optimizer step, in EFMLoRA's count if there is one."""
        source = self._efmlora or self
        source.look_for_gradients(source.main_group)
        source.step += 1

    def ascend(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Take E from the current gradients of the pairs; beside EFMLoRA, Ê waits for the optimizer step.

        Returns:
            A context in which the layers read B + E.
        """
        assert self.perturbation is not None
        fresh = self.perturbation.ascend((self._efmlora or self).current_size(trainer), at_perturbed=False)
        if self._efmlora is None:
            self.perturbation.assign(fresh)
            return self.perturbation.applied()
        # Kept apart from Ê, which moves once for the step, by the mean over the window.
        self._ascents += 1
        if self._sum is None:
            self._sum = fresh
        else:
            stacks = list(torch._foreach_add(self._sum.stacks, fresh.stacks))
            self._sum = FreshPerturbation(stacks, self._sum.finite & fresh.finite, fresh.is_zero)
        return self.perturbation.applied(fresh.stacks)

    def between_ascents(self) -> AbstractContextManager[None]:
        """Inside, the layers read B + Ê beside EFMLoRA, and B otherwise."""
        if self._efmlora is None or self.perturbation is None or not self.perturbation.may_be_nonzero:
            return nullcontext()
        return self.perturbation.applied()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._check_reached(pl_module)
        if self._efmlora is None:  # otherwise EFMLoRA has counted it
            self.count_step()
        elif self._sum is not None:
            self._average(trainer, self._sum, self._efmlora.beta)
        self.follow_step(trainer, pl_module)
        if self._efmlora is not None:
            self._efmlora.follow_step(trainer, pl_module)
        # The gradient is complete and unscaled only now, and E, which clipping must not change, was taken before.
        module: Any = pl_module  # an FMLoRAModule
        # The hook, which a subclass may override as in automatic optimization; Lightning's own clips nothing for None.
        module.configure_gradient_clipping(optimizer, module.gradient_clip_val, module.gradient_clip_algorithm)

    def _check_reached(self, pl_module: LightningModule) -> None:
        """Refuse a subclass whose training_step does not call FMLoRAModule's, which takes the passes."""
        if not self.has_reached_step:
            name = type(pl_module).__name__
            raise MisconfigurationException(
                f"{name}.training_step does not call super().training_step(batch, batch_idx), which takes the two "
                "passes and the optimizer step, so nothing would be perturbed or trained: remove it, or call super()"
            )

    def _average(self, trainer: Trainer, total: FreshPerturbation, beta: float) -> None:
        """Move Ê once, by the mean E of the window's micro-batches, unless the step itself will be skipped."""
        assert self.perturbation is not None
        finite = self.perturbation.all_finite(watched_parameters(trainer, optimizer_index=0)) & total.finite
        stacks = list(torch._foreach_div(total.stacks, self._ascents))
        self.perturbation.average(FreshPerturbation(stacks, finite, total.is_zero), beta)

    # Plateau schedulers step when automatic optimization would step them: after the validation that follows their step
    # or epoch. So the hooks below step them at the first moment after such a validation.

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.lr_schedulers.step_waiting(trainer)
        self.second_pass.look_again(trainer.optimizers)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, *args)
        # A step that returns nothing may have skipped its batch before it called super().
        if outputs:
            self._check_reached(pl_module)
        reached, self.has_reached_batch = self.has_reached_batch, False
        if not reached and self.window > 1:
            # The gradients are reset in a window's first batch, and the step is taken in its last one.
            raise MisconfigurationException(
                f"{type(pl_module).__name__}: with accumulate_grad_batches={self.window}, every batch must "
                "reach FMLoRAModule.training_step, and one has not: a training_step of yours returned before it called "
                "super(), or the dataloader gave None. Return None from compute_loss to skip a batch"
            )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_reached(pl_module)
        self.lr_schedulers.end_epoch(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.lr_schedulers.begin_batch(trainer)
        # Here and not in begin_window, which runs inside the forward of a sharded model.
        if self._is_sharded and batch_idx % window_of(trainer) == 0:
            self.follow(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.lr_schedulers.step_waiting(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        # EFMLoRA saves the count and the average that both use.
        return {} if self._efmlora is not None else super().state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            super().load_state_dict(state_dict)
