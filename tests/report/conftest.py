"""A tiny language model and classifier with two adapters each, and texts."""

from pathlib import Path

import pytest
import torch
from report_models import WORDS, save_adapter, save_base, write_rows


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="session")
def base(root: Path) -> Path:
    return save_base(root / "base")


@pytest.fixture(scope="session")
def adapters(root: Path, base: Path) -> tuple[Path, Path]:
    """Two of a causal language model, of different rank."""
    return save_adapter(root / "small", base), save_adapter(root / "large", base, rank=4)


@pytest.fixture(scope="session")
def classifiers(root: Path, base: Path) -> tuple[Path, Path]:
    """Two of a classifier of three classes, with heads of their own."""
    return (
        save_adapter(root / "classifier", base, task="SEQ_CLS"),
        save_adapter(root / "classifier_large", base, rank=4, task="SEQ_CLS"),
    )


@pytest.fixture(scope="session")
def texts(root: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (3, 9, 5, 7, 4, 6):
        words = [WORDS[index] for index in torch.randint(len(WORDS), (length,), generator=generator)]
        rows.append({"text": " ".join(words), "label": length % 3})
    return write_rows(root / "texts.jsonl", rows)
