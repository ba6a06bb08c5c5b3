"""Tokens, labels, parts and batches of instruction tuning."""

from itertools import chain
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import instruction_data

from recipes.data.parts import part_of
from recipes.data.text_metrics import normalized
from recipes.instruction_tuning import sources
from recipes.language.batches import LengthBatchSampler
from recipes.language.chat import IGNORED, ChatEncoder

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")


def answers_of(row: dict[str, Any], tokenizer: Any, option: int = 0) -> str:
    return str(tokenizer.decode([label for label in row["labels"][option] if label != IGNORED]))


# -- tokens and labels


def test_the_loss_is_on_the_answer_and_its_end_token(tiny: str, tokenizer: Any, sums: str) -> None:
    data = instruction_data("fit", tiny, dataset=sums)
    row = data.parts["train"][0]
    assert answers_of(row, tokenizer).startswith("It is ")
    assert answers_of(row, tokenizer).endswith(".<|im_end|>")
    text = tokenizer.decode(row["input_ids"][0])
    assert text.startswith("<|im_start|>system")
    assert "Add" in text
    assert text.endswith("<|im_end|>\n")


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    turns = [("user", "A?"), ("assistant", "a"), ("user", "B?"), ("assistant", "b")]
    with pytest.raises(MisconfigurationException, match=r"asks for an answer with .*follow its generation prompt"):
        ChatEncoder(tokenizer, 100, template).encode([{"role": r, "content": c} for r, c in turns])


def test_what_is_cut_or_dropped_is_told(tiny: str, jsonl: Any) -> None:
    rows = [
        {"instruction": "short", "output": "yes"},
        {"instruction": "long answer", "output": "yes " * 100},
        {"instruction": "long question " * 100, "output": "yes"},
        {"instruction": "no answer", "output": ""},
        {"instruction": "null", "output": None},
        {"instruction": None, "output": "yes"},
    ]
    data = instruction_data("fit", tiny, dataset=jsonl(rows), max_length=60, validation_share=0, test_share=0)
    assert len(data.parts["train"]) == 2
    assert data.reports["train"].endswith(
        "train: 2 conversations; 1 of them cut at max_length=60 tokens; "
        "2 dropped: no answer in the data; 1 dropped: no answer within max_length=60 tokens; "
        "1 dropped: no question in the data"
    )


# -- parts and batches


@pytest.mark.parametrize("task", sorted(sources.TASKS))
def test_packaged_tasks_are_split_without_leaks(task: str) -> None:
    table = sources.load_chats(f"packaged:{task}", "train")
    shares = {"validation": 0.15, "test": 0.25}
    questions: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for row in table:
        assert row["messages"][-1]["content"] in row["options"]
        questions[part_of(row["key"], shares)].add(normalized(row["messages"][0]["content"]))
    assert all(questions.values())
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["validation"] & questions["test"]
    assert len(questions["test"]) / len(table) == pytest.approx(0.25, abs=0.05)


def test_batches_are_of_similar_length_and_new_in_each_epoch() -> None:
    lengths = torch.randint(1, 500, (1000,)).tolist()
    sampler = LengthBatchSampler(lengths, batch_size=8, seed=1)
    first = list(sampler)
    assert sorted(chain.from_iterable(first)) == list(range(1000))
    assert len(first) == len(sampler)
    assert first == list(sampler)
    padded = 0
    for batch in first:
        padded += max(lengths[i] for i in batch) * len(batch)
    assert padded / sum(lengths) < 1.15  # random batches of 8 would be at 1.7
    sampler.set_epoch(1)
    assert first != list(sampler)
