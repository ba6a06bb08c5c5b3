"""LightningModules of pretrained models with LoRA: what training by any method and evaluation have in common."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from typing_extensions import override

from recipes.language.batches import Batch
from recipes.language.evaluation import EvaluationMetrics
from recipes.language.model import (
    DEFAULT_LORA,
    PACKAGED,
    DType,
    Quantization,
    add_adapter,
    answer_log_likelihood,
    checkpoint_activations,
    generate_answers,
    given_model,
    load_base,
    load_tokenizer,
    model_source,
    positions,
    weights_dtype,
)
from recipes.language.packing import check_packing
from recipes.shared.predictions import PredictionWriter
from recipes.shared.sharding import check_strategy, shard
from recipes.shared.training import EvaluatedModule, RecipeModule, Schedule


class PretrainedModel(RecipeModule):
    """A pretrained model of texts with LoRA, whatever it is trained on.

    Args:
        model: a Hub name, a local directory, or a packaged model; it has to be given.
        lora: fields of peft's LoraConfig; None is rank 8, alpha 16 on all linear layers except the head.
        learning_rate: AdamW's largest learning rate.
        weight_decay: AdamW's, on what is trained.
        schedule: the learning rate after warm-up: "linear" or "cosine" to 0, or "constant_with_warmup".
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        warmup_share: the same as a share of all steps; the longer of the two counts.
        kwargs: of the next class, for FMLoRA's module its rho and others.
    """

    packaged_model = PACKAGED
    quantization: Quantization | None = None
    gradient_checkpointing = False
    max_new_tokens = 0

    def __init__(
        self,
        model: str | None = None,
        lora: dict[str, Any] | None = None,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        schedule: Schedule = "linear",
        warmup_steps: int = 0,
        warmup_share: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = given_model(model, self.packaged_model)
        self.lora = DEFAULT_LORA if lora is None else lora
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.warmup_share = warmup_share
        self.net: PeftModel | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; the data module takes it from here."""
        return load_tokenizer(self.model_name)

    @override
    def prepare_data(self) -> None:
        model_source(self.model_name)  # converts a packaged model on one process, before all load it

    @override
    def configure_model(self) -> None:
        if self._trainer is not None:
            check_strategy(self.trainer.strategy, self.quantization, self.lora)
        # Lightning calls this before every stage, and a second adapter must not go into the first.
        if self.net is None:
            self.net = self.load_net()
            if self.gradient_checkpointing:
                checkpoint_activations(self.net)
        self._check_lengths(self.net)
        if self.device_mesh is not None:  # FSDP2; FSDP1 wraps the whole module later, by its policy
            methods = ["generate"] if hasattr(self.net, "generate") else []
            shard(self.net, self.device_mesh["data_parallel"], methods=methods)

    def load_net(self) -> PeftModel:
        """The pretrained model with a new adapter."""
        raise NotImplementedError

    def weights_dtype(self) -> DType:
        """Of the frozen weights, by what the Trainer computes in."""
        return weights_dtype(None if self._trainer is None else self.trainer.precision)

    def readable_tokens(self, net: PeftModel) -> int | None:
        """The most tokens of a text; None where there is no bound."""
        return positions(net)

    def writes_answers(self) -> bool:
        """Whether this stage generates answers to the data's prompts."""
        return False

    def _check_lengths(self, net: PeftModel) -> None:
        """Refuse texts that are longer than the model can read."""
        data: Any = getattr(self._trainer, "datamodule", None)
        places = self.readable_tokens(net)
        # A user's own data module need not say how long its texts are.
        if places is None or not hasattr(data, "longest"):
            return
        row, prompt = data.longest()
        written = prompt + self.max_new_tokens if prompt and self.writes_answers() else 0
        if max(row, written) > places:
            more = f", and the longest prompt with max_new_tokens={self.max_new_tokens} {written}" if written else ""
            raise MisconfigurationException(
                f"model={self.model_name!r} reads {places} tokens. The longest text has {row}{more}: set "
                "data.max_length or max_new_tokens lower, or take another model"
            )


class LanguageModel(PretrainedModel, EvaluatedModule):
    """A causal language model with LoRA: what training by any method, evaluation and prediction have in common.

    Args:
        model: a Hub name, a local directory, or "packaged" for SmolLM2-135M-Instruct.
        dtype: of the frozen weights, "auto" as in the checkpoint; None is bfloat16 where the Trainer's precision is
            "bf16-mixed", else float32. The adapter is always in float32.
        quantization: hold the frozen weights in "4bit" or "8bit" (needs bitsandbytes).
        betas: AdamW's.
        gradient_checkpointing: compute each block's activations again in backward instead of keeping them: larger
            batches in the same memory, for a third more time.
        max_new_tokens: tokens of a generated answer.
        exact_match_examples: free answers generated and compared in one evaluation; 0 generates none.
        kwargs: of the next class: the model and the optimizer's settings.
    """

    label_smoothing = 0.0  # of the loss of training alone

    def __init__(
        self,
        dtype: DType | None = None,
        quantization: Quantization | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 64,
        exact_match_examples: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.dtype_name = dtype
        self.quantization = quantization
        self.betas = betas
        self.gradient_checkpointing = gradient_checkpointing
        self.max_new_tokens = max_new_tokens
        self.exact_match_examples = exact_match_examples
        self.metrics = torch.nn.ModuleDict({stage: EvaluationMetrics() for stage in ("val", "test")})

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "packing", False):
            assert self.net is not None  # configure_model comes first
            if isinstance(self.trainer.strategy.model, FullyShardedDataParallel):
                raise MisconfigurationException("packing can't be tried under FSDP1: take FSDP2, or set it to false")
            with self.trainer.precision_plugin.forward_context():
                check_packing(self.net, min(data.batch_size, 2), self.device)

    @override
    def writes_answers(self) -> bool:
        return self.exact_match_examples > 0 or self.trainer.state.fn == TrainerFn.PREDICTING

    @override
    def load_net(self) -> PeftModel:
        return add_adapter(load_base(self.model_name, self.weights_dtype(), self.quantization), self.lora)

    @override
    def weights_dtype(self) -> DType:
        return super().weights_dtype() if self.dtype_name is None else self.dtype_name

    @override
    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood per answer token, in nats; logged as ``train_loss``."""
        log_likelihood, tokens = self.log_likelihood(batch, self.label_smoothing)
        loss = -log_likelihood.sum() / tokens.sum()
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(tokens))
        return loss

    def log_likelihood(self, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Each row's answer: log-likelihood in nats and number of tokens, each (rows,)."""
        assert self.net is not None  # configure_model comes first
        # Packed rows have position_ids, and no attention mask, which would hide them from transformers.
        inputs: dict[str, Tensor] = {}
        for name in ("input_ids", "attention_mask", "position_ids"):
            if name in batch:
                inputs[name] = batch[name]
        return answer_log_likelihood(self.net, inputs, batch["labels"], label_smoothing)

    @override
    def evaluate(self, stage: str, batch: Batch) -> None:
        metrics = cast("EvaluationMetrics", self.metrics[stage])
        log_likelihood, tokens = self.log_likelihood(batch)
        metrics.update_loss(log_likelihood[batch["gold"]], tokens[batch["gold"]])
        metrics.update_choices(log_likelihood / tokens, batch)
        self._compare_free_answers(metrics, batch)

    @override
    def log_evaluation(self, stage: str) -> None:
        metrics: Any = self.metrics[stage]
        metrics.log(self, stage)

    def _compare_free_answers(self, metrics: EvaluationMetrics, batch: Batch) -> None:
        """Generate, on all ranks or none, until the data's first ``exact_match_examples`` are done."""
        left = self.exact_match_examples - metrics.compared
        if left <= 0:
            return
        free = [(ids, answer) for ids, answer in zip(batch["prompt_ids"], batch["answers"], strict=True) if answer]
        counts = cast("Tensor", self.all_gather(torch.tensor(len(free), device=self.device))).flatten().tolist()
        # Ranks without answers of their own take part: where the model is sharded, generating needs all.
        if sum(counts):
            # Lower ranks come first, as if one process had read the ranks' batches one after another.
            mine = free[: max(left - sum(counts[: self.global_rank]), 0)]
            answers = self.generate([ids for ids, _ in mine])
            metrics.update_exact_match(answers, [answer for _, answer in mine])
            metrics.compared += sum(counts)

    def answer_end(self) -> str:
        """What the data's chat template ends an answer with, if it is not the tokenizer's end token; else ""."""
        # A user's own data module need not have an encoder.
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
        return [*inherited, PredictionWriter("answers.jsonl", "prompts", shows=True)]
