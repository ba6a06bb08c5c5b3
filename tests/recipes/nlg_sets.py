"""Small sets of meanings in E2E's formats, and tiny random GPT-2s to read them."""

import csv
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, Features, Value
from tokenizers import ByteLevelBPETokenizer

END = "<|endoftext|>"
NAMES = ("Blue Spice", "The Eagle", "Café Rouge", "Strada", "The Mill", "Zizzi", "Green Man", "Alimentum", "Wildwood")
AREAS = ("riverside", "city centre")


def meanings(first: int, last: int) -> list[tuple[str, list[str]]]:
    """Meanings in E2E's notation, each with two to four texts; each number gives a different meaning."""
    rows = []
    for i in range(first, last):
        name, area = f"{NAMES[i % len(NAMES)]} {i}", AREAS[i % 2]
        meaning = f"name[{name}], eatType[pub], priceRange[£20-25], area[{area}]"
        texts = [f"{name} is a pub in the {area} area.", f"In the {area} there is a pub, {name}. It costs £20-25."]
        texts += [f"{name}, a pub, costs £20-25 a dish."] * (i % 3)
        rows.append((meaning, texts))
    return rows


def save_e2e(folder: Path) -> str:
    """A folder like the converted branch of tuetschek/e2e_nlg: 36 meanings to train on, and 6 and 7 to evaluate on."""
    features = Features(meaning_representation=Value("string"), human_reference=Value("string"))
    for split, (first, last) in {"train": (0, 36), "validation": (36, 42), "test": (42, 49)}.items():
        rows = []
        for meaning, texts in meanings(first, last):
            rows += [{"meaning_representation": meaning, "human_reference": text} for text in texts]
        path = folder / "default" / split / "0000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(path)
    return str(folder)


def save_lora_text(path: Path, first: int = 0, last: int = 36) -> str:
    """A file in the format of LoRA's repository."""
    lines = []
    for meaning, texts in meanings(first, last):
        lines += [f"{meaning}||{text} \n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def save_csv(path: Path, first: int = 0, last: int = 36) -> str:
    """A file with the columns of E2E's own CSV files."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["mr", "ref"])
        for meaning, texts in meanings(first, last):
            table.writerows([meaning, text] for text in texts)
    return str(path)


def save_gpt2(folder: Path, **settings: Any) -> str:
    """A random GPT-2 of two layers, with a matching tokenizer."""
    tokenizer = ByteLevelBPETokenizer()
    lines = []
    for meaning, texts in meanings(0, 50):
        lines += [f"{meaning} {text}" for text in texts]
    tokenizer.train_from_iterator(lines, 400, special_tokens=[END], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    fast = transformers.GPT2TokenizerFast.from_pretrained(folder)
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=160,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        initializer_range=0.2,
        **settings,
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)
