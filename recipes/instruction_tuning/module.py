"""The LightningModules: one for every method that is a callback, one for FMLoRA in manual optimization."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, cast

import lightning as L
import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from typing_extensions import override

from lightning_flatlora import FMLoRAModule
from recipes.instruction_tuning.batches import Batch
from recipes.instruction_tuning.evaluation import AnswerWriter, EvaluationMetrics
from recipes.instruction_tuning.model import (
    DEFAULT_LORA,
    DType,
    Quantization,
    add_adapter,
    answer_log_likelihood,
    generate_answers,
    load_base,
    load_tokenizer,
    model_source,
    weights_dtype,
)
from recipes.sharding import check_strategy, shard
from recipes.training import RecipeModule

Schedule = Literal["linear", "cosine", "constant_with_warmup"]


class LanguageModel(RecipeModule):
    """A causal language model with LoRA: what training by any method, evaluation and prediction have in common.

    Args:
        model: a Hub name, a local directory, or "packaged" for SmolLM2-135M-Instruct.
        lora: fields of peft's LoraConfig; None is rank 8, alpha 16 on q_proj and v_proj.
        dtype: of the frozen weights, "auto" as in the checkpoint; None is bfloat16 where the Trainer's precision is
            "bf16-mixed", else float32. The adapter is always in float32.
        quantization: hold the frozen weights in "4bit" or "8bit" (needs bitsandbytes).
        learning_rate: AdamW's largest learning rate.
        weight_decay: AdamW's, on the adapter.
        schedule: the learning rate after warm-up: "linear" or "cosine" to 0, or "constant_with_warmup".
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        max_new_tokens: tokens of a generated answer.
        exact_match_examples: free answers generated and compared in one evaluation; 0 generates none.
        kwargs: of the next class, for FMLoRA's module its rho and others.
    """

    def __init__(
        self,
        model: str = "packaged",
        lora: dict[str, Any] | None = None,
        dtype: DType | None = None,
        quantization: Quantization | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Schedule = "linear",
        warmup_steps: int = 0,
        max_new_tokens: int = 64,
        exact_match_examples: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model
        self.lora = DEFAULT_LORA if lora is None else lora
        self.dtype_name = dtype
        self.quantization = quantization
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.max_new_tokens = max_new_tokens
        self.exact_match_examples = exact_match_examples
        self.net: PeftModel | None = None
        self.metrics = torch.nn.ModuleDict({stage: EvaluationMetrics() for stage in ("val", "test")})

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; the data module takes it from here."""
        return load_tokenizer(self.model_name)

    @override
    def prepare_data(self) -> None:
        model_source(self.model_name)  # converts the packaged model on one process, before all load it

    @override
    def configure_model(self) -> None:
        if self._trainer is not None:
            check_strategy(self.trainer.strategy, self.quantization, self.lora)
        if self.net is None:
            self.net = add_adapter(load_base(self.model_name, self.weights_dtype(), self.quantization), self.lora)
        if self.device_mesh is not None:  # FSDP2; FSDP1 wraps the whole module later, by its policy
            shard(self.net, self.device_mesh["data_parallel"], methods=["generate"])

    def weights_dtype(self) -> DType:
        """Of the frozen weights: as given, or as the Trainer computes."""
        if self.dtype_name is not None:
            return self.dtype_name
        return weights_dtype(None if self._trainer is None else self.trainer.precision)

    @override
    def own_schedule(self, optimizer: Optimizer) -> LRScheduler:
        scheduler = get_scheduler(self.schedule, optimizer, self.warmup_steps, self.optimizer_steps())
        return cast("LRScheduler", scheduler)

    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood per answer token, in nats; logged as ``train_loss``."""
        log_likelihood, tokens = self.log_likelihood(batch)
        loss = -log_likelihood.sum() / tokens.sum()
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["options"]))
        return loss

    def log_likelihood(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each row's answer: log-likelihood in nats and number of tokens, each (rows,)."""
        assert self.net is not None  # configure_model comes first
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return answer_log_likelihood(self.net, inputs, batch["labels"])

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        metrics = self._metrics(stage)
        log_likelihood, tokens = self.log_likelihood(batch)
        metrics.update_loss(log_likelihood[batch["gold"]], tokens[batch["gold"]])
        metrics.update_choices(log_likelihood / tokens, batch)
        self._compare_free_answers(metrics, batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self._metrics("val").log(self, "val")

    @override
    def on_test_epoch_end(self) -> None:
        self._metrics("test").log(self, "test")

    def _metrics(self, stage: str) -> EvaluationMetrics:
        return cast("EvaluationMetrics", self.metrics[stage])

    def _compare_free_answers(self, metrics: EvaluationMetrics, batch: Batch) -> None:
        """Generate, on all ranks or none, until the data's first ``exact_match_examples`` are done."""
        left = self.exact_match_examples - metrics.compared
        if left <= 0:
            return
        free = [(ids, answer) for ids, answer in zip(batch["prompt_ids"], batch["answers"], strict=True) if answer]
        counts = cast("Tensor", self.all_gather(torch.tensor(len(free), device=self.device))).flatten().tolist()
        if sum(counts):
            mine = free[: max(left - sum(counts[: self.global_rank]), 0)]
            answers = self.generate([ids for ids, _ in mine])
            metrics.update_exact_match(answers, [answer for _, answer in mine])
            metrics.compared += sum(counts)

    def answer_end(self) -> str:
        """What the data's chat template ends an answer with, if it is not the tokenizer's end token; else ""."""
        data = getattr(self._trainer, "datamodule", None)
        return str(getattr(getattr(data, "encoder", None), "answer_end", ""))

    def generate(self, prompt_ids: list[list[int]]) -> list[str]:
        """Answers to encoded prompts, each token the most likely one."""
        assert self.net is not None
        return generate_answers(self.net, prompt_ids, self.tokenizer, self.max_new_tokens, self.answer_end())

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        answers = self.generate(batch["prompt_ids"])
        return [{"prompt": p, "answer": a} for p, a in zip(batch["prompt"], answers, strict=True)]

    @override
    def configure_callbacks(self) -> list[L.Callback]:
        inherited = cast("Sequence[L.Callback]", super().configure_callbacks())  # FMLoRAModule has one
        return [*inherited, AnswerWriter()]


class InstructionTuning(LanguageModel):
    """Automatic optimization: plain LoRA, or with EFMLoRA or FMLoRA among the Trainer's callbacks."""

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)


class InstructionTuningFM(LanguageModel, FMLoRAModule):
    """FMLoRA in manual optimization; accumulation and clipping are arguments here, not of the Trainer."""

    @override
    def compute_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)
