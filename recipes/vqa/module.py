"""The LightningModule: a vision-language model that answers questions."""

from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from recipes.language.batches import Batch
from recipes.language.model import DType, add_adapter, answer_log_likelihood, generated
from recipes.language.module import LanguageModel
from recipes.shared.fitting import FittingModule
from recipes.vqa.metrics import AnswerMetrics
from recipes.vqa.model import load_base, load_processor, model_source


class VQA(FittingModule, LanguageModel):
    """A generative vision-language model with LoRA, or trained as a whole.

    Args:
        model: a Hub name, a local directory, or "packaged" for the model of ``python -m recipes.vqa.offline``; it has
            to be given.
        lora: fields of peft's LoraConfig; None trains all weights, which are then in float32.
        dtype: of the frozen weights, "auto" as in the checkpoint; None is bfloat16 where the Trainer's precision is
            "bf16-mixed", else float32. The adapter is always in float32.
        max_new_tokens: tokens of a generated answer.
        validation_answers: questions that one validation answers and compares, the first ones; 0 answers none. Testing
            answers all.
        kwargs: of the next class: the optimizer's settings, ``gradient_checkpointing``, and others.

    Raises:
        MisconfigurationException: all weights are to be trained, in another dtype than float32 or quantized.
    """

    def __init__(
        self,
        model: str | None = None,
        lora: dict[str, Any] | None = None,
        dtype: DType | None = None,
        max_new_tokens: int = 16,
        validation_answers: int = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, lora=lora, dtype=dtype, max_new_tokens=max_new_tokens, **kwargs)
        if lora is None:
            if dtype not in (None, "float32") or self.quantization is not None:
                raise MisconfigurationException(
                    f"lora=null trains all weights, which needs dtype='float32' and no quantization, got {dtype!r} and "
                    f"{self.quantization!r}: leave both out, or give lora"
                )
            # In bfloat16 most of AdamW's small steps would be rounded away.
            self.dtype_name = "float32"
        # Kept apart, because self.lora holds the default where it was None.
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
    def load_net(self) -> Any:
        base = load_base(self.model_name, self.weights_dtype(), self.quantization)
        return base if self.trains_all else add_adapter(base, self.lora)

    @override
    def must_fit(self) -> dict[str, Any]:
        assert self.net is not None  # configure_model comes first
        config = self.net.config
        text = config.get_text_config()
        return {"kind of model": config.model_type, "layers": text.num_hidden_layers, "width": text.hidden_size}

    @override
    def log_likelihood(self, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Each row's answer: log-likelihood in nats and number of tokens, each (rows,)."""
        assert self.net is not None  # configure_model comes first
        return answer_log_likelihood(self.net, batch["inputs"], batch["labels"], label_smoothing)

    @override
    def evaluate(self, stage: str, batch: Batch) -> None:
        metrics = cast("AnswerMetrics", self.metrics[stage])
        metrics.update_loss(*self.log_likelihood(batch))
        left = len(batch["answers"]) if stage == "test" else self.validation_answers - metrics.compared
        if left > 0:
            self._compare(metrics, batch, None if stage == "test" else left)

    def _compare(self, metrics: AnswerMetrics, batch: Batch, left: int | None) -> None:
        """Generate on all ranks, which sharded models need, and compare the first ``left`` of all ranks' answers."""
        # The ranks' last batches differ in size, so that each must know how many answers come before its own.
        counts = cast("Tensor", self.all_gather(torch.tensor(len(batch["answers"]), device=self.device))).flatten()
        before = int(counts[: self.global_rank].sum())
        first = None if left is None else max(left - before, 0)
        answers = self.answers(batch["prompts"])
        references = (batch[name][:first] for name in ("answers", "types", "choices"))
        metrics.update_answers(answers[:first], *references)
        metrics.compared += int(counts.sum())

    def answers(self, prompts: dict[str, Tensor]) -> list[str]:
        """Answers to encoded prompts, each token the most likely one."""
        assert self.net is not None
        return generated(self.net, prompts, self.processor.tokenizer, self.max_new_tokens, self.answer_end())

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        answers = self.answers(batch["prompts"])
        rows = zip(batch["name"], batch["question"], answers, strict=True)
        return [{"image": image, "prompt": question, "answer": answer} for image, question, answer in rows]
