"""InstructionData: conversations, split without leaks, tokenized, in batches that a resumed run continues."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from recipes.instruction_tuning import sources
from recipes.instruction_tuning.encoding import REFUSED, encode
from recipes.instruction_tuning.formats import MORE_THAN_TEXT, NO_ANSWER, NO_QUESTION
from recipes.language.batches import Batch, Collate, LengthBatchSampler, padding_id
from recipes.language.chat import ChatEncoder
from recipes.language.data import read_prompts, tokenizer_of
from recipes.language.packing import packed
from recipes.shared.data import (
    columns,
    is_packaged,
    mapped,
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
from recipes.shared.table_files import table_ending


@dataclass(eq=False)
class InstructionData(ResumableData):
    """Any instruction data set, or a packaged task, for a causal language model.

    Validation and test are splits of their own, or shares of the training split. For the latter, a question's part is
    read off a hash of its text, or of the film's name for reviews: it does not change with the order, the seed or the
    size of the data, and equal questions stay together.

    Args:
        dataset: a Hub name, a local folder of the same layout, a local .json, .jsonl, .parquet or .csv file, or
            "packaged:commonsense_qa", "packaged:openbook_qa" or "packaged:sentiment".
        config_name: which of a Hub data set's configurations, such as "main" of GSM8K.
        revision: of a Hub data set; "refs/convert/parquet" is there where the main one is a script.
        split: of a Hub data set, for training.
        validation_split: for validation: another split or a file; None takes ``validation_share``.
        test_split: for `test`: another split or a file that is not trained on; None takes ``test_share``.
        columns: names of the data's columns, each with the name by which this recipe knows it, such as
            ``{"problem": "question", "solution": "answer"}``; the other columns are left out.
        tokenizer: name or folder of a tokenizer; None takes the module's.
        batch_size: conversations of a batch.
        max_length: tokens kept of a conversation; what was cut or dropped is printed.
        chat_template: a Jinja template or a file with one; None takes the tokenizer's own.
        system_prompt: a system message for conversations that have none; None leaves that to the template. Where the
            template takes none, it stands at the head of the first question.
        template_arguments: variables of the chat template, such as {"enable_thinking": false} for Qwen3.
        validation_share: share of the training split's questions for validation; 0 validates on nothing. None takes
            the split "validation" that a folder or a Hub data set has, or 0.05 without one.
        test_share: share of them held out for `test`, which has to be given in training too; 0 holds out none. None
            takes the split "test", or holds out none without one.
        packing: put several conversations into one row of ``max_length`` tokens, in training; ``batch_size`` counts the
            rows. A model that does not keep them apart is refused before training.
        processes: that read and tokenize the conversations; None is the training process alone.
        seed: of the order of the batches.
        num_workers: processes that load batches; 0 loads in the training process.
        prompts: a text file with one prompt a line, for `predict`.

    Raises:
        MisconfigurationException: arguments out of range (here); data that can't be read, or nothing left of it (in
            `setup`, before training).
    """

    dataset: str | None = None
    config_name: str | None = None
    revision: str | None = None
    split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    columns: dict[str, str] | None = None
    tokenizer: str | None = None
    batch_size: int = 16
    max_length: int = 2048
    chat_template: str | None = None
    system_prompt: str | None = None
    template_arguments: dict[str, Any] | None = None
    validation_share: float | None = None
    test_share: float | None = None
    packing: bool = False
    processes: int | None = None
    seed: int = 0
    num_workers: int = 0
    prompts: str | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self.own_splits = {"validation": self.validation_split, "test": self.test_split}
        self.shares = shares_of(self)
        least = {"batch_size": 1, "max_length": 2, "num_workers": 0}
        if self.processes is not None:
            least["processes"] = 1
        refuse_bad_settings(self, least, self.shares, self._bad_splits())
        self.parts = {}
        self.reports: dict[str, str] = {}
        self._tables: dict[str, Any] = {}  # conversations by the name of their split or file
        self._conversation_lengths: dict[str, int] = {}  # tokens of each part's longest, before packing
        self._prompt_lengths: dict[str, int] = {}

    def _bad_splits(self) -> list[str]:
        problems = []
        for part, own in self.own_splits.items():
            if own is None:
                continue
            name = self.dataset or ""
            if is_packaged(name) and table_ending(own) is None:
                problems.append(f"{part}_split={own!r}: packaged tasks have no other splits, give a file or a share")
            if own == self.split and table_ending(name) is None:
                problems.append(f"{part}_split={own!r} is the split that is trained on")
        return problems + split_problems(self.dataset, self.own_splits.values())

    @override
    def prepare_data(self) -> None:
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING:
            return  # the prompts are all that it needs
        take_own_splits(self, sources.NAMES)
        sources.fetch(str(self.dataset))
        self._read(self.split)  # on one process, so that the others find it downloaded

    @override
    def setup(self, stage: str) -> None:
        if stage != "predict":
            take_own_splits(self, sources.NAMES, stage)
        if stage == "fit":
            refuse_training_data(self, str(self.dataset), self.split, self.own_splits.values())
        self.encoder = ChatEncoder(
            tokenizer_of(self, self.tokenizer),
            self.max_length,
            self.chat_template,
            self.system_prompt,
            self.template_arguments,
        )
        if stage == "predict":
            self.parts["predict"] = self._read_prompts()
            self._prompt_lengths["predict"] = max(len(row["prompt_ids"]) for row in self.parts["predict"])
            return
        for part in PARTS_OF_STAGE[stage]:
            if part not in self.parts:
                self.parts[part] = self._encoded(part)

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.prompts_loader(partial(columns, names=("line", "prompt", "prompt_ids")))

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest conversation, and of the longest prompt that an answer is written for; 0 for none."""
        return max(self._conversation_lengths.values(), default=0), max(self._prompt_lengths.values(), default=0)

    @override
    def loader(self, part: str) -> LateLoader:
        rows = self.parts[part]
        sampler = LengthBatchSampler(
            rows["length"], self.batch_size, seed=self.seed, shuffle=part == "train", **self.ranks()
        )
        return self.whole_batches(rows, sampler, Collate(padding_id(self.encoder.tokenizer)))

    def _encoded(self, part: str) -> Any:
        """One part as a table of token ids, without the rows that can't teach or test anything."""
        rows = self._conversations(part)
        # Options are ranked in an evaluation; training reads the right one alone.
        encoder = partial(encode, encoder=self.encoder, with_options=part != "train")
        encoded = mapped(
            rows, encoder, remove_columns=rows.column_names, num_proc=self.processes, desc=f"Tokenizing {part}"
        )
        # `datasets` adds no column to a table without rows.
        status = list(encoded["status"]) if len(rows) else []
        kept = encoded.select([i for i, s in enumerate(status) if s in ("kept", "cut")])
        self.reports[part] = self._report(part, Counter(status))
        without_thoughts = sum(kept["leaves_thoughts"]) if len(kept) else 0
        if without_thoughts:
            self.reports[part] += f"; {without_thoughts} of them without their thoughts, which the template leaves out"
        rank_zero_info(self.reports[part])
        may_be_empty = part != "train" and self.own_splits[part] is None and self.shares[part] == 0
        if len(kept) == 0 and not may_be_empty:
            remedy = remedy_of_empty(part, self.shares) if len(rows) == 0 else ""
            raise MisconfigurationException(f"nothing is left to use. {self.reports[part]}{remedy}")
        if len(kept):
            self._conversation_lengths[part] = max(kept["length"])
        if len(kept) and part != "train":
            self._prompt_lengths[part] = max(len(ids) for ids in kept["prompt_ids"])
        return self._packed(kept) if part == "train" and self.packing else kept

    def _packed(self, rows: Any) -> Any:
        """Rows of several conversations, which are the same in every epoch."""
        made = mapped(
            rows.shuffle(seed=self.seed),
            partial(packed, room=self.max_length),
            batched=True,
            remove_columns=rows.column_names,
            num_proc=self.processes,
            desc="Packing",
        )
        filled = sum(made["length"]) / (len(made) * self.max_length)
        rank_zero_info(f"Packed into {len(made)} rows of {self.max_length} tokens, which are {filled:.0%} full")
        return made

    def _conversations(self, part: str) -> Any:
        """The rows of a part, from its own split or from a share of the training split."""
        table = self._read(self.split)
        own = None if part == "train" else self.own_splits[part]
        if own is None:
            self._refuse_equal_questions(table)
            chosen = [i for i, key in enumerate(table["key"]) if part_of(key, self.shares) == part]
            return table.select(chosen)
        rows = self._read(own)
        warn_of_training_data(f"{part}_split={own!r}", rows["key"][:], table["key"][:], "questions")
        return rows

    def _refuse_equal_questions(self, table: Any) -> None:
        """Say of conversations that begin alike why none is left for a part: equal questions stay together."""
        keys = set(table["key"]) if any(self.shares.values()) else set()
        if len(table) > 1 and len(keys) == 1 and keys != {""}:  # which is that of rows without a question
            raise MisconfigurationException(
                f"dataset={self.dataset!r}: all {len(table)} conversations begin with the same question, by which they "
                "are divided: give a validation_split, or validation_share=0 to train without one"
            )

    def _read(self, split: str) -> Any:
        """The conversations of a split, or of a file."""
        if split not in self._tables:
            name = str(self.dataset) if table_ending(split) is None else split
            self._tables[split] = sources.load(
                name, split, self.config_name, self.revision, self.columns, self.processes
            )
        return self._tables[split]

    def _report(self, part: str, counts: Counter[str]) -> str:
        notes = {
            "cut": f"{counts['cut']} of them cut at max_length={self.max_length} tokens",
            "too long": f"{counts['too long']} dropped: no answer within max_length={self.max_length} tokens",
            NO_ANSWER: f"{counts[NO_ANSWER]} dropped: no answer in the data",
            NO_QUESTION: f"{counts[NO_QUESTION]} dropped: no question in the data",
            MORE_THAN_TEXT: f"{counts[MORE_THAN_TEXT]} dropped: {MORE_THAN_TEXT} in them",
        }
        parts = [f"{self.dataset}, {part}: {counts['kept'] + counts['cut']} conversations"]
        parts += [note for status, note in notes.items() if counts[status]]
        refused = Counter({status: count for status, count in counts.items() if status.startswith(REFUSED)})
        if refused:
            # Templates have few reasons, and data mostly one.
            reason = refused.most_common(1)[0][0].removeprefix(REFUSED)
            parts.append(f"{refused.total()} dropped: {reason}")
        return "; ".join(parts)

    def _read_prompts(self) -> list[dict[str, Any]]:
        rows = []
        for line, prompt in enumerate(read_prompts(self.prompts, "prompt")):
            ids = self.encoder.encode_prompt([{"role": "user", "content": prompt}])
            rows.append({"line": line, "prompt": prompt, "prompt_ids": ids})
        return rows
