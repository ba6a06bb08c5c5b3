"""EFMLoRA and FMLoRA for transformers' Trainer and all trainers of trl, as callbacks.

EFMLoRA takes one argument, under every strategy that the loops work with::

    trainer = SFTTrainer(..., callbacks=[EFMLoRA(rho=0.05)])

FMLoRA also needs a trainer that runs both passes, see :class:`TwoPassTrainer`.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from typing_extensions import override

from lightning_flatlora import loops
from lightning_flatlora.loops.loop_method import LoopMethod
from lightning_flatlora.methods.checks import refuse
from lightning_flatlora.methods.put_back import own_attributes
from lightning_flatlora.patching import nothing
from lightning_flatlora.schedules import RhoSchedule

_TWO_PASSES = (
    "a Trainer takes one pass per step: derive yours from TwoPassTrainer, as in `class TwoPassSFT(SFTTrainer, "
    "TwoPassTrainer): pass`, or use EFMLoRA"
)

# In which trl's trainers gather what they log.
_LOGGED = ("_metrics", "_stored_metrics")


class _MethodCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keep a loop's method for each training of a Trainer.

    Attributes:
        flat: the method of the current or last training; None before the first.

    The arguments are those of :class:`EFMLoRA`.
    """

    loop: ClassVar[type[LoopMethod]]
    flat: Any = None

    def __init__(self, rho: float | RhoSchedule | None = None, *, log_norm: bool = False, **settings: Any) -> None:
        # Values out of range are refused here, and not when training starts.
        self._method = self.loop.kind(rho, **settings)
        self._rho, self._log_norm, self._settings = rho, log_norm, settings
        self._mark = ""

    @override
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.restore_callback_states_from_checkpoint:
            problem = "leave restore_callback_states_from_checkpoint out: this callback resumes without it"
            refuse(self._method, [problem])

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make the method, now that model and optimizer are sharded, and continue a resumed run's."""
        self.flat = self.loop(model, optimizer, self._rho, total_steps=state.max_steps, **self._settings)
        marks = str(state.stateful_callbacks.setdefault(type(self).__name__, {}))
        if not state.global_step:
            # A new run on a used optimizer, as after running out of memory, begins with no perturbation.
            self.flat.load_state_dict(self.flat.state_dict())
        elif "mark" in marks:  # or the checkpoint is of a run without the method, of which the loop warns
            self._resume(args, state, marks)

    def _resume(self, args: TrainingArguments, state: TrainerState, marks: str) -> None:
        folders = [self._checkpoint(args, state)]
        if args.resume_from_checkpoint:
            folders.append(Path(args.resume_from_checkpoint))
        files = [folder / self._file for folder in folders]
        for file in filter(Path.is_file, files):
            saved = torch.load(file, map_location="cpu", weights_only=True)
            # Another run's checkpoint of this step may lie in the same place.
            if saved["mark"] in marks:
                self.flat.load_state_dict(saved["state"])
                return
        problem = (
            f"none of {', '.join(map(str, files))} is of this checkpoint: name its folder in "
            "TrainingArguments(resume_from_checkpoint=...), too, or start a new run from its weights"
        )
        refuse(self._method, [problem])

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the method's state beside the optimizer's, in a checkpoint from which a run can be resumed."""
        folder = self._checkpoint(args, state)
        if self.flat and args.should_save and not args.save_only_model and folder.is_dir():
            torch.save({"mark": self._mark, "state": self.flat.state_dict()}, folder / self._file)

    def state(self) -> dict[str, Any]:
        """Mark the checkpoint that is being saved, so that its state is not mistaken for another run's."""
        self._mark = uuid4().hex
        return {"args": {}, "attributes": {"mark": self._mark}}

    @staticmethod
    def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}")

    @property
    def _file(self) -> str:
        name = self._method.adapter_name
        return f"{self._method.title}.pt" if name is None else f"{self._method.title}-{name}.pt"

    @override
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add rho to what is logged of training."""
        if self.flat is None or "loss" not in logs:
            return
        values = {"rho": self.flat.current_rho}
        if self._log_norm:
            E = self.flat.perturbation.state_dict()["E"]
            values["perturbation_norm"] = float(nn.utils.get_total_norm(list(E.values())))
        for log in (logs, state.log_history[-1]):
            log.update(values)

    @override
    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave no trace on the model."""
        if self.flat is not None:
            self.flat.close()


class EFMLoRA(_MethodCallback):
    """Train at B + Ê at LoRA's speed, in transformers' Trainer and trl's trainers (Algorithm 2).

    It works under DDP, FSDP2, tensor parallelism and DeepSpeed's ZeRO-1, 2 and 3. Each checkpoint from which the
    Trainer can resume gets a file ``EFMLoRA.pt``, from which a resumed run continues exactly. ``rho`` is logged with
    the loss; trackers such as TensorBoard see it if they come after this callback:
    ``trainer.add_callback(trainer.pop_callback(TensorBoardCallback))``.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
            Required: None is refused.
        log_norm: whether the norm of Ê over all pairs' B is logged, too, which waits for the device.
        settings: ``beta``, ``estimator`` and the others of :class:`lightning_flatlora.EFMLoRA`.

    Raises:
        MisconfigurationException: values out of range (here); a Trainer, model, optimizer or strategy that can't work,
            or a checkpoint without the method's state (when training starts).

    Example:
        >>> from transformers import TrainingArguments
        >>> callback = EFMLoRA(rho=0.05)
        >>> callback.flat is None  # until training starts
        True
    """

    loop = loops.EFMLoRA


class FMLoRA(_MethodCallback):
    """Train by two passes per step, in a :class:`TwoPassTrainer` (Algorithm 1).

    Arguments, files and errors are those of :class:`EFMLoRA`, without ``beta``. DeepSpeed is refused.
    """

    loop = loops.FMLoRA

    @override
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a Trainer that has taken no passes."""
        if not self.flat._passes_begun:
            refuse(self._method, [_TWO_PASSES])


class TwoPassTrainer(Trainer):  # type: ignore[misc]
    """Run the passes of a callback of this module; one that derives from it puts it behind the other trainer.

    ``class TwoPassGRPO(GRPOTrainer, TwoPassTrainer): pass``. A batch is prepared once, in which trl's online trainers
    sample completions, and what trl logs is the first pass's. With EFMLoRA it serves fused kernels, which read factors
    without calling their layer. Without a callback it trains as usual.
    """

    @override
    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Take the passes of a micro-batch, and return the loss of the first one, at the clean weights."""
        callbacks = self.callback_handler.callbacks
        callback = next((each for each in callbacks if isinstance(each, _MethodCallback)), None)
        if callback is None:
            loss: Tensor = super().training_step(model, inputs, *args)
            return loss
        model.train()
        inputs = self._prepare_inputs(inputs)
        self._prepare_inputs: Callable[[Any], Any] = dict
        losses: list[Tensor] = []
        try:
            for each_pass in callback.flat.training_passes():
                with each_pass:
                    of_first = self._noted() if losses else nothing
                    losses.append(super().training_step(model, inputs, *args))
                    of_first()
        finally:
            del self._prepare_inputs
        return losses[0]

    def _noted(self) -> Callable[[], None]:
        """Note what trl has logged so far, and return a function that puts it back."""
        numbers = own_attributes(self)
        logged = {name: copy.deepcopy(vars(self)[name]) for name in _LOGGED if name in vars(self)}

        def put_back() -> None:
            numbers()
            self.__dict__.update(logged)

        return put_back
