"""The base class of all recipes' LightningModules."""

import math
import reprlib
from copy import deepcopy
from itertools import dropwhile
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI, instantiate_class
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from typing_extensions import override

from recipes.data.resumable import ResumableData
from recipes.training.predictions import PredictionWriter
from recipes.training.sharding import check_strategy, shard

Schedule = Literal["linear", "cosine", "constant_with_warmup"]

BARE: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
"""Arguments of a Trainer for programs that write their own results."""
_SCHEDULE = "--lr_scheduler"
_FEW = 20
"""A fit with fewer optimizer steps warns that these are few."""


def refuse_paths_outside(checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint whose savers name, and would delete, files outside its run.

    Raises:
        MisconfigurationException: there is such a path.
    """
    paths: list[str] = []
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict):
            paths += [str(value) for name, value in state.items() if str(name).endswith("_model_path")]
            paths += map(str, state.get("best_k_models") or ())
    for path in paths:
        inner = dropwhile(lambda part: part == "..", Path(path).parts)
        if ".." in inner or "://" in path:
            raise MisconfigurationException(f"the checkpoint names another checkpoint of its run as {path!r}")


class RecipeModule(L.LightningModule):
    """A model with LoRA, trained with a loss; validation and test are the same under two names.

    A recipe defines :meth:`load_net`, :meth:`loss`, :meth:`evaluate` and :meth:`log_evaluation`. It trains with AdamW
    and a schedule that spans the run, unless others are chosen, and clips by norm under FSDP1 too.

    Args:
        learning_rate: AdamW's largest learning rate.
        weight_decay: AdamW's, on what is trained.
        betas: AdamW's decay rates for the averages of the gradient and of its square.
        eps: AdamW's, added to the root of the average square.
        schedule: the learning rate after warm-up: "linear" or "cosine" to 0, or "constant_with_warmup".
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        warmup_share: warm-up as a share of the run's steps; the longer of the two counts.
        kwargs: passed to the next class; a recipe's module may come before an FMLoRAModule.

    Attributes:
        net: the model, which :meth:`configure_model` loads.
        lora: fields of peft's LoraConfig.
        quantization: the format of the frozen weights.
        writer: writes the file of predictions; None if nothing is predicted.
        task: the Hub's name of the model's task.
        adapter_card: what AdapterCheckpoint writes as README.md next to the adapter; None leaves that to peft.
        chosen_optimizer: replaces AdamW, as LightningCLI gives it: ``class_path`` and ``init_args``. It gets the
            same parameters; ``learning_rate``, ``weight_decay``, ``betas`` and ``eps`` have no effect then.
        chosen_scheduler: replaces the recipe's schedule, in the same form; LightningCLI has it stepped every epoch.
    """

    lora: Any = None
    quantization: str | None = None
    writer: PredictionWriter | None = None
    task: str | None = None
    adapter_card: str | None = None
    chosen_optimizer: Any = None
    chosen_scheduler: Any = None
    _cut: Any = None
    """The fit loop's state at the step at which the run was stopped within an epoch."""

    def __init__(
        self,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: Schedule = "linear",
        warmup_steps: int = 0,
        warmup_share: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps
        self.warmup_share = warmup_share
        self.net: Any = None

    # -- the model

    def load_net(self) -> Any:
        """Return the pretrained model with a new adapter."""
        raise NotImplementedError

    @override
    def configure_model(self) -> None:
        if self._trainer is not None:
            check_strategy(self.trainer.strategy, self.quantization, self.lora)
        # Lightning calls this before every stage, and a second adapter must not go into the first.
        if self.net is None:
            self.net = self.load_net()
        if self.device_mesh is not None:  # FSDP2; FSDP1 wraps the whole module later, by its policy
            shard(self.net, self.device_mesh["data_parallel"])

    def must_fit(self) -> dict[str, Any]:
        """Return, by name, what must match a checkpoint's run; known once the model is loaded."""
        return {}

    @override
    def configure_callbacks(self) -> list[L.Callback]:
        inherited: Any = super().configure_callbacks()  # FMLoRAModule has one
        writers = [self.writer] if self.writer else []
        return [*inherited, *writers]

    # -- training

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch, shape (); logged as ``train_loss``."""
        raise NotImplementedError

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        steps = self.trainer.estimated_stepping_batches
        if self.trainer.global_step > steps and not self.chosen_scheduler:
            raise MisconfigurationException(
                f"this run resumes at step {self.trainer.global_step}, but has {steps} steps with the batch size, "
                "devices and accumulation given now, so its learning rate would be 0: resume with those of its start"
            )
        if isinstance(self.net, PeftModel):
            lora = self.net.active_peft_config
            settings = f"rank {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout}"
            rank_zero_info(f"LoRA of {settings} on {len(self.net.base_model.targeted_module_names)} layers")
        self._tell_size(steps)

    def _tell_size(self, steps: float) -> None:
        """Print the number of optimizer steps and of examples in each part of the data; warn of few steps."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ResumableData) and self.trainer.is_global_zero:
            rank_zero_info(f"Data: {data.sizes()}")
        done = f", {self.trainer.global_step} of them done" if self.trainer.global_step else ""
        rank_zero_info(f"{'No limit of' if math.isinf(steps) else steps} optimizer steps{done}")
        if steps < _FEW and not getattr(self.trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"Only {steps} optimizer steps, in which little is learned: lower --data.batch_size or "
                "--trainer.accumulate_grad_batches, or raise --trainer.max_epochs or --trainer.max_steps"
            )

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        is_cut = self.trainer.should_stop and not self.trainer.is_last_batch
        self._cut = deepcopy(self.trainer.fit_loop.state_dict()) if is_cut else None

    def recipe_schedule(self, optimizer: Optimizer) -> LRScheduler:
        """Return the default schedule, which is stepped with every optimizer step."""
        steps = self.optimizer_steps()
        warmup_steps = max(self.warmup_steps, math.ceil(self.warmup_share * steps))
        return cast("LRScheduler", get_scheduler(self.schedule, optimizer, warmup_steps, steps))

    def parameter_groups(self) -> list[Any]:
        """Return the trained parameters for the optimizer, or groups of them."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def new_optimizer(self) -> Optimizer:
        """Return the chosen optimizer, or AdamW."""
        groups = self.parameter_groups()
        if self.chosen_optimizer:
            # LightningCLI has checked it but built nothing, since the parameters exist only now.
            return cast("Optimizer", instantiate_class(groups, self.chosen_optimizer))
        return torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.new_optimizer()
        if not self.chosen_scheduler:
            config = {"scheduler": self.recipe_schedule(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": config}
        return LightningCLI.configure_optimizers(self, optimizer, instantiate_class(optimizer, self.chosen_scheduler))

    def optimizer_steps(self) -> int:
        """Return the optimizer steps of the whole run, for ``configure_optimizers``.

        Raises:
            MisconfigurationException: the run has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise MisconfigurationException(
                "the learning rate's schedule spreads over the run, which has no end: set max_steps or max_epochs"
            )
        return int(steps)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        model = self.trainer.strategy.model
        # A rank holds part of the gradients: it can clip each value, but does not know the norm of all.
        if isinstance(model, FullyShardedDataParallel) and gradient_clip_val and gradient_clip_algorithm != "value":
            model.clip_grad_norm_(gradient_clip_val)  # over all ranks; Lightning refuses it
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # -- checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["must_fit"] = self._all_that_must_fit()
        if self._cut is not None:
            # After a stop by max_time Lightning counts the epoch as done: resuming would leave out the rest of it.
            checkpoint["loops"]["fit_loop"] = self._cut

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or other classes, resuming under another schedule, and paths outside.

        Raises:
            MisconfigurationException: it is such a checkpoint.
        """
        super().on_load_checkpoint(checkpoint)
        refuse_paths_outside(checkpoint)
        if self._trainer is None:  # without a Trainer there is no data, and so no classes
            return
        now = self._all_that_must_fit()
        differences = []
        for name, before in checkpoint.get("must_fit", {}).items():
            is_asked = name != _SCHEDULE or self.trainer.state.fn == TrainerFn.FITTING
            if is_asked and before != now.get(name):
                differences.append(f"{name}: {_difference(before, now.get(name))}")
        if differences:
            raise MisconfigurationException(
                f"the checkpoint is of a run on something else ({'; '.join(differences)}): give the model, the data "
                "and the schedule of that run"
            )

    def _all_that_must_fit(self) -> dict[str, Any]:
        chosen = self.chosen_scheduler["class_path"] if self.chosen_scheduler else None
        return {**self.must_fit(), _SCHEDULE: chosen}

    # -- validation and test

    def evaluate(self, stage: str, batch: Any) -> None:
        """Update the metrics of "val" or "test" with a batch."""
        raise NotImplementedError

    def log_evaluation(self, stage: str) -> None:
        """Log the metrics at the end of "val" or "test", and reset them; every rank calls it."""
        raise NotImplementedError

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate("val", batch)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate("test", batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self.log_evaluation("val")

    @override
    def on_test_epoch_end(self) -> None:
        self.log_evaluation("test")


def _difference(before: Any, now: Any) -> str:
    """Return two values in short; for lists only the elements that differ, unless only their order does.

    Example:
        >>> _difference(["cat", "dog", "fish"], ["cat", "bird", "fish"])
        "['dog'] there, ['bird'] here"
    """
    if isinstance(before, list) and isinstance(now, list) and set(before) != set(now):
        before, now = [one for one in before if one not in now], [one for one in now if one not in before]
    return f"{reprlib.repr(before)} there, {reprlib.repr(now)} here"
