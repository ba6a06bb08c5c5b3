"""Small data sets in the Hub's own layout and schema, and a tiny RoBERTa to read them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import AddedToken, ByteLevelBPETokenizer

from recipes.classification.data import TextData

_NLI = ["entailment", "neutral", "contradiction"]
GLUE: dict[str, tuple[list[str], list[str]]] = {
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "stsb": (["sentence1", "sentence2"], []),
    "mnli": (["premise", "hypothesis"], _NLI),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
}
"""Text columns and classes of nyu-mll/glue's configurations; STS-B has numbers."""


def save_glue(folder: Path) -> str:
    """Save a folder with nyu-mll/glue's layout: each row's text tells its label; labels of test splits are hidden."""
    configs = []
    for task, (texts, classes) in GLUE.items():
        endings = ("_matched", "_mismatched") if task == "mnli" else ("",)
        splits = ["train"]
        for part in ("validation", "test"):
            splits += [f"{part}{ending}" for ending in endings]
        features = dict.fromkeys(texts, Value("string"))
        features["label"] = ClassLabel(names=classes) if classes else Value("float32")
        features["idx"] = Value("int32")
        for number, split in enumerate(splits):
            rows = _rows(texts, len(classes), 48 if split == "train" else 24 - number, split)
            path = folder / task / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows, features=Features(features)).to_parquet(path)
        configs += [f"- config_name: {task}", "  data_files:"]
        for split in splits:
            configs += [f"  - split: {split}", f"    path: {task}/{split}-*"]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *configs, "---", ""]))
    return str(folder)


def _rows(texts: list[str], classes: int, number: int, split: str) -> list[dict[str, Any]]:
    rows = []
    for i in range(number):
        label: float = i % classes if classes else (i % 11) / 2
        row: dict[str, Any] = dict.fromkeys(texts, f"The film {split} {i} was " + "bad " * (i % 3))
        row[texts[-1]] += ("terrible ", "okay ", "great ")[int(label) % 3] * 3
        rows.append(row | {"label": -1 if split.startswith("test") else label, "idx": i})
    return rows


def save_roberta(folder: Path) -> str:
    """Save a random RoBERTa of two layers, whose tokenizer has the label words as single tokens."""
    words = "It was terrible bad okay good great Yes No Maybe Description Entity Expression Human Location Number"
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    lines = [f"The film train validation test {words}, {words}. {words}? ."] * 20
    tokenizer.train_from_iterator(lines, 600, min_frequency=2, special_tokens=special, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    mask = AddedToken("<mask>", lstrip=True, special=True)
    transformers.RobertaTokenizerFast.from_pretrained(folder, mask_token=mask).save_pretrained(folder)
    config = transformers.RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=140,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    return str(folder)


def prepared(model: Any, stage: str = "fit", **settings: Any) -> Any:
    """A data module after `setup`, with a model's tokenizer."""
    data = TextData(**{"validation_share": 0.15, "test_share": 0.25} | settings)
    module = type("Module", (), {"tokenizer": transformers.AutoTokenizer.from_pretrained(model)})()
    data.trainer = type("Trainer", (), {"lightning_module": module})()
    data.setup(stage)
    return data
