"""The batches on which flatness is measured, kept as they pass by, and their loss."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_flatlora.callbacks.logging import silenced
from lightning_flatlora.callbacks.training_step import loss_of
from lightning_flatlora.flatness.losses import MeanLoss, differentiable, refuse_reentrant
from lightning_flatlora.methods.put_back import copied_batch, random_state
from lightning_flatlora.methods.replay import Replay


class ProbeBatches:
    """Copies of the first batches that pass by, and the loss that the module's own step computes for each.

    Attributes:
        tried: number of batches that have been tried out.

    Args:
        trainer: runs the steps.
        pl_module: the module; a ValueError if it has no method that only computes a batch's loss.
        count: batches on each rank; fewer are kept if an epoch has fewer.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, count: int) -> None:
        self.tried = 0
        self._trainer, self._pl_module = trainer, pl_module
        name = "training_step" if pl_module.automatic_optimization else "compute_loss"
        self._step: Any = getattr(pl_module, name, None)
        if not callable(self._step):
            raise ValueError(
                "training_step with manual optimization would step the optimizer: compute the loss of a batch in a "
                "method compute_loss(batch, batch_idx), which is measured instead"
            )
        self._same_draws = random_state(pl_module.device)
        self._missing = count
        # Each with its index in its epoch.
        self._batches: list[tuple[int, Any]] = []
        self._next_index: int | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def pass_by(self, batch: Any, batch_idx: int) -> None:
        """Keep a copy of a batch, on its device, if it is one of the first."""
        # In order, and each only once, even if an epoch or a validation begins again.
        if self._missing and self._next_index in (None, batch_idx):
            self._batches.append((batch_idx, copied_batch(batch)))
            self._missing, self._next_index = self._missing - 1, batch_idx + 1

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Keep the module in eval mode inside, not compiled and not logging; afterwards restore everything.

        Raises:
            MisconfigurationException: the step has written a parameter that no optimizer trains.
        """
        pl_module = self._pl_module
        replay = Replay(pl_module, self._trainer.optimizers)
        with ExitStack() as stack:
            stack.enter_context(replay.undone(pl_module.device))
            for part in pl_module.modules():
                # A module frozen by torch.jit has no mode. Not by eval(), which a module may have overridden.
                if hasattr(part, "training"):
                    stack.callback(setattr, part, "training", part.training)
                    part.training = False
            # Compiled code has no second derivative, and each mode and perturbation would be compiled again.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(silenced(pl_module))
            # A self.log that can't be replaced would refuse options that are not allowed in the hook that measures.
            stack.callback(setattr, pl_module, "_current_fx_name", pl_module._current_fx_name)
            pl_module._current_fx_name = "training_step"
            yield
            written = replay.written_parameter()
        # The write can't be undone, so the run must not continue as if nothing had happened.
        if written is not None:
            raise MisconfigurationException(
                f"FlatnessMonitor: {self._step.__name__} writes the parameter {written} in eval mode, and no "
                "optimizer trains it, as a momentum encoder's: update it in on_train_batch_end or if self.training"
            )

    def try_out(self) -> bool:
        """Try out new batches, drop those without a loss, and say whether this rank and all others can measure.

        In eval mode, which measurements use, detection models give no losses and cuDNN's RNNs no gradient. A warning
        names the failure.
        """
        name, problem = self._step.__name__, None
        if self.tried < len(self._batches):
            try:
                self._take_gradients(name)
            except Exception as error:
                problem = f"{name} fails in eval mode, in which flatness is measured: {type(error).__name__}: {error}"
        # Asked at each measurement, since one rank may have new batches while another has none.
        has_failed = self._trainer.strategy.reduce_boolean_decision(problem is not None, all=False)
        if has_failed:
            reason = problem or "the step of another rank fails in eval mode, in which flatness is measured"
            rank_zero_warn(f"FlatnessMonitor: nothing is measured in this run: {reason}")
        return not has_failed

    def _take_gradients(self, name: str) -> None:
        trained = [parameter for parameter in self._pl_module.parameters() if parameter.requires_grad]
        usable = []
        for held in self._batches:
            with differentiable():
                loss = self._loss(*held)
            if loss is None:
                continue
            usable.append(held)
            # Pairs may be unfrozen later.
            if loss.requires_grad:
                refuse_reentrant(loss)
                torch.autograd.grad(loss, trained, allow_unused=True)
        without = len(self._batches) - len(usable)
        if usable and without:
            rank_zero_warn(
                f"FlatnessMonitor: {name} returned None for {without} of {len(self._batches)} probe batches: left out"
            )
        # If no batch has a loss now, a later one may.
        self._batches = usable or self._batches
        self.tried = len(self._batches)

    @property
    def loss(self) -> MeanLoss:
        """The mean over the batches, as a function of the weights; it does not go through DDP's wrapper."""
        losses: list[Any] = [partial(self._loss, *held) for held in self._batches]
        return MeanLoss(losses)

    def _loss(self, batch_idx: int, batch: Any) -> Tensor | None:
        """Compute one batch's loss, with the same random draws at every call; None if the step gives none."""
        # So that losses at two weights differ only by the weights, even if a step draws random numbers.
        self._same_draws()
        batch = copied_batch(batch)  # a step may change its batch
        takes_index = is_param_in_hook_signature(self._step, "batch_idx", min_args=2)
        with self._trainer.precision_plugin.train_step_context():
            output = self._step(batch, batch_idx) if takes_index else self._step(batch)
        return loss_of(output, self._step.__name__)
