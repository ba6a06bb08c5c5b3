"""Sources of meanings and texts, how they are divided and encoded, and what is refused before training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import transformers
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nlg_sets import END, meanings, save_csv, save_e2e, save_lora_text

from recipes.language.chat import IGNORED
from recipes.nlg.data import MeaningData, PairEncoder
from recipes.nlg.sources import LAYOUTS, read_pairs, read_source

pytestmark = pytest.mark.usefixtures("own_datasets")


def prepared(model: str, dataset: str, stage: str = "fit", **settings: Any) -> MeaningData:
    data = MeaningData(dataset, tokenizer=model, **{"validation_share": 0.1, "test_share": 0.1} | settings)
    data.prepare_data()
    data.setup(stage)
    return data


def lines(data: MeaningData, part: str) -> list[str]:
    return [data.encoder.tokenizer.decode(ids) for ids in data.parts[part]["input_ids"]]


def test_a_test_on_a_copy_of_the_training_data_is_warned_of(gpt2: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    save_csv(tmp_path / "mine" / "train.csv")
    copy = save_csv(tmp_path / "copy.csv")
    with pytest.warns(UserWarning, match="test: 36 of 36 meanings are in the training split too"):
        prepared(gpt2, str(tmp_path / "mine"), "test", validation_share=0.0, test_share=None, test_split=copy)


EXPECTED: list[str] = []
for meaning, texts in meanings(0, 36):
    EXPECTED += [f"{meaning}{END} {text}{END}" for text in texts]


@pytest.mark.parametrize("kind", ["hub", "csv", "lora", "jsonl", "parquet"])
def test_every_format_gives_the_same_pairs(kind: str, gpt2: str, tmp_path: Path) -> None:
    saved = save_csv(tmp_path / "train.csv")
    names = {"hub": save_e2e(tmp_path / "e2e"), "csv": saved, "lora": save_lora_text(tmp_path / "train.txt")}
    table = datasets.load_dataset("csv", data_files=saved, split="train")
    names |= {"jsonl": str(tmp_path / "train.jsonl"), "parquet": str(tmp_path / "train.parquet")}
    table.to_json(names["jsonl"])
    table.to_parquet(names["parquet"])
    held_out = save_csv(tmp_path / "other.csv", 36, 40)
    data = prepared(gpt2, names[kind], validation_split=held_out, test_share=0.0)
    assert lines(data, "train") == EXPECTED
    assert [row["meaning"] for row in data.meanings["validation"]] == [meaning for meaning, _ in meanings(36, 40)]
    assert [row["references"] for row in data.meanings["validation"]] == [texts for _, texts in meanings(36, 40)]


@pytest.mark.parametrize(("meaning", "text"), LAYOUTS)
def test_usual_columns_are_found(meaning: str, text: str) -> None:
    table = datasets.Dataset.from_list([{meaning: "a", text: "b", "id": 1}])
    assert read_pairs(table, "a file") == [{"meaning": "a", "text": "b"}]


def test_columns_may_have_any_names_and_hold_lists(gpt2: str, jsonl: Any) -> None:
    file = jsonl([{"in": meaning, "out": texts, "mr": "other", "ref": "other"} for meaning, texts in meanings(0, 36)])
    data = prepared(gpt2, file, meaning="in", text="out", validation_share=0.0, test_share=0.0)
    assert lines(data, "train") == EXPECTED


def test_shares_keep_the_texts_of_a_meaning_together(gpt2: str, tmp_path: Path) -> None:
    data = prepared(gpt2, save_csv(tmp_path / "train.csv"), validation_share=0.3, test_share=0.3)
    data.setup("test")
    rows = lines(data, "train") + lines(data, "validation") + lines(data, "test")
    assert sorted(rows) == sorted(EXPECTED)
    number = 0
    for part in ("train", "validation", "test"):
        heads = {line.split(END)[0] for line in lines(data, part)}
        assert heads
        number += len(heads)
    assert number == 36


def test_a_test_reads_its_own_file_alone(tmp_path: Path) -> None:
    data = MeaningData(str(tmp_path / "gone.csv"), test_split=save_csv(tmp_path / "test.csv"))
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.TESTING))  # type: ignore[assignment]
    data.prepare_data()


def test_evaluation_takes_pairs_and_as_many_meanings_as_are_asked_for(gpt2: str, tmp_path: Path) -> None:
    own = {"validation_split": "validation", "test_split": "test"}
    data = prepared(gpt2, save_e2e(tmp_path / "e2e"), **own, validation_texts=4)
    pairs, asked = data.val_dataloader()
    assert sum(len(batch["labels"]) for batch in pairs) == len(data.parts["validation"])
    numbers = []
    for batch in asked:
        numbers += batch["number"]
    assert sorted(numbers) == [0, 1, 2, 3]
    data.validation_texts = 0
    assert len(data.val_dataloader()) == 1
    data.setup("test")
    assert sum(len(batch["number"]) for batch in data.test_dataloader()[1]) == 7


def test_a_model_that_begins_with_a_token_gets_it(gpt2: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    assert PairEncoder(tokenizer, 9).prompt("pub") == [*tokenizer("pub")["input_ids"], tokenizer.eos_token_id]

    class Beginning:
        bos_token_id, eos_token_id, name_or_path = 1, 2, "beginning"

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    encoded = PairEncoder(Beginning(), 9).encode("a", "b")
    assert encoded[:3] == ([1, 97, 2, 32, 98, 2], [IGNORED] * 3 + [32, 98, 2], False)
    Beginning.eos_token_id = None  # type: ignore[assignment]
    with pytest.raises(MisconfigurationException, match="has no end token"):
        PairEncoder(Beginning(), 9)


def test_a_test_is_named_by_its_own_file(gpt2: str, tmp_path: Path) -> None:
    files = [save_csv(tmp_path / "mine.csv", 0, 4), save_csv(tmp_path / "held_out.csv", 4, 8)]
    data = prepared(gpt2, files[0], "test", test_split=files[1])
    assert data.reports["test"].startswith(f"{files[1]}, test: ")


# -- what is refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "reply": "b"}], r"has the columns \['question', 'reply'\].*mr and ref"),
        ([{"mr": "a", "ref": [1]}], "row 0 needs a text, but holds 1"),
        ([{"mr": "word " * 40, "ref": "b"}], "nothing is left to use.*no token of the text within max_length=20"),
    ],
)
def test_bad_rows_are_refused_before_training(gpt2: str, jsonl: Any, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        prepared(gpt2, jsonl(rows), validation_share=0.0, test_share=0.0, max_length=20)


def test_bad_settings_and_files_are_refused_before_training(gpt2: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"batch_size must be .*; max_length must be an integer >= 3"):
        MeaningData("data.csv", batch_size=0, max_length=1)
    with pytest.raises(MisconfigurationException, match="leave something to train on"):
        MeaningData("data.csv", validation_share=0.5, test_share=0.5)
    (tmp_path / "bad.txt").write_text("a||b\n\nno text here\n")
    with pytest.raises(MisconfigurationException, match=r"line 3 is not meaning\|\|text"):
        prepared(gpt2, str(tmp_path / "bad.txt"))


def test_a_text_may_hold_the_separator_and_rare_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("a||b || c\r\nd||e\u2028f\n", encoding="utf-8")
    pairs = read_pairs(read_source(str(path), "train"), "data")
    assert [(pair["meaning"], pair["text"]) for pair in pairs] == [("a", "b || c"), ("d", "e\u2028f")]
