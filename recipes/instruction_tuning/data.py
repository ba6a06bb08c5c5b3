"""InstructionData: conversations, split without leaks, tokenised, in batches that a stopped run takes up again."""

import hashlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoTokenizer
from typing_extensions import override

from recipes.instruction_tuning import sources
from recipes.instruction_tuning.batches import Batch, Collate, LengthBatchSampler
from recipes.instruction_tuning.chat import IGNORED, ChatEncoder
from recipes.instruction_tuning.model import padding_id
from recipes.resumable import LateLoader, ResumableData

_PARTS = ("train", "validation", "test")


class InstructionData(ResumableData):
    """Any instruction data set, or a packaged task, for a causal language model.

    A question's part (train, validation or held-out test) is read off a hash of its text, or of the film's name for
    reviews: it does not change with the order, the seed or the size of the data, and equal questions stay together.

    Args:
        dataset: a Hub name, a local .json, .jsonl or .parquet file, or "packaged:commonsense_qa",
            "packaged:openbook_qa" or "packaged:sentiment".
        split: the split of a Hub data set that is read, and divided by the shares below.
        tokenizer: name or folder of a tokenizer; None takes the module's.
        batch_size: conversations of a batch.
        max_length: tokens kept of a conversation; what was cut or dropped is printed.
        chat_template: a Jinja template or a file with one; None takes the tokenizer's own.
        system_prompt: a system message for conversations that have none; None leaves that to the template. Where the
            template takes none, it stands at the head of the first question.
        template_arguments: variables of the chat template, as {"enable_thinking": false} for Qwen3.
        validation_share: share of the questions for validation.
        test_share: share of the questions held out for `test`.
        seed: of the order of the batches.
        num_workers: processes that load batches; 0 loads in the training process.
        prompts: a text file with one prompt a line, for `predict`.

    Raises:
        MisconfigurationException: arguments out of range (here); data that can't be read, or nothing left of it (in
            `setup`, before training).
    """

    def __init__(
        self,
        dataset: str = "packaged:commonsense_qa",
        split: str = "train",
        tokenizer: str | None = None,
        batch_size: int = 16,
        max_length: int = 512,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        template_arguments: dict[str, Any] | None = None,
        validation_share: float = 0.15,
        test_share: float = 0.25,
        seed: int = 0,
        num_workers: int = 0,
        prompts: str | None = None,
    ) -> None:
        super().__init__()
        _check(batch_size, max_length, validation_share, test_share, num_workers)
        self.dataset = dataset
        self.split = split
        self.tokenizer_name = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.chat_template = chat_template
        self.system_prompt = system_prompt
        self.template_arguments = template_arguments
        self.shares = {"validation": validation_share, "test": test_share}
        self.seed = seed
        self.num_workers = num_workers
        self.prompts = prompts
        self.parts: dict[str, Any] = {}
        self.reports: dict[str, str] = {}
        self._conversations: Any = None

    @override
    def prepare_data(self) -> None:
        sources.fetch(self.dataset)

    @override
    def setup(self, stage: str) -> None:
        self.encoder = ChatEncoder(
            self._tokenizer(), self.max_length, self.chat_template, self.system_prompt, self.template_arguments
        )
        if stage == "predict":
            self.parts["predict"] = self._read_prompts()
            return
        for part in {"fit": _PARTS[:2], "validate": _PARTS[1:2], "test": _PARTS[2:]}[stage]:
            if part not in self.parts:
                self.parts[part] = self._encoded(part)

    @override
    def train_dataloader(self) -> LateLoader:
        return self.gone_on(self._loader("train"))

    @override
    def val_dataloader(self) -> LateLoader | list[Any]:
        return self._loader("validation") if len(self.parts["validation"]) else []

    @override
    def test_dataloader(self) -> LateLoader:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        prompts = self.parts["predict"]
        # As many for each, which FSDP needs.
        sampler: Any = DistributedSampler(prompts, shuffle=False, **self.ranks())  # type: ignore[arg-type]
        return DataLoader(prompts, batch_size=self.batch_size, sampler=sampler, collate_fn=_columns)

    def _loader(self, part: str) -> LateLoader:
        encoded = self.parts[part]
        sampler = LengthBatchSampler(
            encoded["length"], self.batch_size, seed=self.seed, shuffle=part == "train", **self.ranks()
        )
        return self.whole_batches(encoded, sampler, Collate(padding_id(self.encoder.tokenizer)))

    def _tokenizer(self) -> Any:
        if self.tokenizer_name is not None:
            return AutoTokenizer.from_pretrained(self.tokenizer_name)
        if self.trainer is None:
            raise MisconfigurationException("tokenizer=None takes the module's: set it, or use a Trainer")
        return self.trainer.lightning_module.tokenizer

    def _encoded(self, part: str) -> Any:
        """One part as a table of token ids, without the rows that can't teach or test anything."""
        if self._conversations is None:
            self._conversations = sources.load(self.dataset, self.split)
        chosen = [i for i, key in enumerate(self._conversations["key"]) if part_of(key, self.shares) == part]
        rows = self._conversations.select(chosen)
        encode = partial(_encode, encoder=self.encoder, with_options=part != "train")
        encoded = rows.map(encode, remove_columns=rows.column_names, desc=f"Tokenising {part}")
        status = list(encoded["status"]) if len(rows) else []
        kept = encoded.select([i for i, s in enumerate(status) if s in ("kept", "cut")])
        self.reports[part] = self._report(part, Counter(status))
        rank_zero_info(self.reports[part])
        if len(kept) == 0 and self.shares.get(part) != 0:
            raise MisconfigurationException(f"nothing is left to use. {self.reports[part]}")
        if len(kept) == 0 and part == "test":
            raise MisconfigurationException("test_share=0 leaves nothing to test: give it a part of the questions")
        return kept

    def _report(self, part: str, counts: Counter[str]) -> str:
        notes = {
            "cut": f"{counts['cut']} of them cut at max_length={self.max_length} tokens",
            "too long": f"{counts['too long']} dropped: no answer within max_length={self.max_length} tokens",
            "no answer": f"{counts['no answer']} dropped: no answer in the data",
        }
        told = [f"{self.dataset}, {part}: {counts['kept'] + counts['cut']} conversations"]
        return "; ".join(told + [note for status, note in notes.items() if counts[status]])

    def _read_prompts(self) -> list[dict[str, Any]]:
        if self.prompts is None:
            raise MisconfigurationException("predict needs --data.prompts FILE, a text file with one prompt a line")
        try:
            lines = Path(self.prompts).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MisconfigurationException(f"prompts={self.prompts!r} can't be read: {error}") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise MisconfigurationException(f"prompts={self.prompts!r} holds no prompt: write one a line")
        encode = self.encoder.encode_prompt
        return [
            {"line": line, "prompt": p, "prompt_ids": encode([{"role": "user", "content": p}])}
            for line, p in enumerate(prompts)
        ]


def part_of(key: str, shares: dict[str, float]) -> str:
    """The part that a key falls into: the same on every machine, whatever else is in the data.

    Example:
        >>> part_of("what is a cat", {"validation": 0.15, "test": 0.25})
        'train'
    """
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    for part, share in shares.items():
        if place < share:
            return part
        place -= share
    return "train"


def _encode(row: dict[str, Any], encoder: ChatEncoder, with_options: bool) -> dict[str, Any]:
    """Token ids of a conversation, once for each option if they are to be ranked, and what became of it."""
    context, right = row["messages"][:-1], row["messages"][-1]["content"] if row["messages"] else ""
    options = (row["options"] if with_options else None) or [right]
    is_free = with_options and not row["options"]
    usable = bool(right.strip())
    ends = not row["options"]  # options are ranked by their own tokens, and nobody generates them
    answers = [{"role": "assistant", "content": option} for option in options]
    encoded = [encoder.encode([*context, answer], ends) for answer in answers] if usable else []
    status = "cut" if any(e.cut for e in encoded) else "kept"
    if any(all(label == IGNORED for label in e.labels) for e in encoded):
        status = "too long"
    return {
        "input_ids": [e.input_ids for e in encoded],
        "labels": [e.labels for e in encoded],
        "length": max((len(e.input_ids) for e in encoded), default=0),
        "gold": options.index(right),
        "answer": right if is_free else "",
        "prompt_ids": encoder.encode_prompt(context) if is_free and usable else [],
        "status": status if usable else "no answer",
    }


def _columns(rows: list[dict[str, Any]]) -> Batch:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _check(batch_size: int, max_length: int, validation_share: float, test_share: float, num_workers: int) -> None:
    problems = [
        f"{name} must be an integer >= {least}, got {value!r}"
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 2),
            ("num_workers", num_workers, 0),
        )
        if value < least
    ]
    if not (validation_share >= 0 and test_share >= 0 and validation_share + test_share < 1):
        problems.append(
            "validation_share and test_share must be >= 0 and leave something to train on, "
            f"got {validation_share!r} and {test_share!r}"
        )
    if problems:
        raise MisconfigurationException("InstructionData: " + "; ".join(problems))
