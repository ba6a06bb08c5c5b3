"""MeaningData: meanings with the texts that say them, in batches that a resumed run continues."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import datasets
import torch
from typing_extensions import override

from recipes.language.batches import Batch, loader_by_length, pad, padded, padding_id
from recipes.language.chat import IGNORED
from recipes.language.data import encoded_prompts, tokenizer_of
from recipes.nlg.encoding import PairEncoder
from recipes.nlg.sources import grouped, in_full, read_pairs, read_source
from recipes.shared.data import mapped
from recipes.shared.parted_data import PartedData
from recipes.shared.resumable import LateLoader
from recipes.shared.text_metrics import normalized


@dataclass(eq=False)
class MeaningData(PartedData):
    """Meanings and texts for a causal language model.

    Training and the loss of an evaluation take each text of a meaning by itself. In the test, and where it is asked for
    in validation, the model writes one text for each meaning, which is compared with all its texts, the references.

    Shares are of the training split's meanings, so that all texts of a meaning are in one part.

    Args:
        dataset: a Hub name, a local folder of the same layout, a .json, .jsonl, .parquet or .csv file, or a .txt file
            with ``meaning||text`` in each line, as in LoRA's repository.
        meaning: column of the meanings; None finds those of E2E, GEM's E2E and LoRA's repository.
        text: column of the texts, or of lists of them; None finds those of the same sets.
        tokenizer: name or folder of a tokenizer; None takes the module's.
        batch_size: pairs of a meaning and a text in a batch, and meanings in a batch of those to write texts for.
        max_length: tokens kept of a pair; what was cut is printed.
        validation_texts: meanings of the validation part for which texts are written and compared in each validation.
        prompts: a text file with one meaning a line, for `predict`.
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
        self.encoder = PairEncoder(tokenizer_of(self, self.tokenizer), self.max_length)

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
        if part != "train":
            rows = datasets.Dataset.from_list(in_full(rows))
        encode = partial(_encoded, encoder=self.encoder)
        table = mapped(rows, encode, remove_columns=rows.column_names, desc=f"Tokenizing {part}")
        # Of the others, the loss would be a mean over no token.
        kept = [index for index, labels in enumerate(table["labels"]) if set(labels) != {IGNORED}]
        too_long, rows, table = len(table) - len(kept), rows.select(kept), table.select(kept)
        meanings, cut = grouped(rows), sum(table["cut"])
        notes = [f"{self.source_of(part)}, {part}: {len(rows)} texts of {len(meanings)} meanings"]
        notes += [f"{cut} of them cut at max_length={self.max_length} tokens"] if cut else []
        notes += [f"{too_long} left out: no token of the text within max_length={self.max_length}"] if too_long else []
        self.reports[part] = "; ".join(notes)
        if part != "train" and meanings:
            prompts = datasets.Dataset.from_list(meanings)
            self.meanings[part] = mapped(prompts, partial(_prompted, encoder=self.encoder), desc="Tokenizing meanings")
        return table

    @override
    def rows_to_predict(self) -> list[dict[str, Any]]:
        return encoded_prompts(self.prompts, "meaning", self.encoder.prompt)

    def longest(self) -> tuple[int, int]:
        """Return tokens of the longest pair, and of the longest prompt that a text is written for."""
        pairs, prompts = [0], [0]
        for part, rows in self.parts.items():
            if part == "predict":
                # Predicted meanings have no text beside them, and so no pair.
                prompts += [len(row["prompt_ids"]) for row in rows]
            elif len(rows):
                pairs += rows["length"]
        for rows in self.meanings.values():
            prompts += rows["length"]
        return max(pairs), max(prompts)

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


def _encoded(row: dict[str, str], encoder: PairEncoder) -> dict[str, Any]:
    pair = encoder.encode(row["meaning"], row["text"])
    return {**pair._asdict(), "length": len(pair.input_ids)}


def _prompted(row: dict[str, Any], encoder: PairEncoder) -> dict[str, Any]:
    prompt = encoder.prompt(row["meaning"])
    return {"prompt_ids": prompt, "length": len(prompt)}


def collate(rows: dict[str, list[Any]], pad_id: int) -> Batch:
    """Return rows that are given in columns as one batch: pairs padded on the right, or meanings as they are."""
    # Prompts stay lists: the module pads them on the left when it generates.
    if "prompt_ids" in rows:
        return rows
    labels = pad([torch.tensor(row) for row in rows["labels"]], IGNORED)
    return {**padded(rows["input_ids"], pad_id), "labels": labels}
