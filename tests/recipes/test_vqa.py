"""The recipe on tiny random vision-language models of two kinds, with drawn images of different sizes."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from recipe_runs import trainer
from torch import Tensor
from vqa_models import draw, prepared

from recipes.language.batches import LengthBatchSampler
from recipes.pretrain import vqa as offline
from recipes.vqa.data import VQAData
from recipes.vqa.model import DEFAULT_LORA, load_processor
from recipes.vqa.module import VQA

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

# -- what is measured


def test_validation_answers_its_first_questions_and_testing_all(
    tiny_vlm: str, drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = VQAData(drawn, batch_size=4, validation_share=0.3, test_share=0.3)
    module = VQA(tiny_vlm, DEFAULT_LORA, validation_answers=5)
    asked: list[str] = []

    def answers(prompts: dict[str, Tensor]) -> list[str]:
        texts = module.processor.tokenizer.batch_decode(prompts["input_ids"])
        asked.extend(texts)
        return ["no" if "is it" in text else "red" for text in texts]

    monkeypatch.setattr(module, "answers", answers)
    (results,) = trainer(tmp_path).validate(module, data, verbose=False)
    first = len(asked)
    assert 5 <= first < 9  # whole batches are answered
    rows = data.parts["validation"]
    order = list(chain.from_iterable(LengthBatchSampler(rows["length"], 4, data.seed, shuffle=False)))
    compared = [rows[place] for place in order[:5]]
    right = [row["answers"][0] == ("no" if row["type"] == "yes/no" else "red") for row in compared]
    assert results["val_exact_match"] == pytest.approx(sum(right) / 5)  # and five answers are compared
    assert set(results) == {"val_loss", "val_exact_match", "val_exact_match_colour", "val_exact_match_yes_no"}
    (results,) = trainer(tmp_path).test(module, data, verbose=False)
    rows = list(data.parts["test"])
    assert len(asked) == first + len(rows)
    colours = [row["answers"][0] == "red" for row in rows if row["type"] == "colour"]
    yes_no = [row["answers"][0] == "no" for row in rows if row["type"] == "yes/no"]
    assert results["test_exact_match_colour"] == pytest.approx(sum(colours) / len(colours))
    assert results["test_exact_match_yes_no"] == pytest.approx(sum(yes_no) / len(yes_no))
    assert results["test_exact_match"] == pytest.approx(sum(colours + yes_no) / len(rows))


# -- the offline model


def test_the_offline_model_is_trained_once(
    drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(offline, "BATCH", 4)
    with pytest.raises(MisconfigurationException, match=r"trained first.*python -m recipes.pretrain.vqa"):
        VQA("packaged", DEFAULT_LORA).prepare_data()
    folder = offline.build(steps=2, dataset=drawn)
    with monkeypatch.context() as patch:
        patch.setattr(VQA, "training_step", None)  # nothing may be trained again
        assert offline.build(steps=2, dataset=drawn) == folder
    assert "delete" in capsys.readouterr().out
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}
    module = VQA("packaged", DEFAULT_LORA)
    module.configure_model()
    processor = load_processor("packaged")
    start = offline.build_model(processor.tokenizer).get_input_embeddings().weight
    assert module.net.get_input_embeddings().weight.shape == start.shape
    assert processor.tokenizer.decode(processor.tokenizer("Wörter, 多")["input_ids"]) == "Wörter, 多"  # any text


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "packaged:easy_vqa", "split": "dev"}, "has no split 'dev': give another one"),
        ({"check_images": False, "skip_unreadable": True}, "skip_unreadable needs check_images"),
        ({"image_folder": "gone"}, "image_folder='gone': there is no folder gone"),
        ({"max_length": 5}, "nothing is left.*30 left out: longer than max_length=5 tokens"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, tiny_vlm: str, drawn: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        prepared("fit", tiny_vlm, **{"dataset": drawn, **options})


ROW = {"image": "0.png", "question": "why?", "answer": "so"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "0.png", "reply": "b"}, r"columns \['image', 'reply'\].*'question' or .*; 'answers' or 'answer'"),
        (ROW | {"image": None}, "1 of 1 rows can't be used: row 0 has 0 images, but needs one. Nothing is left"),
        (ROW | {"image": "broken.png"}, r"broken.png \(.*cannot identify"),
        (ROW | {"image": "gone.png"}, r"gone.png \(no such file\)"),
        (ROW | {"image": "line.jpg"}, r"line.jpg \(1 x 300 pixels: it may be at most 200 times as long as wide\)"),
        (ROW | {"question": "what is an <image>?"}, "holds '<image>', the mark of an image"),
        (ROW | {"question": ["why?"]}, r"row 0 must have a text as question, got \['why\?'\]"),
        (ROW | {"answer": None, "answers": [{"text": "so"}]}, r"must have a text as answer, got \{'text': 'so'\}"),
        (ROW | {"choices": ["so", None], "answer": 0}, r"a list of at most 26 texts as choices: \['so', None\]"),
        (ROW | {"A": "so", "B": "no"}, "write the options' columns into one list 'choices'"),
    ],
)
def test_bad_rows_are_named(row: Any, message: str, tiny_vlm: str, tmp_path: Path, jsonl: Any) -> None:
    draw(tmp_path, 1)
    (tmp_path / "broken.png").write_text("no image")
    Image.new("RGB", (1, 300)).save(tmp_path / "line.jpg")
    with pytest.raises(MisconfigurationException, match=message):
        prepared("fit", tiny_vlm, dataset=jsonl([row]), validation_share=0)


def test_predict_needs_questions(tiny_vlm: str, tmp_path: Path, jsonl: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"predict needs --data.questions"):
        prepared("predict", tiny_vlm)
    with pytest.raises(MisconfigurationException, match=r"needs 'image' or 'images'"):
        prepared("predict", tiny_vlm, questions=jsonl([{"question": "why?"}]))


def test_predict_asks_as_fit_does(tiny_vlm: str, tmp_path: Path, jsonl: Any) -> None:
    draw(tmp_path, 1)
    line = {"image": "0.png", "question": "who?", "choices": ["a cat", "a dog"], "hint": "Look."}
    asked = prepared("predict", tiny_vlm, questions=jsonl([line])).parts["predict"]
    assert "Look.\nwho?\nA. a cat\nB. a dog\nAnswer with the letter of the right choice." in asked[0]["prompt"]
    assert asked[0]["name"] == "0.png"


def test_bad_models_are_named(tiny_vlm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    with pytest.raises(MisconfigurationException, match=r"model='nowhere/at-all' can't be loaded.*'packaged'"):
        _ = VQA("nowhere/at-all", DEFAULT_LORA).processor
    tokenizer = load_processor(tiny_vlm).tokenizer.backend_tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "text")
    transformers.LlamaConfig().save_pretrained(tmp_path / "text")
    with pytest.raises(MisconfigurationException, match=r"takes no images and text.*vision-language model"):
        load_processor(str(tmp_path / "text"))
    with pytest.raises(MisconfigurationException, match=r"lora=null.*needs dtype='float32' .*got 'bfloat16'"):
        VQA(tiny_vlm, None, "bfloat16")
