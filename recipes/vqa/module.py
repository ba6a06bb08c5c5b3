"""The LightningModules: one for every method that is a callback, one for FMLoRA in manual optimization."""

from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora import FMLoRAModule
from recipes.instruction_tuning.batches import Batch
from recipes.instruction_tuning.model import DType, add_adapter, answer_log_likelihood
from recipes.instruction_tuning.module import LanguageModel, Schedule
from recipes.sharding import check_strategy, shard
from recipes.vqa.metrics import AnswerMetrics
from recipes.vqa.model import generate_answers, load_base, load_processor, model_source


class VisionLanguageModel(LanguageModel):
    """A generative vision-language model with LoRA: training by any method, evaluation and prediction.

    Args:
        model: a Hub name, a local directory, or "packaged" for the model of ``python -m recipes.vqa.offline``.
        lora: fields of peft's LoraConfig; None trains all weights, which are then in float32.
        dtype: of the frozen weights, "auto" as in the checkpoint; None is bfloat16 where the Trainer's precision is
            "bf16-mixed", else float32. The adapter is always in float32.
        learning_rate: AdamW's largest learning rate.
        weight_decay: AdamW's, on what is trained.
        schedule: the learning rate after warm-up: "linear" or "cosine" to 0, or "constant_with_warmup".
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        max_new_tokens: tokens of a generated answer.
        validation_answers: questions that one validation answers and compares, the first ones; 0 answers none. Testing
            answers all.
        kwargs: of the next class, for FMLoRA's module its rho and others.

    Raises:
        MisconfigurationException: all weights are to be trained, in another dtype than float32.
    """

    def __init__(
        self,
        model: str = "packaged",
        lora: dict[str, Any] | None = None,
        dtype: DType | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Schedule = "linear",
        warmup_steps: int = 0,
        max_new_tokens: int = 16,
        validation_answers: int = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=model,
            lora=lora,
            dtype="float32" if lora is None and dtype is None else dtype,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_steps=warmup_steps,
            max_new_tokens=max_new_tokens,
            **kwargs,
        )
        if lora is None and dtype not in (None, "float32"):
            raise MisconfigurationException(
                f"lora=null trains all weights, which needs dtype='float32', got {dtype!r}: leave it out, or give lora"
            )
        self.trains_all = lora is None
        self.validation_answers = validation_answers
        self.metrics = nn.ModuleDict({stage: AnswerMetrics() for stage in ("val", "test")})

    @cached_property
    def processor(self) -> Any:
        """The model's processor; the data module takes it from here."""
        return load_processor(self.model_name)

    @override
    def prepare_data(self) -> None:
        model_source(self.model_name)

    @override
    def configure_model(self) -> None:
        if self._trainer is not None:
            check_strategy(self.trainer.strategy, lora=self.lora)
        if self.net is None:
            base = load_base(self.model_name, self.weights_dtype())
            self.net = cast("Any", base) if self.trains_all else add_adapter(base, self.lora)
        if self.device_mesh is not None:  # FSDP2; FSDP1 wraps the whole module later, by its policy
            shard(self.net, self.device_mesh["data_parallel"], methods=["generate"])

    @override
    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood per answer token, in nats; logged as ``train_loss``."""
        log_likelihood, tokens = self.log_likelihood(batch)
        loss = -log_likelihood.sum() / tokens.sum()
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(tokens))
        return loss

    @override
    def log_likelihood(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each row's answer: log-likelihood in nats and number of tokens, each (rows,)."""
        assert self.net is not None  # configure_model comes first
        return answer_log_likelihood(self.net, batch["inputs"], batch["labels"])

    @override
    def _evaluate(self, stage: str, batch: Batch) -> None:
        metrics = cast("AnswerMetrics", self.metrics[stage])
        metrics.update_loss(*self.log_likelihood(batch))
        left = len(batch["answers"]) if stage == "test" else self.validation_answers - metrics.compared
        if left > 0:
            self._compare(metrics, batch, None if stage == "test" else left)

    def _compare(self, metrics: AnswerMetrics, batch: Batch, left: int | None) -> None:
        """Generate on all ranks, which sharded models need, and compare the first ``left`` of all ranks' answers."""
        counts = cast("Tensor", self.all_gather(torch.tensor(len(batch["answers"]), device=self.device))).flatten()
        before = int(counts[: self.global_rank].sum())
        first = None if left is None else max(left - before, 0)
        given = self.answers(batch["prompts"])
        asked = (batch[name][:first] for name in ("answers", "types", "choices"))
        metrics.update_answers(given[:first], *asked)
        metrics.compared += int(counts.sum())

    @override
    def _metrics(self, stage: str) -> Any:
        return self.metrics[stage]

    def answers(self, prompts: dict[str, Tensor]) -> list[str]:
        """Answers to encoded prompts, each token the most likely one."""
        assert self.net is not None
        return generate_answers(self.net, prompts, self.processor.tokenizer, self.max_new_tokens, self.answer_end())

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        answers = self.answers(batch["prompts"])
        asked = zip(batch["image"], batch["question"], answers, strict=True)
        return [{"image": image, "prompt": question, "answer": answer} for image, question, answer in asked]


class VQA(VisionLanguageModel):
    """Automatic optimization: plain LoRA or all weights, or with EFMLoRA or FMLoRA among the Trainer's callbacks."""

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)


class VQAFM(VisionLanguageModel, FMLoRAModule):
    """FMLoRA in manual optimization; accumulation and clipping are arguments here, not of the Trainer."""

    @override
    def compute_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)
