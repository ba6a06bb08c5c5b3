"""A meaning and its text as tokens: the meaning, an end token, the text after a space, and another end token."""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.language.chat import IGNORED, Encoded


class PairEncoder:
    """Encode meanings and texts as LoRA's repository does for GPT-2.

    Args:
        tokenizer: with an end token.
        max_length: tokens kept of a meaning with its text.

    Raises:
        MisconfigurationException: the tokenizer has no end token.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise MisconfigurationException(
                f"the tokenizer of {tokenizer.name_or_path!r} has no end token, which stands between a meaning and its "
                "text: set its eos_token, save it, and give the folder as data.tokenizer"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        # Models such as Llama have seen every text after a first token; GPT-2 has not.
        self._start = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]

    def prompt(self, meaning: str) -> list[int]:
        """Return the tokens after which the model writes a text."""
        return [*self._start, *self._tokens(meaning), self.tokenizer.eos_token_id]

    def encode(self, meaning: str, text: str) -> Encoded:
        """Return tokens of a meaning and its text, and labels on the text and its end token, cut at ``max_length``."""
        prompt = self.prompt(meaning)
        # GPT-2 has tokens of its own for words after a space, and those at a beginning are rare.
        answer = [*self._tokens(f" {text}"), self.tokenizer.eos_token_id]
        ids = prompt + answer
        labels = [IGNORED] * len(prompt) + answer
        return Encoded(ids[: self.max_length], labels[: self.max_length], len(ids) > self.max_length)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
