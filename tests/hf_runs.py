"""Runs by transformers' Trainer, of the network that is also trained by Lightning's Trainer."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from float64_runs import BETA, dataset, network, optimizer_of, trained
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lightning_flatlora.loops import EFMLoRA, FMLoRA

RHO, SIZE = 0.3, 4


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        self.x, self.y = (tensor[:count] for tensor in dataset().tensors)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class Model(nn.Module):
    """The network, with the call signature of transformers' models."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Seeds(TrainerCallback):  # type: ignore[misc]
    """Seeds each optimizer step by its number."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(state.global_step)


def trainer_of(
    folder: Path,
    net: nn.Module | None = None,
    steps: int = 8,
    kind: type[Any] = Trainer,
    data: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Make a quiet Trainer on CPU processes, with the samples in their order."""
    net = network() if net is None else net
    settings = {
        "per_device_train_batch_size": SIZE,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        **settings,
    }
    args = TrainingArguments(str(folder), max_steps=steps, **settings)
    optimizer = optimizer_of(net)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    both = (optimizer, constant)
    data = {"train_dataset": Samples(steps * args.gradient_accumulation_steps * SIZE), **(data or {})}
    return kind(Model(net), args, callbacks=[Seeds()], optimizers=both, **data)


class TwoPasses(Trainer):  # type: ignore[misc]
    """transformers' Trainer with FMLoRA, as on docs/other_loops.md."""

    flat: FMLoRA

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
        model.train()
        inputs = self._prepare_inputs(inputs)
        self._prepare_inputs, losses = dict, []
        try:
            for each_pass in self.flat.training_passes():
                with each_pass:
                    losses.append(super().training_step(model, inputs, *args))
        finally:
            del self._prepare_inputs
        return losses[0]


def trained_by(name: str, folder: Path, resume: str | None = None, rho: Any = RHO, **settings: Any) -> tuple[Any, Any]:
    """Train with a method; returns the trainer and the method's object."""
    if name == "FMLoRA":
        trainer = trainer_of(folder, kind=TwoPasses, **settings)
        method: Any = FMLoRA
    else:
        trainer = trainer_of(folder, **settings)
        method = partial(EFMLoRA, beta=BETA)
    flat = method(trainer.model, trainer.create_optimizer(), rho, total_steps=trainer.args.max_steps)
    trainer.flat = flat
    trainer.train(resume_from_checkpoint=resume)
    return trainer, flat


def on_two_ranks(folder: str, name: str, window: int = 1) -> dict[str, Any]:
    """This rank's trained weights and E, under the DDP that transformers starts."""
    settings = {"per_device_train_batch_size": SIZE // 2, "gradient_accumulation_steps": window}
    trainer, flat = trained_by(name, Path(folder), ddp_backend="gloo", **settings)
    return {
        "weights": trained(trainer.model.net),
        "E": flat.perturbation.state_dict()["E"],
        "wrapped": type(trainer.model_wrapped).__name__,
    }
