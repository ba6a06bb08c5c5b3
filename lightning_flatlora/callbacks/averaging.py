"""AdapterAveraging: validate, save and return an average of the trained weights; the frozen base is never copied."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lightning_flatlora.callbacks.both_lightnings import callbacks_of
from lightning_flatlora.methods.checks import integer_problems, refuse
from lightning_flatlora.methods.optimizers import parameters_of
from lightning_flatlora.schedules import is_size
from lightning_flatlora.sharding import Sharding, reshard
from lightning_flatlora.wrappers import clean_name, wrapping_problems


class AdapterAveraging(Callback):
    """Average the weights that the optimizers train: adapters, ``modules_to_save``, heads.

    During a batch the module holds the training weights; from its end, after the optimizer's step, until the next batch
    starts it holds the averages. So validation, checkpoints, AdapterCheckpoint's folder and the module after ``fit``
    have the averages. A checkpoint also holds the training weights, so a run resumes exactly.

    It is called before all other callbacks, so that they see the averages when a batch ends. A checkpoint that a
    ``training_step`` saves itself lacks the average of that step.

    Whoever writes a trained weight between two batches, not through ``.data``, sets its average, and training goes on
    from there. Averages are in float32 or float64, since 16 bits would round small changes away. Buffers, such as
    BatchNorm's statistics, are not averaged.

    Args:
        decay: share of the old average in the new one, >= 0 and < 1: 0.99 averages about the last ``1 / (1 - 0.99) =
            100`` optimizer steps. None averages all steps with equal weights.
        start_step: optimizer steps to leave out, during which the module keeps the training weights.

    Raises:
        MisconfigurationException: values out of range (here); nothing is trained, the strategy is not one device, DDP
            or FSDP2, another callback averages weights, or a checkpoint's averages are of other weights (when training
            starts); an optimizer trains a parameter that the module does not have (in a step).

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
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # First of all callbacks, so that whatever another one saves at the end of a batch has the batch's average.
        callbacks = callbacks_of(trainer)
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.load_state_dict({})  # the checkpoint may be of a run without averages

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's state, which stays whole and on the CPU until training starts."""
        state_dict = state_dict if isinstance(state_dict, dict) else {"averages": state_dict}
        self._step, self._count = state_dict.get("step", 0), state_dict.get("count", 0)
        # By the parameters' names, since a resumed run may list them in another order.
        self._averages: dict[str, Tensor] = state_dict.get("averages", {})
        # The training weights while the module holds the averages; otherwise empty.
        self._aside: dict[str, Tensor] = state_dict.get("weights", {})
        # The versions are those of the parameters when the averages were put into them.
        self._versions: dict[str, int] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._names: dict[nn.Parameter, str] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse weights that can't be averaged, and move a loaded state to its parameters' devices."""
        problems = wrapping_problems(trainer.strategy.model or pl_module, [])
        for each in callbacks_of(trainer):
            # By name, since the older releases of Lightning lack the second one.
            kinds = {kind.__name__ for kind in type(each).__mro__}
            if kinds & {"StochasticWeightAveraging", "WeightAveraging"}:
                problems.append(f"{type(each).__name__} averages the same weights: keep one")
        if not any(parameter.requires_grad for parameter in parameters_of(*trainer.optimizers)):
            problems.append("the optimizer has no parameter that requires a gradient: add an adapter, or unfreeze one")
        for count in (self._step, self._count):
            problems += integer_problems("its count of steps in the checkpoint", count, least=0)
        refuse(self, problems)
        named = _named_parameters(pl_module)
        is_other = self._parameters and any(named.get(name) is not self._parameters[name] for name in self._averages)
        # A state from a later step is of another run, or of a checkpoint that was only evaluated.
        if self._step > trainer.global_step or is_other:
            self.load_state_dict({})
        try:
            for values in (self._averages, self._aside):
                for name, value in values.items():
                    here = tuple(named[name].shape) if name in named else "absent"
                    if here != value.shape:
                        refuse(self, [f"{name} is {here} here, but {tuple(value.shape)} in the checkpoint's averages"])
                    values[name] = Sharding().part(value.to(named[name].device), named[name])
        except AttributeError as error:
            refuse(self, [f"its state in the checkpoint is damaged: {error}"])
        self._follow(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not self._parameters:  # a tuner has restored a state in the middle of the fit
            self.on_train_start(trainer, pl_module)
        self._hold_averages(pl_module, False)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Average the weights if the batch ended in an optimizer step, and put the averages into the module."""
        if trainer.global_step > max(self._step, self.start_step):
            trained = [parameter for parameter in parameters_of(*trainer.optimizers) if parameter.requires_grad]
            if not self._names.keys() >= set(trained):
                self._follow(trainer, pl_module)
            self._step = trainer.global_step
            self._count += 1
            share = 1 / self._count if self.decay is None else 1 - self.decay
            for parameter in trained:
                weight = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
                self._averages.setdefault(self._names[parameter], weight).lerp_(weight, share)
        self._hold_averages(pl_module, True)

    on_train_epoch_end = on_train_batch_end  # for an epoch that an on_train_batch_start ended by returning -1

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the names of the parameters as they are now; the average of one that was replaced starts again."""
        former, self._parameters = self._parameters, _named_parameters(pl_module)
        self._names = {parameter: name for name, parameter in self._parameters.items()}
        if former:
            self._averages = {n: each for n, each in self._averages.items() if self._parameters.get(n) is former[n]}
        for parameter in parameters_of(*trainer.optimizers):
            if parameter.requires_grad and parameter not in self._names:
                problem = f"an optimizer trains a parameter of shape {tuple(parameter.shape)} that is not the module's"
                refuse(self, [f"{problem}, so no checkpoint would hold it: make it an attribute of the module"])

    def _hold_averages(self, pl_module: LightningModule, averages: bool) -> None:
        """Let the module hold the averages, or else the training weights, unless it already does."""
        if averages == bool(self._aside):
            return
        values = self._averages if averages else self._aside
        self._aside = {name: self._parameters[name].detach().clone() for name in values} if averages else {}
        reshard(pl_module)  # otherwise the next pass would compute with the gathered old weights
        for name, value in values.items():
            parameter = self._parameters[name]
            if not averages and parameter._version != self._versions.get(name, parameter._version):
                # Compared, since DDP writes all parameters anew when a fit starts.
                written, average = parameter.detach(), self._averages[name]
                is_kept = written == average.to(written.dtype)
                average.copy_(torch.where(is_kept, average, written))
                value = torch.where(is_kept, value, written)
            parameter.data.copy_(value)
        self._versions = {name: self._parameters[name]._version for name in self._aside}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return averages and training weights, whole and on the CPU; under FSDP2 every rank must call this."""
        state = {"step": self._step, "count": self._count, "averages": self._averages, "weights": self._aside}
        return tree_map_only(Tensor, lambda value: Sharding().gather(value, value).cpu(), state)  # type: ignore[no-any-return]


def _named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    reshard(module)  # after a validation its parameters are not those that the optimizers hold
    return {clean_name(name): parameter for name, parameter in module.named_parameters()}
