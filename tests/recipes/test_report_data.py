"""Which tokens count, in each kind of data, and that the mean is over all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from report_models import save_adapter, write_rows
from torch.nn.functional import cross_entropy

from recipes.language.chat import IGNORED
from recipes.report.adapters import Adapted, load_adapter
from recipes.report.data import class_of, mean_loss, read_rows
from recipes.report.options import AdapterFolder, Options


@pytest.fixture
def adapted(adapters: tuple[Path, Path], texts: Path) -> Adapted:
    return loaded(adapters[0], texts)


def loaded(path: Path, texts: Path) -> Adapted:
    folder = AdapterFolder("x", path)
    return load_adapter(folder, Options([str(path)], texts, dtype="float64"))


def options(adapter: Path, data: Path, **more: Any) -> Options:
    return Options([str(adapter)], data, **more)


def by_hand(adapted: Adapted, words: str, counted: list[str]) -> float:
    """Mean negative log-likelihood of the counted tokens, which are at the end of the text."""
    ids = torch.tensor([adapted.tokenizer(words, add_special_tokens=False)["input_ids"]])
    losses = cross_entropy(adapted.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    return losses[-len(counted) :].mean().item()


@pytest.mark.parametrize(("label", "number"), [("one", 1), ("0", 2), (True, 1), (2.0, 2)])
def test_a_class_by_its_number_or_its_name(label: Any, number: int) -> None:
    found = class_of(label, {"zero": 0, "one": 1, "0": 2})
    assert (found, type(found)) == (number, int)


@pytest.mark.parametrize("label", [3, -1, 0.5, float("nan"), None, "two"])
def test_what_is_no_class_is_named(label: object) -> None:
    with pytest.raises(ValueError, match="label must be a number from 0 to 2 or one of"):
        class_of(label, {"zero": 0, "one": 1, "0": 2})


def test_the_loss_of_classes_by_number_and_by_name(classifiers: tuple[Path, Path], texts: Path) -> None:
    adapted = loaded(classifiers[0], texts)
    settings = options(classifiers[0], texts, batch_size=4)
    rows = read_rows(settings)
    logits = [adapted.model(torch.tensor([adapted.tokenizer(row["text"])["input_ids"]])).logits for row in rows]
    expected = cross_entropy(torch.cat(logits), torch.tensor([row["label"] for row in rows]))
    named = [row | {"label": f"LABEL_{row['label']}"} for row in rows]
    for given in (rows, named):
        loss, terms = mean_loss(adapted, given, settings)
        assert terms == 6
        assert loss().item() == pytest.approx(expected.item(), rel=1e-10)


def test_an_empty_text_has_no_class(base: Path, texts: Path, tmp_path: Path) -> None:
    """It has no tokens, so if it were alone in a batch, there would be nothing to compute."""
    adapted = loaded(save_adapter(tmp_path / "adapter", base, task="SEQ_CLS"), texts)
    rows = [{"text": text, "label": 0} for text in ("a b", "", "c")]
    settings = options(tmp_path / "adapter", texts, batch_size=1)
    loss, terms = mean_loss(adapted, rows, settings)
    without, _ = mean_loss(adapted, [rows[0], rows[2]], settings)
    assert terms == 2
    assert torch.equal(loss(), without())


def test_examples_are_drawn_with_the_seed(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "many.jsonl", [{"text": str(number)} for number in range(50)])
    first = read_rows(options(adapters[0], path, examples=5))
    assert len(first) == 5
    assert read_rows(options(adapters[0], path, examples=5)) == first
    assert read_rows(options(adapters[0], path, examples=5, seed=1)) != first
    assert len(read_rows(options(adapters[0], path, examples=99))) == 50


def test_the_loss_of_texts_is_over_all_tokens(adapted: Adapted, adapters: tuple[Path, Path], texts: Path) -> None:
    for batch_size in (1, 4, 6):
        settings = options(adapters[0], texts, batch_size=batch_size)
        rows = read_rows(settings)
        loss, terms = mean_loss(adapted, rows, settings)
        lengths = [len(row["text"].split()) - 1 for row in rows]
        losses = [by_hand(adapted, row["text"], row["text"].split()[1:]) for row in rows]
        expected = sum(one * length for one, length in zip(losses, lengths, strict=True)) / sum(lengths)
        assert terms == sum(lengths)
        assert loss().item() == pytest.approx(expected, rel=1e-10)


def test_only_a_completion_and_its_end_count(adapted: Adapted, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "is it good ", "completion": "yes it is "}])
    loss, terms = mean_loss(adapted, read_rows(settings := options(adapters[0], data)), settings)
    assert terms == 4
    expected = by_hand(adapted, "is it good yes it is </s>", ["yes", "it", "is", "</s>"])
    assert loss().item() == pytest.approx(expected, rel=1e-10)


def test_only_answers_of_a_conversation_count(adapted: Adapted, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "is it good"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "bad film"},
        {"role": "assistant", "content": "no it is good"},
    ]
    data = write_rows(tmp_path / "chat.jsonl", [{"messages": messages}])
    loss, terms = mean_loss(adapted, read_rows(settings := options(adapters[0], data)), settings)
    assert terms == 7
    ids = torch.tensor([adapted.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]])
    labels = torch.full_like(ids, IGNORED)
    labels[0, 6:8], labels[0, -5:] = ids[0, 6:8], ids[0, -5:]
    expected = cross_entropy(adapted.model(ids).logits[0, :-1], labels[0, 1:])
    assert loss().item() == pytest.approx(expected.item(), rel=1e-10)


def test_what_is_too_long_is_cut_and_what_counts_no_token_left_out(
    adapted: Adapted, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = [{"prompt": "a b c d e f g h ", "completion": "yes"}, {"prompt": "a ", "completion": "no"}]
    settings = options(adapters[0], write_rows(tmp_path / "long.jsonl", rows), max_length=4)
    loss, terms = mean_loss(adapted, rows, settings)
    assert terms == 2
    assert loss().item() == pytest.approx(by_hand(adapted, "a no </s>", ["no", "</s>"]), rel=1e-10)
    with pytest.raises(MisconfigurationException, match="no token counts within --max_length 4: take a larger one"):
        mean_loss(adapted, rows[:1], settings)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": 3}, "example 0 of those drawn: ValueError('text input must be of type `str`"),
        ({"messages": [{"content": "a"}]}, "example 0 of those drawn: KeyError('role')"),
    ],
)
def test_rows_that_can_not_be_used(
    row: dict[str, Any], says: str, adapted: Adapted, adapters: tuple[Path, Path], texts: Path
) -> None:
    with pytest.raises(MisconfigurationException) as raised:
        mean_loss(adapted, [row], options(adapters[0], texts))
    assert says in str(raised.value)
