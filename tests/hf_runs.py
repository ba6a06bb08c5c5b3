"""Runs by transformers' Trainer, of the network that is also trained by Lightning's Trainer."""

from pathlib import Path
from typing import Any

import torch
from float64_runs import BETA, dataset, network, optimizer_of, trained
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lightning_flatlora.transformers import EFMLoRA, FMLoRA, TwoPassTrainer

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


def callback_of(name: str, rho: Any = RHO) -> Any:
    return EFMLoRA(rho, beta=BETA) if name == "EFMLoRA" else FMLoRA(rho)


def trained_by(name: str, folder: Path, resume: Any = None, rho: Any = RHO, **settings: Any) -> tuple[Any, Any]:
    """Train with a callback; returns the trainer and the method's object."""
    trainer = trainer_of(folder, kind=TwoPassTrainer if name == "FMLoRA" else Trainer, **settings)
    callback = callback_of(name, rho)
    trainer.add_callback(callback)
    callback.on_init_end(trainer.args, trainer.state, trainer.control)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback.flat


def on_two_ranks(folder: str, name: str, window: int = 1) -> dict[str, Any]:
    """This rank's trained weights and E, under the DDP that transformers starts."""
    settings = {"per_device_train_batch_size": SIZE // 2, "gradient_accumulation_steps": window}
    trainer, flat = trained_by(name, Path(folder), ddp_backend="gloo", **settings)
    return {
        "weights": trained(trainer.model.net),
        "E": flat.perturbation.state_dict()["E"],
        "wrapped": type(trainer.model_wrapped).__name__,
    }


# -- a language model


WORDS = ["<pad>", "</s>", *(f"w{index}" for index in range(40))]


def tokenizer_of_words() -> Any:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


def llama(num_labels: int | None = None) -> Any:
    """A language model, or a classifier."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, **sizes)
    if num_labels is None:
        return LlamaForCausalLM(config).double()
    config.num_labels = num_labels
    return LlamaForSequenceClassification(config).double()


def processing_of_words() -> Any:
    own = {"eos_token": "</s>", "pad_token": "<pad>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer_of_words(), **own)


def arguments(folder: Path, kind: type[Any] = TrainingArguments, **settings: Any) -> Any:
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "bf16": False}
    return kind(str(folder), **{"learning_rate": 0.01, **quiet, **settings})
