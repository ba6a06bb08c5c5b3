"""MeaningData: meanings with the texts that say them, in batches that a resumed run continues."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from recipes.language.batches import Batch, LengthBatchSampler, pad, padding_id
from recipes.language.chat import IGNORED
from recipes.language.data import read_prompts, token_keys, tokenizer_of
from recipes.nlg.encoding import PairEncoder
from recipes.nlg.sources import Columns, Pair, grouped, read_pairs, read_source
from recipes.shared.data import (
    columns,
    is_file,
    part_of,
    refuse_bad_settings,
    refuse_training_data,
    remedy_of_empty,
    shares_of,
    split_problems,
    take_own_splits,
    warn_of_training_data,
)
from recipes.shared.resumable import PARTS_OF_STAGE, LateLoader, ResumableData
from recipes.shared.text_metrics import normalized


@dataclass(eq=False)
class MeaningData(ResumableData):
    """Meanings and texts for a causal language model.

    Training and the loss of an evaluation take each text of a meaning by itself. In the test, and where it is asked for
    in validation, the model writes one text for each meaning, which is compared with all its texts, the references.

    Validation and test are splits of their own, or shares of the training split's meanings. For the latter, a meaning's
    part is read off a hash of it, so that all its texts are in one part.

    Args:
        dataset: a Hub name, a local folder of the same layout, a .json, .jsonl, .parquet or .csv file, or a .txt file
            with ``meaning||text`` in each line, as in LoRA's repository.
        config_name: which of a Hub data set's configurations.
        revision: of a Hub data set; "refs/convert/parquet" is there where the main one is a script.
        split: of a Hub data set, for training.
        validation_split: for validation: another split or a file; None takes ``validation_share``.
        test_split: for `test`: another split or a file that is not trained on; None takes ``test_share``.
        meaning: column of the meanings; None finds those of E2E, GEM's E2E and LoRA's repository.
        text: column of the texts, or of lists of them; None finds those of the same sets.
        tokenizer: name or folder of a tokenizer; None takes the module's.
        batch_size: pairs of a meaning and a text in a batch, and meanings in a batch of those to write texts for.
        max_length: tokens kept of a pair; what was cut is printed.
        validation_texts: meanings of the validation part for which texts are written and compared in each validation.
        validation_share: share of the training split's meanings for validation; 0 validates on nothing. None takes the
            split "validation" that a folder or a Hub data set has, or 0.05 without one.
        test_share: share of them held out for `test`, which has to be given in training too; 0 holds out none. None
            takes the split "test", or holds out none without one.
        seed: of the order of the batches.
        num_workers: processes that load batches; 0 loads in the training process.
        prompts: a text file with one meaning a line, for `predict`.

    Raises:
        MisconfigurationException: arguments out of range (here); data that can't be read, a missing column, a row
            without a text, a meaning that is too long, or an empty part (in `setup`, before training).
    """

    dataset: str | None = None
    config_name: str | None = None
    revision: str | None = None
    split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    meaning: str | None = None
    text: str | None = None
    tokenizer: str | None = None
    batch_size: int = 8
    max_length: int = 2048
    validation_texts: int = 0
    validation_share: float | None = None
    test_share: float | None = None
    seed: int = 0
    num_workers: int = 0
    prompts: str | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self.own_splits = {"validation": self.validation_split, "test": self.test_split}
        self.shares = shares_of(self)
        self.columns = Columns(self.meaning, self.text)
        more = split_problems(self.dataset, self.own_splits.values())
        least = {"batch_size": 1, "max_length": 3, "validation_texts": 0, "num_workers": 0}
        refuse_bad_settings(self, least, self.shares, more)
        self.parts: dict[str, Any] = {}
        self.meanings: dict[str, Any] = {}

    @override
    def prepare_data(self) -> None:
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING:
            return  # the prompts are all that it needs
        take_own_splits(self)
        self._table("train")  # on one process, so that the others find it downloaded

    @override
    def setup(self, stage: str) -> None:
        self.encoder = PairEncoder(tokenizer_of(self, self.tokenizer), self.max_length)
        if stage == "predict":
            self.parts["predict"] = self._read_prompts()
            return
        take_own_splits(self, stage=stage)
        if stage == "fit":
            refuse_training_data(self, str(self.dataset), self.split, self.own_splits.values())
        for part in PARTS_OF_STAGE[stage]:
            if part in self.parts:
                continue
            pairs = self._pairs(part)
            self.parts[part] = self._encoded(part, pairs)
            if part != "train":
                self.meanings[part] = self._prompts(pairs)
        if stage == "fit":
            trained, held_out = token_keys(self.parts["train"]), token_keys(self.parts["validation"])
            warn_of_training_data("validation", held_out, trained, "texts and their meanings")

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest pair, and of the longest prompt that a text is written for."""
        pairs, prompts = [0], [0]
        for part, rows in self.parts.items():
            if part == "predict":
                # Predicted meanings have no text beside them, and so no pair.
                prompts += [len(row["prompt_ids"]) for row in rows]
            else:
                pairs += rows["length"]
        for rows in self.meanings.values():
            prompts += rows["length"]
        return max(pairs), max(prompts)

    @override
    def loader(self, part: str) -> LateLoader:
        return self._loader(self.parts[part], shuffle=part == "train")

    @override
    def val_dataloader(self) -> list[Any]:
        return self._evaluation_loaders("validation", self.validation_texts)

    @override
    def test_dataloader(self) -> list[Any]:
        return self._evaluation_loaders("test", len(self.meanings["test"]))

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.prompts_loader(partial(columns, names=("line", "prompt", "prompt_ids")))

    def _evaluation_loaders(self, part: str, written: int) -> list[LateLoader]:
        """Pairs for the loss, and meanings to write texts for."""
        loaders = [self.loader(part)] if len(self.parts[part]) else []
        meanings = self.meanings[part]
        meanings = meanings.select(range(min(written, len(meanings))))
        if len(meanings):
            loaders.append(self._loader(meanings, shuffle=False))
        return loaders

    def _loader(self, rows: Any, shuffle: bool) -> LateLoader:
        ranks: dict[str, Any] = dict(self.ranks())
        sampler = LengthBatchSampler(rows["length"], self.batch_size, seed=self.seed, shuffle=shuffle, **ranks)
        return self.whole_batches(rows, sampler, partial(collate, pad_id=padding_id(self.encoder.tokenizer)))

    def _table(self, part: str) -> Any:
        dataset, split = str(self.dataset), self.own_splits.get(part) or self.split
        if is_file(split):
            return read_source(split, split)
        return read_source(dataset, split, self.config_name, self.revision)

    def _pairs(self, part: str) -> list[Pair]:
        """A part's pairs: a split or a file of its own, or a share of the training split's meanings."""
        split = self.own_splits.get(part)
        source = f"dataset={self.dataset!r}, split={split or self.split!r}"
        pairs = read_pairs(self._table(part), source, self.columns, with_references=part != "train")
        # A split of its own is taken whole; the training split loses the shares that other parts take from it.
        if split is not None:
            return pairs
        return [pair for pair in pairs if part_of(normalized(pair.meaning), self.shares) == part]

    def _encoded(self, part: str, pairs: Sequence[Pair]) -> Any:
        """Pairs as a table of token ids."""
        if not pairs and self.shares.get(part) != 0:
            remedy = remedy_of_empty(part, self.shares)
            raise MisconfigurationException(f"dataset={self.dataset!r}: no meaning is left for {part}{remedy}")
        encoded = [self.encoder.encode(*pair) for pair in pairs]
        for pair, row in zip(pairs, encoded, strict=True):
            # Its loss would be a mean over no token.
            if set(row.labels) == {IGNORED}:
                raise MisconfigurationException(
                    f"dataset={self.dataset!r}, {part}: max_length={self.max_length} leaves no token of the text for "
                    f"the meaning {pair.meaning[:80]!r}: set it higher, or shorten the meanings"
                )
        cut = sum(row.cut for row in encoded)
        note = f"; {cut} of them cut at max_length={self.max_length} tokens" if cut else ""
        rank_zero_info(f"{self.dataset}, {part}: {len(pairs)} texts of {len(grouped(pairs))} meanings{note}")
        return datasets.Dataset.from_dict(
            {
                "input_ids": [row.input_ids for row in encoded],
                "labels": [row.labels for row in encoded],
                "length": [len(row.input_ids) for row in encoded],
            }
        )

    def _prompts(self, pairs: Sequence[Pair]) -> Any:
        """Meanings, numbered, with their references and the tokens of their prompts."""
        meanings = grouped(pairs)
        prompts = [self.encoder.prompt(meaning) for meaning, _ in meanings]
        return datasets.Dataset.from_dict(
            {
                "number": list(range(len(meanings))),
                "meaning": [meaning for meaning, _ in meanings],
                "references": [references for _, references in meanings],
                "prompt_ids": prompts,
                "length": [len(prompt) for prompt in prompts],
            }
        )

    def _read_prompts(self) -> list[dict[str, Any]]:
        rows = []
        for line, prompt in enumerate(read_prompts(self.prompts, "meaning")):
            rows.append({"line": line, "prompt": prompt, "prompt_ids": self.encoder.prompt(prompt)})
        return rows


def collate(rows: dict[str, list[Any]], pad_id: int) -> Batch:
    """Rows that are given in columns as one batch: pairs padded on the right, or meanings as they are."""
    # Prompts stay lists: the module pads them on the left when it generates.
    if "prompt_ids" in rows:
        return rows
    ids = [torch.tensor(row) for row in rows["input_ids"]]
    return {
        "input_ids": pad(ids, pad_id),
        "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
        "labels": pad([torch.tensor(row) for row in rows["labels"]], IGNORED),
    }
