"""The LightningModule: a vision-language model that answers questions."""

import sys
from functools import cached_property
from itertools import islice
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from recipes.language.batches import Batch
from recipes.language.evaluation import Means
from recipes.language.model import DType, add_adapter, answer_log_likelihood, generated
from recipes.language.module import LanguageModel
from recipes.vqa.metrics import scores
from recipes.vqa.model import load_base, load_processor, model_source


class VQA(LanguageModel):
    """A generative vision-language model with LoRA, or trained as a whole.

    Args:
        model: a Hub name, a local directory, or "packaged" for the model of ``python -m recipes.pretrain.vqa``;
            required.
        lora: fields of peft's LoraConfig; None trains all weights, which are then in float32.
        dtype: dtype of the frozen weights; "auto" takes the checkpoint's; None is bfloat16 if the Trainer's precision
            is "bf16-mixed", else float32. The adapter is always in float32.
        max_new_tokens: longest generated answer, in tokens.
        validation_answers: how many questions, the first ones, each validation answers and compares; 0 answers none.
            Testing answers all.
        kwargs: the optimizer's settings, ``gradient_checkpointing``, and others.

    Raises:
        MisconfigurationException: all weights are to be trained, but quantized or in a dtype other than float32.
    """

    task = "image-text-to-text"

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
        # Kept separately, because self.lora holds the default if it was None.
        self.trains_all = lora is None
        self.validation_answers = validation_answers

    @cached_property
    def processor(self) -> Any:
        """Return the model's processor; the data module takes it from here."""
        return load_processor(self.model_name)

    @override
    def prepare_data(self) -> None:
        model_source(self.model_name)

    @override
    def load_adapted(self) -> Any:
        base = load_base(self.model_name, self.weights_dtype(), self.quantization)
        return base if self.trains_all else add_adapter(base, self.lora)

    @override
    def must_fit(self) -> dict[str, Any]:
        config = self.net.config
        text = config.get_text_config()
        return {"kind of model": config.model_type, "layers": text.num_hidden_layers, "width": text.hidden_size}

    @override
    def log_likelihood(self, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        return answer_log_likelihood(self.net, batch["inputs"], batch["labels"], label_smoothing)

    @override
    def evaluate(self, stage: str, batch: Batch) -> None:
        metrics: Means = self.metrics[stage]
        log_likelihood, tokens = self.log_likelihood(batch)
        metrics["loss"].update(-log_likelihood / tokens, tokens)
        most = sys.maxsize if stage == "test" else self.validation_answers
        if metrics.compared >= most:
            return
        first = self.among_first(most, len(batch["answers"]), metrics)
        # For the whole batch on all ranks, which sharded models need.
        answers = self.answers(batch["prompts"])
        rows = zip(answers, batch["answers"], batch["types"], batch["choices"], strict=True)
        for row in islice(rows, first):
            for name, value in scores(*row).items():
                metrics[name].update(value)

    def answers(self, prompts: dict[str, Tensor]) -> list[str]:
        """Return answers to encoded prompts, each token the most likely one."""
        return generated(self.net, prompts, self.processor.tokenizer, self.max_new_tokens, self.answer_end())

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        answers = self.answers(batch["prompts"])
        rows = zip(batch["name"], batch["question"], answers, strict=True)
        return [{"image": image, "prompt": question, "answer": answer} for image, question, answer in rows]
