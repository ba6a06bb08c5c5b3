"""The LightningModule: a language model that writes texts for meanings."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import FloatTensor, LongTensor
from transformers import GenerationConfig, LogitsProcessor, NoRepeatNGramLogitsProcessor
from typing_extensions import override

from recipes.language.batches import Batch
from recipes.language.joint_attention import split_attention
from recipes.language.model import generate_answers, load_base
from recipes.language.module import LanguageModel
from recipes.nlg.metrics import METRICS, Metric, WrittenTexts
from recipes.training.predictions import run_folder

DEFAULT = {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4, "early_stopping": "never"}
"""The decoding of LoRA's repository for E2E."""


class NoRepeatInText(LogitsProcessor):  # type: ignore[misc]
    """Forbids an n-gram that the text has already; the prompt's n-grams may come again.

    transformers' own ``no_repeat_ngram_size`` counts the prompt too, so a text could not repeat a name of four tokens
    from its meaning.

    Args:
        size: n.
        prompt: number of the prompt's tokens, with its padding.
    """

    def __init__(self, size: int, prompt: int) -> None:
        self._no_repeat = NoRepeatNGramLogitsProcessor(size)
        self._prompt = prompt

    @override
    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        return self._no_repeat(input_ids[:, self._prompt :], scores)  # type: ignore[no-any-return]


def check_decoding(decoding: dict[str, Any]) -> None:
    """Refuse settings that ``generate`` does not know.

    Raises:
        MisconfigurationException: names them.
        ValueError: a setting is out of range.
    """
    unknown = sorted(set(decoding) - set(GenerationConfig().to_dict()))
    if unknown:
        raise MisconfigurationException(
            f"decoding={decoding!r}: {unknown} can't be set. It takes fields of transformers' GenerationConfig"
        )
    GenerationConfig(**decoding).validate()


def arguments(decoding: dict[str, Any], prompt: int) -> dict[str, Any]:
    """Return arguments of ``generate`` for prompts of this many tokens, padding included."""
    settings = dict(decoding)
    # generate would count the prompt too, see NoRepeatInText.
    size = settings.pop("no_repeat_ngram_size", 0)
    if size:
        settings["logits_processor"] = [NoRepeatInText(size, prompt)]
    return settings


class TextGeneration(LanguageModel):
    """A causal language model with LoRA that writes texts for meanings.

    GPT-2's joint projection of q, k and v is split if ``lora.target_modules`` names its parts
    (:func:`recipes.language.joint_attention.split_attention`).

    Args:
        model_config: fields of the model's configuration that replace its own, such as ``{"attn_pdrop": 0.0}``.
        label_smoothing: share of each token's target that is spread over the vocabulary, in training only.
        decoding: fields of transformers' GenerationConfig for writing texts; None is a beam of 10, length penalty 0.8,
            and no sequence of 4 tokens twice in a text. ``no_repeat_ngram_size`` ignores the prompt.
        metrics: metrics of the written texts: some of "bleu", "nist", "meteor", "rouge_l" and "cider".
        kwargs: the model, the optimizer's settings, ``max_new_tokens`` of a text, and others.

    Raises:
        MisconfigurationException: arguments out of range (here); a model that is too short for the data, or without
            layers for the adapter (in ``configure_model``, before training).
    """

    def __init__(
        self,
        model_config: dict[str, Any] | None = None,
        label_smoothing: float = 0.1,
        decoding: dict[str, Any] | None = None,
        metrics: Sequence[Metric] = METRICS,
        **kwargs: Any,
    ) -> None:
        # No exact match: a meaning can be expressed in many ways, and the metrics here compare with all references.
        super().__init__(exact_match_examples=0, **kwargs)
        self.model_config = model_config
        self.label_smoothing = label_smoothing
        self.decoding = dict(DEFAULT) if decoding is None else decoding
        check_decoding(self.decoding)
        self.written = {stage: WrittenTexts(stage, metrics) for stage in ("val", "test")}

    @override
    def load_base(self) -> Any:
        base = load_base(self.model_name, self.weights_dtype(), self.quantization, self.model_config)
        # Before the adapter, which finds its layers by their names.
        split_attention(base, self.lora.get("target_modules"))
        return base

    @override
    def readable_tokens(self) -> int | None:
        """Return at most the number that the model's configuration names, also without learnt positions."""
        bounds = (super().readable_tokens(), getattr(self.net.config, "max_position_embeddings", None))
        return min((bound for bound in bounds if bound is not None), default=None)

    @override
    def writes_answers(self) -> bool:
        return True  # a text for each meaning, which the metrics compare

    @override
    def evaluate(self, stage: str, batch: Batch) -> None:
        if "prompt_ids" in batch:
            self.written[stage].add(batch, self.generate(batch["prompt_ids"]))
            return
        log_likelihood, tokens = self.log_likelihood(batch)
        for name in ("loss", "perplexity"):
            self.metrics[stage][name].update(-log_likelihood / tokens, tokens)

    @override
    def log_evaluation(self, stage: str) -> None:
        super().log_evaluation(stage)
        if self.trainer.sanity_checking:
            # The sanity check writes a few texts, which would become files and scores of an untrained model.
            self.written[stage].clear()
            return
        folder = run_folder(self.trainer)
        for name, value in self.written[stage].finish(folder).items():
            self.log(f"{stage}_{name}", value, sync_dist=True)  # the same on all ranks

    @override
    def generate(self, prompt_ids: list[list[int]]) -> list[str]:
        """Return texts for meanings, given as the tokens of their prompts."""
        options = arguments(self.decoding, max(map(len, prompt_ids), default=1))
        return generate_answers(self.net, prompt_ids, self.tokenizer, self.max_new_tokens, **options)
