"""InstructionData: conversations, split without leaks, tokenized, in resumable batches."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from recipes.data.reading import mapped
from recipes.data.resumable import LateLoader
from recipes.instruction_tuning import sources
from recipes.instruction_tuning.formats import Row
from recipes.language.batches import collate, loader_by_length, padding_id
from recipes.language.chat import IGNORED, ChatEncoder
from recipes.language.conversation import THOUGHTS
from recipes.language.data import TextData
from recipes.language.packing import packed
from recipes.language.templates import RefusedConversationError

_REASONS = 5  # for dropped conversations, shown in a report


@dataclass(eq=False)
class InstructionData(TextData):
    """Any instruction data set, or a packaged task, for a causal language model.

    Shares divide the training split by its questions, or packaged reviews by film.

    Args:
        dataset: a Hub name, a local folder of the same layout, a local .json, .jsonl, .parquet or .csv file, or
            "packaged:commonsense_qa", "packaged:openbook_qa" or "packaged:sentiment".
        columns: the data's own names of columns, each with the recipe's name, such as ``{"problem": "question",
            "solution": "answer"}``; other columns are left out.
        tokenizer: name or folder of a tokenizer; None takes the model's.
        max_length: tokens kept of a conversation; how many were cut or dropped is printed.
        chat_template: a Jinja template or a file with one; None takes the tokenizer's own.
        system_prompt: a system message for conversations that have none; None leaves that to the template. If the
            template takes none, the first question begins with it.
        template_arguments: variables of the chat template, such as {"enable_thinking": false} for Qwen3, or "tools".
        packing: put several conversations into one row of ``max_length`` tokens, in training; ``batch_size`` then
            counts rows. A model that does not keep them apart is refused before training.
        processes: processes that read and tokenize the conversations; None uses only the training process.
        prompts: a text file with one prompt per line, for `predict`.
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

    @override
    def begin(self) -> None:
        settings = {"system_prompt": self.system_prompt, "template_arguments": self.template_arguments}
        tokenizer = self.own_tokenizer(self.tokenizer)
        self.encoder = ChatEncoder(tokenizer, self.max_length, self.chat_template, **settings)

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
        # Options are ranked only in an evaluation; training reads the right one.
        encoder = partial(encode, encoder=self.encoder, with_options=part != "train")
        options = {"remove_columns": rows.column_names, "num_proc": self.processes}
        table = mapped(rows, encoder, desc=f"Tokenizing {part}", **options)
        status = table["status"][:]
        kept = table.select([index for index, what in enumerate(status) if what in ("kept", "cut")])
        self.reports[part] = self._report(part, Counter(status), kept)
        self.note_lengths(kept["length"], map(len, kept["prompt_ids"]))
        return self._packed(kept) if part == "train" and self.packing and len(kept) else kept

    @override
    def rows_to_predict(self) -> list[dict[str, Any]]:
        rows = self.prompts_of(self.prompts, "prompt", self._asked)
        # The text after the user's decides whether a model thinks.
        end = self.encoder.tokenizer.decode(rows[0]["prompt_ids"])[-100:]
        rank_zero_info(f"The first prompt ends with {end!r}")
        return rows

    def _asked(self, prompt: str) -> list[int]:
        return self.encoder.encode_prompt([{"role": "user", "content": prompt}])

    @override
    def loader(self, part: str) -> LateLoader:
        padded = partial(collate, pad_id=padding_id(self.encoder.tokenizer))
        return loader_by_length(self, self.parts[part], padded, part == "train")

    def _packed(self, rows: Any) -> Any:
        """Return rows of several conversations, the same in every epoch."""
        pack = partial(packed, room=self.max_length)
        options = {"remove_columns": rows.column_names, "num_proc": self.processes, "desc": "Packing"}
        return mapped(rows.shuffle(seed=self.seed), pack, batched=True, **options)

    def _report(self, part: str, counts: Counter[str], kept: Any) -> str:
        parts = [f"{self.source_of(part)}, {part}: {len(kept)} conversations"]
        cut, without = counts.pop("cut", 0), sum(kept["leaves_out"])
        if cut:
            parts.append(f"{cut} of them cut at max_length={self.max_length} tokens")
        if without:
            parts.append(f"{without} of them without thoughts or tools of the data: the template leaves them out")
        del counts["kept"]
        # Templates and data mostly have only a few reasons.
        parts += [f"{count} dropped: {reason}" for reason, count in counts.most_common(_REASONS)]
        others = counts.total() - sum(count for _, count in counts.most_common(_REASONS))
        return "; ".join([*parts, f"{others} dropped for other reasons"] if others else parts)


def encode(row: Row, encoder: ChatEncoder, with_options: bool) -> Row:
    """Return token ids of a conversation, for each option if they are to be ranked, and what became of it.

    Args:
        row: a row as ``formats`` gives it.
        encoder: encoder with the model's chat template.
        with_options: encode each option, for an evaluation.

    Returns:
        ``input_ids`` and ``labels`` of each option, the greatest ``length`` in tokens, the index ``gold`` of the right
        option, ``answer`` and ``prompt_ids`` of a free answer to be generated, whether the template leaves thoughts or
        tools out (``leaves_out``), and the ``status``: "kept", "cut", or why the row can't be used.
    """
    # One unusable row must not stop a run, such as a conversation of ShareGPT that begins with an answer.
    try:
        return _unusable(row["problem"]) if row["problem"] else _usable(row, encoder, with_options)
    except RefusedConversationError as error:
        return _unusable(str(error))


def _usable(row: Row, encoder: ChatEncoder, with_options: bool) -> Row:
    messages = [template_message(message) for message in row["messages"]]
    context, answer = messages[:-1], messages[-1]
    tools = json.loads(row["tools"] or "[]")
    options = (row["options"] if with_options else None) or [answer["content"]]
    ends = not row["options"]  # options are ranked by their own tokens, and never generated
    encoded = [encoder.encode([*context, {**answer, "content": option}], ends, tools) for option in options]
    if any(set(e.labels) <= {IGNORED} for e in encoded):
        return _unusable(f"no answer within max_length={encoder.max_length} tokens")
    # Answers with thoughts are not generated: how thoughts end, and how to compare them, depends on the template.
    has_thoughts = row["messages"][-1]["thoughts"] or "</think>" in answer["content"]
    is_free = with_options and not row["options"] and not has_thoughts and "tool_calls" not in answer
    return {
        "input_ids": [e.input_ids for e in encoded],
        "labels": [e.labels for e in encoded],
        "length": max(len(e.input_ids) for e in encoded),
        "gold": options.index(answer["content"]),
        "answer": answer["content"] if is_free else "",
        "prompt_ids": encoder.encode_prompt(context, tools) if is_free else [],
        "leaves_out": any(e.leaves_out for e in encoded),
        "status": "cut" if any(e.cut for e in encoded) else "kept",
    }


def _unusable(status: str) -> Row:
    empty: Row = {"input_ids": [], "labels": [], "prompt_ids": [], "answer": ""}
    return {**empty, "leaves_out": False, "length": 0, "gold": 0, "status": status}


def template_message(message: Row) -> Row:
    """Return a message in the form that chat templates take.

    Example:
        >>> template_message({"role": "user", "content": "Why?", "thoughts": None, "learnt": True, "more": ""})
        {'role': 'user', 'content': 'Why?'}
    """
    given = {"role": message["role"], "content": message["content"], **json.loads(message["more"] or "{}")}
    if message["thoughts"]:
        given |= dict.fromkeys(THOUGHTS, message["thoughts"])
    if not message["learnt"]:
        given["learnt"] = False
    return given
