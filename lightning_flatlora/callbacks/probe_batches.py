"""The batches on which flatness is measured, kept as they pass by, and their loss."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch._dynamo import OptimizedModule

from lightning_flatlora.callbacks.silenced import silenced
from lightning_flatlora.callbacks.training_step import loss_of
from lightning_flatlora.compat import MisconfigurationException
from lightning_flatlora.flatness import MeanLoss
from lightning_flatlora.flatness.measures import CURVATURES
from lightning_flatlora.methods.batches import clone_with_attributes, own_containers
from lightning_flatlora.methods.put_back import eval_mode, random_state
from lightning_flatlora.methods.replay import Replay


class ProbeBatches:
    """Copies of the first batches that pass by, and the loss that a module's own step computes of each.

    Attributes:
        measured_at: the step or epoch of the last measurement; at first that at which training started.
        has_measured: whether there has been a measurement.
        has_failed: whether the module's step can't be measured.
        tried: the number of batches on which it has been tried.

    Args:
        trainer: that runs the steps.
        pl_module: the module, before other callbacks replace its methods for a step.
        count: batches of each rank; fewer are kept where an epoch has fewer.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, count: int) -> None:
        self.measured_at = 0
        self.has_measured = self.has_failed = False
        self.tried = 0
        self._trainer, self._pl_module, self._step = trainer, pl_module, _loss_method(pl_module)
        self._replay = Replay(pl_module, trainer.optimizers)
        self._same_draws = random_state(pl_module.device)
        self._missing = count
        # Each with its index in the epoch from which it is.
        self._batches: list[tuple[int, Any]] = []
        self._next_index: int | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def pass_by(self, batch: Any, batch_idx: int) -> None:
        """Keep a copy of a batch, on its device, if it is one of the first."""
        # In their order, and none twice, though an epoch or a validation begins again.
        if self._missing and self._next_index in (None, batch_idx):
            self._batches.append((batch_idx, own_containers(batch, clone_with_attributes)))
            self._missing, self._next_index = self._missing - 1, batch_idx + 1

    def end(self) -> None:
        """Note that an epoch has no more batches."""
        if self._batches:
            self._missing = 0

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Inside, the module is in eval mode and logs nothing; afterwards all is as before."""
        pl_module = self._pl_module
        self._replay.look_again(self._trainer.optimizers)
        with ExitStack() as stack:
            stack.enter_context(self._replay.undone(pl_module.device))
            stack.callback(eval_mode(pl_module))
            stack.enter_context(silenced(pl_module))
            # A log that can't be replaced refuses what may not be logged in the hook that measures.
            stack.callback(setattr, pl_module, "_current_fx_name", pl_module._current_fx_name)
            pl_module._current_fx_name = "training_step"
            yield

    def try_out(self) -> str | None:
        """Leave out the batches without a loss, and say why nothing can be measured, if so: the module is in eval mode.

        Detection models give their losses in training mode alone, and an RNN of cuDNN no gradient in eval mode.

        Raises:
            MisconfigurationException: the step writes a parameter that no optimizer trains.
        """
        name, self.tried = self._step.__name__, len(self._batches)
        try:
            with torch.no_grad():
                usable = [held for held in self._batches if self._loss(*held) is not None]
            # Where no batch has a loss now, there may be one later.
            usable = usable or self._batches
            loss = self._loss(*usable[0])
            if loss is not None and loss.requires_grad:
                torch.autograd.grad(loss, self._trained(), allow_unused=True)
        except Exception as error:
            return f"{name} fails in eval mode, in which it measures: {type(error).__name__}: {error}"
        finally:
            self._refuse_written_parameter()
        without = len(self._batches) - len(usable)
        if without:
            rank_zero_warn(
                f"FlatnessMonitor: {name} returned None for {without} of {len(self._batches)} probe batches, which are "
                "left out"
            )
        self._batches, self.tried = usable, len(usable)
        return None

    def _refuse_written_parameter(self) -> None:
        # What has been written can't be taken back, so the run must not go on as if nothing had happened.
        written = self._replay.written_parameter()
        if written is not None:
            raise MisconfigurationException(
                f"FlatnessMonitor: {self._step.__name__} writes the parameter {written} in eval mode, in which it "
                "measures, and no optimizer trains it, as a momentum encoder's: update it in on_train_batch_end, or "
                "behind `if self.training`"
            )

    @property
    def loss(self) -> MeanLoss:
        """The mean over the batches, as a function of the weights; it does not go through DDP's wrapper."""
        return MeanLoss([partial(self._loss_or_nan, *held) for held in self._batches])

    def _loss_or_nan(self, batch_idx: int, batch: Any) -> Tensor:
        """Compute one batch's loss; where there is none, no number, which depends on what is trained as a loss does."""
        loss = self._loss(batch_idx, batch)
        if loss is not None:
            return loss
        rank_zero_warn(
            f"FlatnessMonitor: {self._step.__name__} returned None for a probe batch, so NaN is logged for what was "
            "measured on it"
        )
        # Squared, so that the curvature is no number either.
        return torch.stack([parameter.square().sum() for parameter in self._trained()]).sum() * torch.nan

    def _loss(self, batch_idx: int, batch: Any) -> Tensor | None:
        """Compute one batch's loss, with the same random draws at every call; None where the step gives none."""
        # So that the losses at two weights differ by the weights alone, if a step draws at random.
        self._same_draws()
        batch = own_containers(batch, clone_with_attributes)  # a step may change its batch
        takes_index = is_param_in_hook_signature(self._step, "batch_idx", min_args=2)
        with self._trainer.precision_plugin.train_step_context():
            output = self._step(batch, batch_idx) if takes_index else self._step(batch)
        return loss_of(output, self._step.__name__)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self._pl_module.parameters() if parameter.requires_grad]


def _loss_method(pl_module: LightningModule) -> Callable[..., Any]:
    """Find the method that computes the loss of a batch."""
    compute_loss = getattr(pl_module, "compute_loss", None)
    if not pl_module.automatic_optimization and callable(compute_loss):
        return cast(Callable[..., Any], compute_loss)
    return pl_module.training_step


def loss_problems(pl_module: LightningModule) -> list[str]:
    """Say why the method that computes the loss of a batch can't be used."""
    if not pl_module.automatic_optimization:
        if callable(getattr(pl_module, "compute_loss", None)):
            return []
        return [
            "training_step with manual optimization would step the optimizer: put the loss of a batch into a method "
            "compute_loss(batch, batch_idx), which is measured instead"
        ]
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        return [
            "training_step(dataloader_iter) takes batches itself, so none can be held: "
            "write training_step(batch, batch_idx)"
        ]
    return []


def curvature_problems(pl_module: LightningModule, measures: Collection[str]) -> list[str]:
    """Say why the measures that take second derivatives can't be used: torch.compile gives none."""
    chosen = [name for name in CURVATURES if name in measures]
    if not chosen:
        return []
    is_compiled = getattr(pl_module, "_compiler_ctx", None) is not None  # where Lightning was given a compiled module
    for module in pl_module.modules():
        is_compiled |= isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
    if not is_compiled:
        return []
    return [
        f"the measures {', '.join(chosen)} need second derivatives, which torch.compile does not give: leave them out, "
        "or measure without torch.compile"
    ]
