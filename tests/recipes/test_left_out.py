"""Rows with nothing to learn: every recipe leaves them out, and says how many and which."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from clip_contrastive_runs import save_pictures
from hub_sets import prepared as classification
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from vqa_models import draw
from vqa_models import prepared as vqa

from recipes.clip_contrastive import sources as pictures
from recipes.nlg.data import MeaningData

pytestmark = pytest.mark.usefixtures("own_datasets")
ALL: dict[str, Any] = {"validation_share": 0.0, "test_share": 0.0}


def test_of_a_csv_file_of_texts(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv"
    lines = [f"film {i},{('bad', 'good')[i % 2]}" for i in range(8)]
    file.write_text("\n".join(["text,label", *lines[:5], ",good", "  ,bad", *lines[5:]]))
    with pytest.warns(UserWarning, match=r"reviews.csv': 2 of 10 rows can't be used: row 5 has no text; row 6 has no"):
        data = classification(tiny, dataset=str(file), **ALL)
    assert data.parts["train"]["labels"][:] == [0, 1] * 4
    file.write_text("text,label\n,good\n,bad")
    with pytest.raises(MisconfigurationException, match=r"2 of 2 rows can't be used: .*Nothing is left"):
        classification(tiny, dataset=str(file), **ALL)


def test_of_texts_to_predict(tiny: str, jsonl: Any, tmp_path: Path) -> None:
    table = jsonl([{"text": f"film {i}", "label": i % 2} for i in range(4)])
    (tmp_path / "new.csv").write_text("id,text\n0,\n1,a film")
    with pytest.warns(UserWarning, match=r"predict_file=.*1 of 2 rows can't be used: row 0 has no text"):
        data = classification(tiny, "predict", dataset=table, predict_file=str(tmp_path / "new.csv"))
    assert data.parts["predict"]["texts"][:] == [["a film"]]


def test_one_text_of_a_pair_may_be_empty(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "mails.csv"
    file.write_text("subject,body,label\n,Hello,ham\nWin!,,spam\n")
    data = classification(tiny, dataset=str(file), text=["subject", "body"], **ALL)
    assert len(data.parts["train"]) == 2


MESSAGES = [{"role": "user", "content": "<image>Why?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ({"question": "why?", "answer": "so"}, {"answer": " "}, r"row 1 has no question or no answer"),
        ({"question": "why?", "answer": "so"}, {"question": ""}, "row 1 has no question or no answer"),
        ({"question": "why?", "answer": "so"}, {"images": ["0.png", "1.png"]}, "row 1 has 2 images, but needs one"),
        ({"messages": MESSAGES}, {"messages": MESSAGES[:1]}, "row 1 needs an alternating conversation of human"),
        ({"messages": MESSAGES}, {"messages": MESSAGES * 2}, "row 1 may have <image> once, in the first turn of the"),
        ({"messages": MESSAGES}, {"images": []}, "row 1 has 0 images, but needs one"),
    ],
)
def test_of_questions_about_images(
    good: Any, bad: Any, message: str, tiny_vlm: str, tmp_path: Path, jsonl: Any
) -> None:
    draw(tmp_path, 2)
    good = {"images": ["0.png"], **good}
    with pytest.warns(UserWarning, match=rf"data.jsonl': 1 of 3 rows can't be used: {message}.*left out"):
        data = vqa("fit", tiny_vlm, dataset=jsonl([good, {**good, **bad}, good]), **ALL)
    assert data.reports["train"].endswith("2 questions")


def meanings(gpt2: str, dataset: str, **settings: Any) -> MeaningData:
    data = MeaningData(dataset, tokenizer=gpt2, **ALL | settings)
    data.prepare_data()
    data.setup("fit")
    return data


def test_of_meanings_and_texts(gpt2: str, jsonl: Any) -> None:
    rows = [{"mr": "a", "ref": "b"}, {"mr": "a", "ref": " "}, {"mr": "", "ref": "b"}, {"mr": "c", "ref": ["d", ""]}]
    with pytest.warns(UserWarning, match="2 of 4 rows can't be used: row 1 has no text in 'ref'; row 2 .* in 'mr'"):
        data = meanings(gpt2, jsonl(rows))
    assert data.reports["train"].endswith("2 texts of 2 meanings")


def test_of_an_article_that_is_too_long(gpt2: str, jsonl: Any) -> None:
    """In an evaluation no text is generated for it, either, as it may be too long for the model."""
    rows = [{"article": "word " * (1 + 40 * (i == 3)), "highlights": f"a word {i}"} for i in range(5)]
    file = jsonl(rows)
    for part, name in (("train", file), ("validation", jsonl(rows, "other.jsonl"))):
        with pytest.warns(UserWarning, match="in the training split too") if part == "validation" else nullcontext():
            data = meanings(gpt2, file, max_length=20, validation_split=name if part == "validation" else None)
        assert data.reports[part].endswith("1 left out: no token of the text within max_length=20")
        assert len(data.parts[part]) == 4
    assert [row["meaning"] for row in data.meanings["validation"]] == ["word"]


def test_of_images_without_a_caption(tmp_path: Path, jsonl: Callable[..., str]) -> None:
    folder = Path(save_pictures(tmp_path / "drawn"))
    names = sorted(f"drawn/{path.name}" for path in folder.glob("*.png"))[:3]
    said = ["a shape", "", None]
    rows = [{"image": name, "caption": caption} for name, caption in zip(names, said, strict=True)]
    with pytest.warns(UserWarning, match="3 of 4 rows can't be used: .* has no caption; .*; row 4 has no image"):
        found = pictures.load_pictures(jsonl([*rows, {"image": "", "caption": "a"}]))
    assert [picture.captions for picture in found] == [("a shape",)]
