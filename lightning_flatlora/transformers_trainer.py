"""EFMLoRA for the Trainer of transformers, and for those built on it, such as trl's SFTTrainer.

Nothing else of the package imports this module, so that the other parts do without transformers.
"""

import inspect
import math
import os
from collections.abc import MutableMapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from lightning_flatlora import loops
from lightning_flatlora.callbacks.methods import checks
from lightning_flatlora.distributed import is_sharded
from lightning_flatlora.lightning_names import MisconfigurationException
from lightning_flatlora.loop_method import LoopMethod
from lightning_flatlora.schedules import RhoSchedule

_FILE = "flatlora.pt"
_RUNNING: MutableMapping[Any, "EFMLoRA"] = WeakKeyDictionary()
"""By optimizer, the callback of its run: callbacks don't see each other."""
_REFUSED = {
    "DEEPSPEED": "accelerate steps DeepSpeed's engine within backward, where no callback sees the gradients",
    "FSDP": "FSDP has only been tested under Lightning",
    "MEGATRON_LM": "Megatron splits the factors and keeps gradients in buffers of its own",
    "XLA": "TPUs have not been tested",
}


_REMEDY = "use a trainer with transformers' own loop, which calls on_step_begin and on_pre_optimizer_step in each step"


class EFMLoRA(TrainerCallback):  # type: ignore[misc]
    """EFMLoRA as a callback of transformers' Trainer: one pass a step, on one device or under DDP.

    Forward and backward of a step read B + Ê; evaluation, generation and checkpoints come between the steps and see the
    clean weights. Each checkpoint gets a file ``flatlora.pt``, from which a resumed run continues.

    Args:
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        resume_from: the checkpoint that ``trainer.train(resume_from_checkpoint=...)`` gets, where it is not in the
            Trainer's ``output_dir``: transformers does not show its path to callbacks.
        settings: the other arguments of :class:`lightning_flatlora.EFMLoRA`, such as ``beta``.

    Attributes:
        loop: what drives the run, a :class:`lightning_flatlora.loops.EFMLoRA`; None before it starts.

    Raises:
        TypeError: an unknown setting.
        MisconfigurationException: values out of range; at the start of training, a model or a kind of training that
            can't work, or a checkpoint that is of another run or damaged.
        NoPairsError: at the start of training, the model trains no LoRA pair.

    Example:
        >>> callback = EFMLoRA(rho=0.05)  # Trainer(model, args, train_dataset=data, callbacks=[callback])
    """

    def __init__(self, rho: float | RhoSchedule, *, resume_from: str | Path | None = None, **settings: Any) -> None:
        self.loop: loops.EFMLoRA | None = None
        self._resume_from = resume_from
        self._settings = {"rho": rho, **settings}
        self._pass = ExitStack()
        self._check_settings()

    def _check_settings(self) -> None:
        others = {name: value for name, value in self._settings.items() if name != "beta"}
        try:
            arguments = inspect.signature(LoopMethod).bind(None, None, **others)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        arguments.apply_defaults()
        given = arguments.arguments
        names = ("rho", "start_step", "every_n_steps", "adapter_name", "finder")
        problems = checks.value_problems("rho", *(given[name] for name in names))
        beta = self._settings.get("beta", 1.0)
        checks.refuse(self, problems + checks.perturbation_problems(beta, given["estimator"], given["norm_scope"]))

    def __getattr__(self, name: str) -> NoReturn:
        # Lightning's Trainer asks for a hook that is not here, and the other EFMLoRA has the same name.
        raise AttributeError(
            f"{name!r} is no attribute of this EFMLoRA, a callback of transformers' Trainer: Lightning's takes "
            "lightning_flatlora.EFMLoRA"
        )

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        problem = _REFUSED.get(AcceleratorState().distributed_type.value)
        if args.n_gpu > 1:
            problem = "DataParallel copies the layers to other devices, without their perturbation"
        if is_sharded(model):  # transformers can also shard a model as it loads it
            problem = _REFUSED["FSDP"]
        if problem is not None:
            checks.refuse(self, [f"{problem}: use one device, or DDP, as torchrun starts it"])
        self._refuse_rival(optimizer, state)
        self.loop = loops.EFMLoRA(model, optimizer, **{"total_steps": state.max_steps or None, **self._settings})
        self.loop.remedy_of_steps = _REMEDY
        if state.global_step > 0:
            try:
                self._resume(args, state)
            except BaseException:
                self.close()
                raise

    def _refuse_rival(self, optimizer: Any, state: TrainerState) -> None:
        """Refuse a second callback of one run, which would silently take the layers over from the first."""
        other = _RUNNING.get(optimizer)
        _RUNNING[optimizer] = self
        # One that has taken steps already was left behind by a run that an exception has ended.
        if other is None or other.loop is None or other.loop.step != state.global_step:
            return
        names = [each._settings.get("adapter_name") for each in (self, other)]
        if None in names or names[0] == names[1]:
            checks.refuse(self, ["the Trainer has two EFMLoRA callbacks for the same weights: keep one"])

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.loop is not None
        self._complete_checkpoint(args, state, control)
        # One pass for a whole accumulation window: between its micro-batches nothing but on_substep_end comes.
        self._pass.enter_context(self.loop.training_pass())

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.loop is not None
        self._pass.close()
        self._complete_checkpoint(args, state, control)
        # The gradients are clipped here. Clipping by norm scales all of them, on which E does not depend.
        self.loop.before_step()

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.loop is not None
        if self.loop.step != state.global_step:
            problem = (
                f"at step {state.global_step} of this trainer, on_step_begin and on_pre_optimizer_step came for "
                f"{self.loop.step} steps, so the others were not perturbed: {_REMEDY}"
            )
            self.close()
            checks.refuse(self, [problem])
        self._complete_checkpoint(args, state, control)

    @override
    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self._pass.close()  # another callback may have stopped the epoch within a window

    @override
    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave no trace on the model's layers; to be called by hand only after an exception, which has no hook."""
        self._pass.close()
        if self.loop is not None:
            self.loop.close()
        for optimizer, running in list(_RUNNING.items()):
            if running is self:
                del _RUNNING[optimizer]

    # -- the state

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The checkpoints of a hyper-parameter search lie elsewhere, and nobody resumes from them.
        if self.loop is not None and args.should_save and not state.is_hyper_param_search:
            file = _folder(args, state) / _FILE
            # Written aside, so that no half of a file ever has its name.
            part = file.with_suffix(".part")
            torch.save({**self.loop.state_dict(), "norm_of_B": self._norm_of_B()}, part)
            os.replace(part, file)

    def _complete_checkpoint(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Add the file to a checkpoint that transformers has just saved on SIGTERM, of which on_save does not hear."""
        if control.should_training_stop and getattr(args, "enable_jit_checkpoint", False):
            folder = _folder(args, state)
            if folder.is_dir() and not (folder / _FILE).exists():
                self.on_save(args, state, control)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self.loop is not None
        folders = [_folder(args, state)]
        if self._resume_from is not None:
            folders = [Path(self._resume_from)]
        elif isinstance(args.resume_from_checkpoint, str):
            # The Trainer does not read it. Scripts hand it to train(), or ask for the last checkpoint in spite of it.
            folders.append(Path(args.resume_from_checkpoint))
        files = [folder / _FILE for folder in folders]
        problem = (
            f"this run is resumed, and {files[0]} does not exist: give the checkpoint as resume_from. One of a run "
            "without EFMLoRA has no such file and can't be resumed with it: load its adapter, and start a new run"
        )
        for file in files:
            if not file.is_file():
                continue
            try:
                saved = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                problem = f"{file} can't be read ({error}): delete its checkpoint, and resume from the one before"
                raise MisconfigurationException(checks.message(self, [problem])) from error
            if saved["step"] == state.global_step and math.isclose(saved["norm_of_B"], self._norm_of_B()):
                self.loop.load_state_dict(saved)
                return
            problem = f"{file} is not of the checkpoint that is resumed: give that one as resume_from"
        checks.refuse(self, [problem])

    def _norm_of_B(self) -> float:
        """The norm of all B, by which a checkpoint knows the weights that its perturbation belongs to."""
        if self.loop is None or self.loop.perturbation is None:
            return 0.0
        norms = [pair.B.detach().double().norm() for pair in self.loop.perturbation.pairs]
        return float(torch.stack(norms).norm())


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where transformers keeps the checkpoint of the current step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
