"""MeaningData: meanings and the texts that express them, in resumable batches."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import datasets
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from recipes.data.reading import mapped
from recipes.data.resumable import LateLoader
from recipes.data.text_metrics import normalized
from recipes.language.batches import Batch, loader_by_length, pad, padded, padding_id
from recipes.language.chat import IGNORED, Encoded
from recipes.language.data import TextData
from recipes.nlg.sources import grouped, read_pairs, read_source


class PairEncoder:
    """Encode meanings and texts as LoRA's repository does for GPT-2.

    Args:
        tokenizer: a tokenizer with an end token.
        max_length: tokens kept of a meaning with its text.

    Raises:
        MisconfigurationException: the tokenizer has no end token.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise MisconfigurationException(
                f"the tokenizer of {tokenizer.name_or_path!r} has no end token, which separates a meaning from its "
                "text: set its eos_token, save it, and give the folder as data.tokenizer"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        # Models such as Llama have a token before every text; GPT-2 has not.
        self._start = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]

    def prompt(self, meaning: str) -> list[int]:
        """Return the tokens of the prompt after which the model writes a text."""
        return [*self._start, *self._tokens(meaning), self.tokenizer.eos_token_id]

    def encode(self, meaning: str, text: str) -> Encoded:
        """Return tokens of a meaning and its text, cut at ``max_length``, with labels on the text and its end token."""
        prompt = self.prompt(meaning)
        # GPT-2 has separate tokens for words after a space; those for words at a beginning are rare.
        answer = [*self._tokens(f" {text}"), self.tokenizer.eos_token_id]
        ids = prompt + answer
        labels = [IGNORED] * len(prompt) + answer
        return Encoded(ids[: self.max_length], labels[: self.max_length], len(ids) > self.max_length)

    def row(self, row: dict[str, str]) -> dict[str, Any]:
        """Return a row with an encoded pair."""
        pair = self.encode(row["meaning"], row["text"])
        return {**pair._asdict(), "length": len(pair.input_ids)}

    def prompt_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return what a row with a meaning gets in addition: the tokens of its prompt."""
        prompt = self.prompt(row["meaning"])
        return {"prompt_ids": prompt, "length": len(prompt)}

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(eq=False)
class MeaningData(TextData):
    """Meanings and texts for a causal language model.

    Training and the loss of an evaluation take each text of a meaning by itself. In the test, and on request in
    validation, the model writes one text for each meaning, which is compared with all its texts, the references.

    Shares divide the training split by its meanings, so that all texts of a meaning are in one part.

    Args:
        dataset: a Hub name, a local folder of the same layout, a .json, .jsonl, .parquet or .csv file, or a .txt file
            with ``meaning||text`` on each line, as in LoRA's repository.
        meaning: column of the meanings; None finds that of E2E and of LoRA's repository.
        text: column of the texts, or of lists of them; None finds it likewise.
        tokenizer: name or folder of a tokenizer; None takes the model's.
        batch_size: pairs of a meaning and a text per batch, or meanings per batch when texts are written.
        max_length: tokens kept of a pair; how many were cut is printed.
        validation_texts: meanings for which texts are written and compared in each validation.
        prompts: a text file with one meaning per line, for `predict`.
    """

    meaning: str | None = None
    text: str | None = None
    tokenizer: str | None = None
    batch_size: int = 8
    max_length: int = 2048
    validation_texts: int = 0
    prompts: str | None = None

    kinds: ClassVar[str] = "meanings"
    least: ClassVar[dict[str, int]] = {"max_length": 3, "validation_texts": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.meanings: dict[str, Any] = {}

    @override
    def begin(self) -> None:
        self.encoder = PairEncoder(self.own_tokenizer(self.tokenizer), self.max_length)

    @override
    def read(self, split: str) -> Any:
        table = read_source(self.source(split), split, self.config_name, self.revision)
        source = f"dataset={self.dataset!r}, split={split!r}"
        return datasets.Dataset.from_list(read_pairs(table, source, self.meaning, self.text))

    @override
    def keys(self, rows: Any) -> list[str]:
        return [normalized(meaning) for meaning in rows["meaning"]]

    @override
    def encoded(self, part: str, rows: Any) -> Any:
        table = mapped(rows, self.encoder.row, remove_columns=rows.column_names, desc=f"Tokenizing {part}")
        # For the others, the loss would be a mean over no token.
        kept = [index for index, labels in enumerate(table["labels"]) if set(labels) != {IGNORED}]
        too_long, rows, table = len(table) - len(kept), rows.select(kept), table.select(kept)
        meanings, cut = grouped(rows), sum(table["cut"])
        notes = [f"{self.source_of(part)}, {part}: {len(rows)} texts of {len(meanings)} meanings"]
        notes += [f"{cut} of them cut at max_length={self.max_length} tokens"] if cut else []
        notes += [f"{too_long} left out: no token of the text within max_length={self.max_length}"] if too_long else []
        self.reports[part] = "; ".join(notes)
        self.note_lengths(table["length"], [])
        if part != "train" and meanings:
            prompts = datasets.Dataset.from_list(meanings)
            self.meanings[part] = mapped(prompts, self.encoder.prompt_row, desc="Tokenizing meanings")
            self.note_lengths([], self.meanings[part]["length"])
        return table

    @override
    def rows_to_predict(self) -> list[dict[str, Any]]:
        return self.prompts_of(self.prompts, "meaning", self.encoder.prompt)

    @override
    def loader(self, part: str) -> LateLoader:
        return self._loader(self.parts[part], is_training=part == "train")

    @override
    def val_dataloader(self) -> list[Any]:
        return self._evaluation_loaders("validation", self.validation_texts)

    @override
    def test_dataloader(self) -> list[Any]:
        return self._evaluation_loaders("test", len(self.meanings["test"]))

    def _evaluation_loaders(self, part: str, written: int) -> list[LateLoader]:
        """Return loaders of pairs for the loss, and of meanings to write texts for."""
        if not len(self.parts[part]):
            return []
        loaders = [self.loader(part)]
        meanings = self.meanings[part]
        if written:
            loaders.append(self._loader(meanings.select(range(min(written, len(meanings)))), is_training=False))
        return loaders

    def _loader(self, rows: Any, is_training: bool) -> LateLoader:
        return loader_by_length(self, rows, partial(collate, pad_id=padding_id(self.encoder.tokenizer)), is_training)


def collate(rows: dict[str, list[Any]], pad_id: int) -> Batch:
    """Return rows that are given in columns as one batch: pairs padded on the right, or meanings without padding."""
    # Prompts stay lists: the module pads them on the left when it generates.
    if "prompt_ids" in rows:
        return rows
    labels = pad([torch.tensor(row) for row in rows["labels"]], IGNORED)
    return {**padded(rows["input_ids"], pad_id), "labels": labels}
