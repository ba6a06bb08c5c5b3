"""Tiny random vision-language models, and drawn images with questions about their colour.

Most tests use those in KINDS; there are more in tests/recipes/vqa_kinds.py.
"""

from pathlib import Path
from typing import Any

import torch
import vqa_kinds
from PIL import Image

from recipes.pretrain import vqa as offline
from recipes.vqa.data import VQAData

COLOURS = ("red", "green", "blue")


def idefics3(processor: Any) -> Any:
    return offline.build_model(processor.tokenizer, width=32, depth=2, spread=0.3), processor


KINDS = {"idefics3": idefics3, "qwen2_5_vl": lambda _: vqa_kinds.qwen2_5_vl()}


def save_model(kind: str, folder: Path) -> str:
    """Save a random model of a kind, and its processor; returns the folder's name."""
    processor = offline.build_processor([f"User: is it {colour}? Assistant: yes no" for colour in COLOURS])
    torch.manual_seed(0)
    model, processor = KINDS[kind](processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def draw(folder: Path, number: int = 24) -> list[dict[str, Any]]:
    """Draw images of one colour and of different sizes, with two questions each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(number):
        colour = COLOURS[i % 3]
        Image.new("RGB", (28 + 14 * (i % 4), 28 + 14 * (i % 3)), colour).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what colour is it?", "answer": colour, "type": "colour"})
        asked = COLOURS[i // 3 % 3]
        answer = "yes" if asked == colour else "no"
        rows.append({"image": f"{i}.png", "question": f"is it {asked}?", "answer": answer, "type": "yes/no"})
    return rows


def prepared(stage: str, processor: str, **options: Any) -> VQAData:
    data = VQAData(**{"processor": processor, "validation_share": 0.3, **options})
    if stage != "predict":  # prediction needs no data set
        data.prepare_data()
    data.setup(stage)
    return data


def first_batch(data: VQAData) -> Any:
    return next(iter(data.train_dataloader()))
