"""InstructionData: conversations, split without leaks, tokenized, in batches that a resumed run continues."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from recipes.instruction_tuning import sources
from recipes.instruction_tuning.encoding import encode
from recipes.language.batches import collate, loader_by_length, padding_id
from recipes.language.chat import ChatEncoder
from recipes.language.data import encoded_prompts, tokenizer_of
from recipes.language.packing import packed
from recipes.shared.data import mapped
from recipes.shared.parted_data import PartedData
from recipes.shared.resumable import LateLoader

_REASONS = 5  # for dropped conversations, that a report names


@dataclass(eq=False)
class InstructionData(PartedData):
    """Any instruction data set, or a packaged task, for a causal language model.

    Shares are of the training split's questions, or of the films of packaged reviews.

    Args:
        dataset: a Hub name, a local folder of the same layout, a local .json, .jsonl, .parquet or .csv file, or
            "packaged:commonsense_qa", "packaged:openbook_qa" or "packaged:sentiment".
        columns: names of the data's columns, each with the name by which this recipe knows it, such as
            ``{"problem": "question", "solution": "answer"}``; the other columns are left out.
        tokenizer: name or folder of a tokenizer; None takes the module's.
        max_length: tokens kept of a conversation; what was cut or dropped is printed.
        chat_template: a Jinja template or a file with one; None takes the tokenizer's own.
        system_prompt: a system message for conversations that have none; None leaves that to the template. Where the
            template takes none, it stands at the head of the first question.
        template_arguments: variables of the chat template, such as {"enable_thinking": false} for Qwen3, or "tools".
        packing: put several conversations into one row of ``max_length`` tokens, in training; ``batch_size`` counts the
            rows. A model that does not keep them apart is refused before training.
        processes: that read and tokenize the conversations; None is the training process alone.
        prompts: a text file with one prompt a line, for `predict`.
    """

    columns: dict[str, str] | None = None
    tokenizer: str | None = None
    max_length: int = 2048
    chat_template: str | None = None
    system_prompt: str | None = None
    template_arguments: dict[str, Any] | None = None
    packing: bool = False
    processes: int | None = None
    prompts: str | None = None

    packaged: ClassVar[str] = sources.NAMES
    kinds: ClassVar[str] = "first questions"
    least: ClassVar[dict[str, int]] = {"max_length": 2, "processes": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._longest_text = self._longest_prompt = 0

    @override
    def begin(self) -> None:
        self.encoder = ChatEncoder(
            tokenizer_of(self, self.tokenizer),
            self.max_length,
            self.chat_template,
            self.system_prompt,
            self.template_arguments,
        )

    @override
    def read(self, split: str) -> Any:
        return sources.load_chats(
            self.source(split), split, self.config_name, self.revision, self.columns, self.processes
        )

    @override
    def keys(self, rows: Any) -> list[str]:
        return list(rows["key"])

    @override
    def encoded(self, part: str, rows: Any) -> Any:
        # Options are ranked in an evaluation; training reads the right one alone.
        encoder = partial(encode, encoder=self.encoder, with_options=part != "train")
        table = mapped(
            rows, encoder, remove_columns=rows.column_names, num_proc=self.processes, desc=f"Tokenizing {part}"
        )
        status = table["status"][:]
        kept = table.select([index for index, what in enumerate(status) if what in ("kept", "cut")])
        self.reports[part] = self._report(part, Counter(status), kept)
        self._longest_text = max([self._longest_text, *kept["length"]])
        if part != "train":
            self._note_prompts(kept["prompt_ids"])
        return self._packed(kept) if part == "train" and self.packing and len(kept) else kept

    @override
    def rows_to_predict(self) -> list[dict[str, Any]]:
        rows = encoded_prompts(self.prompts, "prompt", self._asked)
        self._note_prompts(row["prompt_ids"] for row in rows)
        return rows

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        rows = self.parts["predict"]
        # What follows the user's text decides whether a model thinks.
        tail = self.encoder.tokenizer.decode(rows[0]["prompt_ids"]).rpartition(rows[0]["prompt"])[2]
        rank_zero_info(f"The first prompt ends with {tail[-100:]!r}")
        return super().predict_dataloader()

    def _asked(self, prompt: str) -> list[int]:
        return self.encoder.encode_prompt([{"role": "user", "content": prompt}])

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest conversation, and of the longest prompt that an answer is written for; 0 for none."""
        return self._longest_text, self._longest_prompt

    def _note_prompts(self, prompts: Iterable[list[int]]) -> None:
        self._longest_prompt = max([self._longest_prompt, *map(len, prompts)])

    @override
    def loader(self, part: str) -> LateLoader:
        padded = partial(collate, pad_id=padding_id(self.encoder.tokenizer))
        return loader_by_length(self, self.parts[part], padded, part == "train")

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

    def _report(self, part: str, counts: Counter[str], kept: Any) -> str:
        parts = [f"{self.source_of(part)}, {part}: {len(kept)} conversations"]
        cut, without = counts.pop("cut", 0), sum(kept["leaves_out"])
        if cut:
            parts.append(f"{cut} of them cut at max_length={self.max_length} tokens")
        if without:
            parts.append(f"{without} of them without thoughts or tools of the data: the template leaves them out")
        del counts["kept"]
        # Templates have few reasons, and data mostly one.
        parts += [f"{count} dropped: {reason}" for reason, count in counts.most_common(_REASONS)]
        others = counts.total() - sum(count for _, count in counts.most_common(_REASONS))
        return "; ".join([*parts, f"{others} dropped for other reasons"] if others else parts)
