"""The base classes of LightningModules for pretrained models with LoRA: training by any method, and evaluation."""

from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from typing_extensions import override

from recipes.data.text_metrics import is_same
from recipes.language.batches import Batch
from recipes.language.evaluation import Means, right_choices
from recipes.language.model import (
    DEFAULT_LORA,
    DTYPES,
    PACKAGED,
    DType,
    Quantization,
    add_adapter,
    answer_log_likelihood,
    checkpoint_activations,
    generate_answers,
    load_base,
    load_tokenizer,
    model_source,
    positions,
)
from recipes.language.packing import check_packing
from recipes.language.warm_start import load_factors
from recipes.training.module import RecipeModule
from recipes.training.predictions import PredictionWriter
from recipes.training.ranks import gathered


class PretrainedModel(RecipeModule):
    """A pretrained model of texts with LoRA, for any task.

    Args:
        model: a Hub name, a local directory, or a packaged model; required.
        lora: fields of peft's LoraConfig; None is rank 8, alpha 16 on all linear layers except the head.
        kwargs: the optimizer's settings, see :class:`recipes.training.module.RecipeModule`.

    Attributes:
        start_from: folder of another run's adapter, whose LoRA weights a fit starts from.
    """

    packaged_model = PACKAGED
    gradient_checkpointing = False
    max_new_tokens = 0
    start_from: str | None = None

    def __init__(self, model: str | None = None, lora: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if model is None:
            raise MisconfigurationException(
                f"no model: give a name on the Hub or a folder as --model.model, or {self.packaged_model!r} for a "
                "small one from a package"
            )
        self.model_name = model
        self.lora = DEFAULT_LORA if lora is None else lora

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; the data module takes it from here."""
        return load_tokenizer(self.model_name)

    @override
    def prepare_data(self) -> None:
        model_source(self.model_name)  # converts a packaged model on one process, before all load it

    @override
    def configure_model(self) -> None:
        super().configure_model()
        self._check_lengths()

    @override
    def load_net(self) -> Any:
        net = self.load_adapted()
        if self.gradient_checkpointing:
            checkpoint_activations(net)
        # In an evaluation the checkpoint brings the weights. In a fit the trainer does not know its checkpoint yet.
        if self.start_from is not None and self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            load_factors(net, self.start_from)
        return net

    def load_adapted(self) -> Any:
        """Return the pretrained model with a new adapter."""
        raise NotImplementedError

    def weights_dtype(self) -> DType:
        """Return the frozen weights' dtype, by the Trainer's precision."""
        return "float32" if self._trainer is None else DTYPES.get(str(self.trainer.precision), "float32")

    def readable_tokens(self) -> int | None:
        """Return how many tokens of a text the model can read; None without a limit."""
        return positions(self.net)

    def writes_answers(self) -> bool:
        """Return whether this stage generates answers to the data's prompts."""
        return False

    def _check_lengths(self) -> None:
        """Refuse texts that are longer than the model can read."""
        data: Any = getattr(self._trainer, "datamodule", None)
        readable = self.readable_tokens()
        # A user's own data module need not report its texts' lengths.
        if readable is None or not hasattr(data, "longest"):
            return
        row, prompt = data.longest()
        written = prompt + self.max_new_tokens if prompt and self.writes_answers() else 0
        if max(row, written) > readable:
            more = f", and the longest prompt with max_new_tokens={self.max_new_tokens} {written}" if written else ""
            raise MisconfigurationException(
                f"model={self.model_name!r} reads at most {readable} tokens. The longest text has {row}{more}: set "
                "data.max_length or max_new_tokens lower, or take another model"
            )


class LanguageModel(PretrainedModel):
    """A causal language model with LoRA, trained on the answers in its texts.

    Args:
        dtype: dtype of the frozen weights; "auto" takes the checkpoint's; None is bfloat16 if the Trainer's precision
            is "bf16-mixed", else float32. The adapter is always in float32.
        quantization: hold the frozen weights in "4bit" or "8bit" (needs bitsandbytes).
        gradient_checkpointing: compute activations again in backward instead of keeping them: larger batches in the
            same memory, for a third more time.
        max_new_tokens: longest generated answer, in tokens.
        exact_match_examples: free answers to generate and compare in each evaluation; 0 generates none.
        kwargs: the model and the optimizer's settings, see :class:`PretrainedModel`.
    """

    task = "text-generation"
    label_smoothing = 0.0  # in training only

    def __init__(
        self,
        dtype: DType | None = None,
        quantization: Quantization | None = None,
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 64,
        exact_match_examples: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.dtype_name = dtype
        self.quantization: Quantization | None = quantization
        self.gradient_checkpointing = gradient_checkpointing
        self.max_new_tokens = max_new_tokens
        self.exact_match_examples = exact_match_examples
        self.metrics: Any = torch.nn.ModuleDict({stage: Means() for stage in ("val", "test")})
        self.writer = PredictionWriter("answers.jsonl", "prompts", shows=True)

    # -- the model

    @override
    def load_adapted(self) -> Any:
        return add_adapter(self.load_base(), self.lora)

    def load_base(self) -> Any:
        """Return the pretrained model."""
        return load_base(self.model_name, self.weights_dtype(), self.quantization)

    @override
    def weights_dtype(self) -> DType:
        return super().weights_dtype() if self.dtype_name is None else self.dtype_name

    @override
    def writes_answers(self) -> bool:
        return self.exact_match_examples > 0 or self.trainer.state.fn == TrainerFn.PREDICTING

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "packing", False):
            if isinstance(self.trainer.strategy.model, FullyShardedDataParallel):
                raise MisconfigurationException("packing can't be checked under FSDP1: use FSDP2, or set it to false")
            with self.trainer.precision_plugin.forward_context():
                check_packing(self.net, min(data.batch_size, 2), self.device)

    # -- training

    @override
    def loss(self, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood per answer token, in nats; logged as ``train_loss``."""
        log_likelihood, tokens = self.log_likelihood(batch, self.label_smoothing)
        loss = -log_likelihood.sum() / tokens.sum()
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(tokens))
        return loss

    def log_likelihood(self, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of each row's answer in nats, and its number of tokens, each (rows,)."""
        # Packed rows have position_ids, and no attention mask, which would hide them from transformers.
        inputs: dict[str, Tensor] = {
            name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch
        }
        return answer_log_likelihood(self.net, inputs, batch["labels"], label_smoothing)

    # -- validation and test

    @override
    def evaluate(self, stage: str, batch: Batch) -> None:
        metrics: Means = self.metrics[stage]
        log_likelihood, tokens = self.log_likelihood(batch)
        right = batch["gold"]
        for name in ("loss", "perplexity"):
            metrics[name].update(-log_likelihood[right] / tokens[right], tokens[right])
        for is_right in right_choices(log_likelihood / tokens, batch):
            metrics["accuracy"].update(is_right)
        if metrics.compared < self.exact_match_examples:
            self._compare_free_answers(metrics, batch)

    @override
    def log_evaluation(self, stage: str) -> None:
        self.metrics[stage].log(self, stage)

    def _compare_free_answers(self, metrics: Means, batch: Batch) -> None:
        """Generate, on all ranks or none, until the data's first ``exact_match_examples`` are done."""
        free = [(ids, answer) for ids, answer in zip(batch["prompt_ids"], batch["answers"], strict=True) if answer]
        before = metrics.compared
        mine = free[: self.among_first(self.exact_match_examples, len(free), metrics)]
        # Ranks without answers take part too: generating with a sharded model needs all.
        if metrics.compared > before:
            answers = self.generate([ids for ids, _ in mine])
            for answer, (_, right) in zip(answers, mine, strict=True):
                metrics["exact_match"].update(float(is_same(answer, right)))

    def among_first(self, most: int, found: int, metrics: Means) -> int:
        """Return how many of this rank's answers are among an evaluation's first; every rank must call it.

        Lower ranks come first, as if one process had read the ranks' batches one after another.

        Args:
            most: answers that an evaluation compares.
            found: answers in this rank's batch.
            metrics: metrics that count all ranks' answers.
        """
        counts: list[int] = gathered(found)
        left = most - metrics.compared - sum(counts[: self.global_rank])
        metrics.compared += sum(counts)
        return min(max(left, 0), found)

    # -- answers

    def answer_end(self) -> str:
        """Return the chat template's end of an answer, if it is not the tokenizer's end token; else ""."""
        # A user's own data module need not have an encoder.
        data = getattr(self._trainer, "datamodule", None)
        return str(getattr(getattr(data, "encoder", None), "answer_end", ""))

    def generate(self, prompt_ids: list[list[int]]) -> list[str]:
        """Return answers to encoded prompts, each token the most likely one."""
        return generate_answers(self.net, prompt_ids, self.tokenizer, self.max_new_tokens, answer_end=self.answer_end())

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        answers = self.generate(batch["prompt_ids"])
        return [{"prompt": p, "answer": a} for p, a in zip(batch["prompt"], answers, strict=True)]
