"""How texts are written: transformers' beam search, in which only what is written may not be repeated."""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import FloatTensor, LongTensor
from transformers import GenerationConfig, LogitsProcessor, NoRepeatNGramLogitsProcessor
from typing_extensions import override

DEFAULT = {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4, "early_stopping": "never"}
"""That of LoRA's repository for E2E."""


class NoRepeatInText(LogitsProcessor):  # type: ignore[misc]
    """Forbids an n-gram that the text has already; those of the prompt may come again.

    transformers' own ``no_repeat_ngram_size`` counts the prompt too: a text could not repeat a name of four tokens that
    its meaning holds.

    Args:
        size: n.
        prompt: tokens of the prompt, with its padding.
    """

    def __init__(self, size: int, prompt: int) -> None:
        self._no_repeat = NoRepeatNGramLogitsProcessor(size)
        self._prompt = prompt

    @override
    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        return self._no_repeat(input_ids[:, self._prompt :], scores)  # type: ignore[no-any-return]


def check_decoding(decoding: dict[str, Any]) -> None:
    """Refuse settings that ``generate`` would not know.

    Raises:
        MisconfigurationException: with their names.
        ValueError: one is out of its range.
    """
    unknown = sorted(set(decoding) - set(GenerationConfig().to_dict()))
    if unknown:
        raise MisconfigurationException(
            f"decoding={decoding!r}: {unknown} can't be set. It takes fields of transformers' GenerationConfig"
        )
    GenerationConfig(**decoding).validate()


def arguments(decoding: dict[str, Any], prompt: int) -> dict[str, Any]:
    """Return arguments of ``generate`` for prompts of so many tokens, padding included."""
    settings = dict(decoding)
    # generate would count the prompt as well, see NoRepeatInText.
    size = settings.pop("no_repeat_ngram_size", 0)
    if size:
        settings["logits_processor"] = [NoRepeatInText(size, prompt)]
    return settings
