"""What the tests of both demos share: a tiny encoder, and runs whose results are invented."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from recipes.demo.encoder import CutEncoder
from recipes.language.texts import Example
from recipes.shared import packaged


def made_up() -> Iterator[Example]:
    for label, words in enumerate((("heart", "blood", "vein"), ("tooth", "gum", "molar"))):
        for number in range(60):
            text = f"{words[number % 3]} {'and so on ' * (number % 4)}{number}"
            yield Example(text, label, text)


def bert(layers: int, dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).to(dtype)


@cache
def cut_in_two() -> CutEncoder:
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged.minilm())
    return CutEncoder(bert(2), tokenizer, frozen_layers=1, length=32)


def stopped_and_resumed(
    main: Callable[[list[str]], int], folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Start a demo whose fifth run is stopped, start it again, and give what it has printed then."""
    command = ["--folder", str(folder), "--precision", "32-true", *options]
    assert main(command) == 130
    assert "The same command resumes" in capsys.readouterr().out
    assert main(command) == 0
    return " ".join(capsys.readouterr().out.split())
