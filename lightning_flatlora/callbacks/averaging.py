"""AdapterAveraging: validate, save and return an average of the trained weights; the frozen base is never copied."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lightning_flatlora.methods.checks import integer_problems, refuse
from lightning_flatlora.methods.optimizers import parameters_of
from lightning_flatlora.schedules import is_size
from lightning_flatlora.sharding import Sharding, reshard
from lightning_flatlora.wrappers import wrapping_problems


class AdapterAveraging(Callback):
    """Average the weights that the optimizers train: adapters, ``modules_to_save``, heads.

    During a batch the module holds the training weights; from its end, after the optimizer's step, until the next batch
    starts it holds the averages. So validation, checkpoints, AdapterCheckpoint's folder and the module after ``fit``
    have the averages. A checkpoint also holds the training weights, so a run resumes exactly.

    Whoever writes a trained weight between two batches, not through ``.data``, sets its average, and training goes on
    from there. Averages are in float32 or float64, since 16 bits would round small changes away. Buffers, such as
    BatchNorm's statistics, are not averaged.

    Args:
        decay: share of the old average in the new one, >= 0 and < 1: 0.99 averages about the last ``1 / (1 - 0.99) =
            100`` optimizer steps. None averages all steps with equal weights.
        start_step: optimizer steps to leave out, during which the module keeps the training weights.

    Raises:
        MisconfigurationException: values out of range (here); nothing is trained, or the strategy is not one device,
            DDP or FSDP2 (when training starts); the optimizers' parameters change their places (in a step).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[AdapterAveraging(decay=0.99)], accelerator="cpu", logger=False)
    """

    def __init__(self, decay: float | None, start_step: int = 0) -> None:
        problems = integer_problems("start_step", start_step, least=0)
        if decay is not None and not (is_size(decay) and decay < 1):
            problems.append(f"decay must be a number >= 0 and < 1, or None for equal weights, got {decay!r}")
        refuse(self, problems)
        self.decay, self.start_step = decay, start_step
        self.load_state_dict({})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.load_state_dict({})  # the checkpoint may be of a run without averages

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's state, which stays whole and on the CPU until training starts."""
        self._step, self._count = state_dict.get("step", 0), state_dict.get("count", 0)
        # By a parameter's place among those of the optimizers, as in their own states.
        self._averages: dict[int, Tensor] = state_dict.get("averages", {})
        # The training weights while the module holds the averages; otherwise empty.
        self._aside: dict[int, Tensor] = state_dict.get("weights", {})
        # The versions are those of the parameters when the averages were put into them.
        self._parameters, self._versions = list[nn.Parameter](), dict[int, int]()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse weights that can't be averaged, and move a loaded state to its parameters' devices."""
        parameters = parameters_of(*trainer.optimizers)
        problems = wrapping_problems(trainer.strategy.model or pl_module, [])
        if not any(parameter.requires_grad for parameter in parameters):
            problems.append("the optimizer has no parameter that requires a gradient: add an adapter, or unfreeze one")
        refuse(self, problems)
        # A state from a later step is of another run, or of a checkpoint that was only evaluated.
        if self._step > trainer.global_step or self._are_others(parameters):
            self.load_state_dict({})
        self._parameters = parameters
        for values in (self._averages, self._aside):
            for place, value in values.items():
                values[place] = Sharding().part(value.to(parameters[place].device), parameters[place])

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not self._parameters:  # a tuner has restored a state in the middle of the fit
            self.on_train_start(trainer, pl_module)
        self._hold_averages(pl_module, False)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Average the weights if the batch ended in an optimizer step, and put the averages into the module."""
        if trainer.global_step > max(self._step, self.start_step):
            parameters = parameters_of(*trainer.optimizers)
            if self._are_others(parameters):
                refuse(self, ["the optimizers' parameters have other places now: add new ones after all others"])
            self._step, self._parameters = trainer.global_step, parameters
            self._count += 1
            share = 1 / self._count if self.decay is None else 1 - self.decay
            for place, parameter in enumerate(self._parameters):
                if parameter.requires_grad:
                    weight = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
                    self._averages.setdefault(place, weight).lerp_(weight, share)
        self._hold_averages(pl_module, True)

    on_train_epoch_end = on_train_batch_end  # for an epoch that an on_train_batch_start ended by returning -1

    def _are_others(self, parameters: list[nn.Parameter]) -> bool:
        return list(map(id, parameters))[: len(self._parameters)] != list(map(id, self._parameters))

    def _hold_averages(self, pl_module: LightningModule, averages: bool) -> None:
        """Let the module hold the averages, or else the training weights, unless it already does."""
        if averages == bool(self._aside):
            return
        values = self._averages if averages else self._aside
        self._aside = {place: self._parameters[place].detach().clone() for place in values} if averages else {}
        reshard(pl_module)  # otherwise the next pass would compute with the gathered old weights
        for place, value in values.items():
            parameter = self._parameters[place]
            if not averages and parameter._version != self._versions.get(place, parameter._version):
                # Compared, since DDP writes all parameters anew when a fit starts.
                written, average = parameter.detach(), self._averages[place]
                is_kept = written == average.to(written.dtype)
                average.copy_(torch.where(is_kept, average, written))
                value = torch.where(is_kept, value, written)
            parameter.data.copy_(value)
        self._versions = {place: self._parameters[place]._version for place in self._aside}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return averages and training weights, whole and on the CPU; under FSDP2 every rank must call this."""
        state = {"step": self._step, "count": self._count, "averages": self._averages, "weights": self._aside}
        return tree_map_only(Tensor, lambda value: Sharding().gather(value, value).cpu(), state)  # type: ignore[no-any-return]
