"""Files of questions in the schemas of ScienceQA and VizWiz, and what makes a run on them short."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from vqa_models import COLOURS

QUICK = [
    "--trainer.precision=32-true",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.accumulate_grad_batches=1",
    "--trainer.log_every_n_steps=1",
    "--model.init_args.lora.r=2",
    "--model.init_args.max_new_tokens=3",
    "--data.init_args.batch_size=4",
    "--data.init_args.num_workers=0",
]
TEXT, TEXTS = datasets.Value("string"), [datasets.Value("string")]
SCIENCEQA = datasets.Features(
    {
        "image": datasets.Image(),
        "question": TEXT,
        "choices": TEXTS,
        "answer": datasets.Value("int8"),
        **dict.fromkeys(
            ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), TEXT
        ),
    }
)
VIZWIZ = datasets.Features(
    {"question_id": TEXT, "image": datasets.Image(), "question": TEXT, "answers": TEXTS, "category": TEXT}
)


def saved(folder: Path, build: Callable[[], Any]) -> str:
    torch.manual_seed(0)
    model, processor = build()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def drawn(place: int) -> Image.Image:
    return Image.new("RGB", (28 + 14 * (place % 4), 28 + place), COLOURS[place % 3])


def save_scienceqa(folder: Path, rows: int = 12) -> str:
    """A folder like the repository of derek-thomas/ScienceQA; every third question has no image."""
    for number, split in enumerate(("train", "validation", "test")):
        table: list[dict[str, Any]] = []
        for place in range(rows):
            row: dict[str, Any] = dict.fromkeys(SCIENCEQA, "")
            row |= {"question": "Which is it?", "choices": list(COLOURS), "answer": place % 3, "task": "closed choice"}
            row |= {"subject": ("natural science", "language science")[place % 2], "category": f"Colours {place}"}
            row["image"] = None if place % 3 == 2 else drawn(place + 20 * number)
            table.append(row)
        path = folder / "data" / f"{split}-00000-of-00001-1028f23e353fbe3e.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(table, features=SCIENCEQA).to_parquet(path)
    return str(folder)


def people(place: int) -> list[str]:
    return ["unanswerable"] * 10 if place % 4 == 0 else [COLOURS[place % 3]] * 6 + ["It's a colour."] * 4


def save_vizwiz_hub(folder: Path) -> str:
    """A folder like the repository of lmms-lab/VizWiz-VQA, whose test split has no answers."""
    for split, rows in (("val", 24), ("test", 3)):
        table = []
        for place in range(rows):
            row = {"question_id": f"VizWiz_{split}_{place:08}", "image": drawn(place), "question": "what colour is it?"}
            row["answers"] = people(place) if split == "val" else None
            row["category"] = "unanswerable" if place % 4 == 0 else "other"
            table.append(row)
        path = folder / "data" / f"{split}-00000-of-00001-7775fd61bc6a3d98.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(table, features=VIZWIZ).to_parquet(path)
    return str(folder)


def save_vizwiz(folder: Path) -> None:
    """A folder "vizwiz" like that of vizwiz.org's files."""
    (folder / "vizwiz" / "Annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / "vizwiz" / split).mkdir()
        rows = []
        for place in range(24):
            name = f"VizWiz_{split}_{place:08}.jpg"
            drawn(place).save(folder / "vizwiz" / split / name)
            given = [{"answer_confidence": "yes", "answer": answer} for answer in people(place)]
            row = {"image": name, "question": "what colour is it?", "answers": given, "answerable": int(place % 4 > 0)}
            rows.append(row | {"answer_type": "other" if place % 4 else "unanswerable"})
        (folder / "vizwiz" / "Annotations" / f"{split}.json").write_text(json.dumps(rows))
