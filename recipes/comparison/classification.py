"""Texts in classes by a small sentence encoder, with LoRA on its queries and values and a new head."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer
from typing_extensions import override

from recipes.comparison.task import Batch, Grids, Judged, Task, train_everything
from recipes.language import texts
from recipes.language.batches import pad
from recipes.language.texts import Example
from recipes.shared import packaged
from recipes.shared.diverged import wrong_where_nan
from recipes.shared.training import AutomaticTraining
from recipes.studies.plan import Config

_EVAL_BATCH = 64


class EncoderClassifier(AutomaticTraining):
    """all-MiniLM-L6-v2 with a head for the classes; LoRA of rank 8, alpha 16 on query and value, or all weights.

    Args:
        classes: their number.
        config: ``learning_rate`` (AdamW's at the start, linear to 0), ``weight_decay`` and ``dropout`` (the adapter's).
        full: train all weights, and no adapter.
    """

    def __init__(self, classes: int, config: Config, full: bool = False) -> None:
        super().__init__()
        self.config = config
        # Without the pooler, in whose place the mean over the tokens is taken.
        base = AutoModel.from_pretrained(packaged.minilm(), add_pooling_layer=False)
        base.train()  # from_pretrained gives it in eval mode, where dropout would be off
        dropout = config.get("dropout", 0.0)
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=["query", "value"])
        self.net = get_peft_model(base, lora)
        self.head = nn.Linear(base.config.hidden_size, classes)
        if full:
            train_everything(self.net)

    @override
    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch), batch["labels"])

    def logits(self, batch: Batch) -> Tensor:
        """Of the classes, from the mean over the tokens for which the encoder was made; float32, (n, classes)."""
        mask = batch["attention_mask"]
        hidden = self.net(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
        mean = (hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        logits: Tensor = self.head(mean)
        return logits.float()

    @override
    def new_optimizer(self) -> Optimizer:
        decay = self.config.get("weight_decay", 0.0)
        rate = self.config["learning_rate"]
        return torch.optim.AdamW(self.parameter_groups(), lr=rate, weight_decay=decay, fused=True)


class FewTexts(L.LightningDataModule):
    """The texts that a seed draws, in shuffled batches."""

    def __init__(self, examples: Sequence[Example], encode: Any, batch_size: int, seed: int) -> None:
        super().__init__()
        self.examples = examples
        self.encode = encode
        self.batch_size = batch_size
        self.seed = seed

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        # Of its own, so that all methods see the same batches, however many random numbers they draw.
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self.examples,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            generator=order,
            collate_fn=self.encode,
        )


class TextTask(Task):
    """Texts in classes.

    Args:
        name: of the task.
        settings: see below.
        grids: see :class:`Task`.
        data: a key of :data:`texts.TASKS`, several tasks' perhaps.

    Its settings: ``examples`` to train on, ``length``, tokens kept of a text, ``epochs``, ``batch_size``, and
    ``validation`` and ``test``, the largest number of examples of these parts.
    """

    def __init__(self, name: str, settings: dict[str, Any], grids: Grids, data: str) -> None:
        super().__init__(name, settings, grids)
        self.source = data
        self._tokenizer: Any = None
        self._ids: dict[str, Tensor] = {}

    @override
    def module(self, config: Config, full: bool) -> EncoderClassifier:
        return EncoderClassifier(len(texts.TASKS[self.source].classes), config, full)

    @override
    def data(self, seed: int) -> FewTexts:
        examples = texts.balanced_shots(self.source, self.settings["examples"], seed)
        return FewTexts(examples, self._encode, self.settings["batch_size"], seed)

    @override
    def read(self, trainer: L.Trainer, part: str) -> list[Batch]:
        if part == "train":
            return self._sorted(trainer.datamodule.examples)  # type: ignore[attr-defined]
        return self._sorted(texts.parts(self.source)[part][: self.settings[part]])

    @override
    def loss(self, module: EncoderClassifier, batch: Batch) -> Tensor:
        return module.loss(batch)

    @override
    def judge(self, module: EncoderClassifier, batch: Batch) -> Judged:
        logits, labels = module.logits(batch), batch["labels"]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        correct = (wrong_where_nan(logits, labels).argmax(dim=1) == labels).sum()
        return Judged(correct, loss, torch.tensor(len(labels)), len(labels))

    def _sorted(self, examples: Sequence[Example]) -> list[Batch]:
        """Batches of texts of similar length, each padded to its longest."""
        by_length = sorted(examples, key=lambda example: len(self._tokens(example.text)))
        starts = range(0, len(by_length), _EVAL_BATCH)
        return [self._encode(by_length[start : start + _EVAL_BATCH]) for start in starts]

    def _encode(self, examples: Sequence[Example]) -> Batch:
        ids = [self._tokens(example.text) for example in examples]
        labels = torch.tensor([example.label for example in examples])
        mask = pad([torch.ones_like(row) for row in ids], 0)
        return {"input_ids": pad(ids, 0), "attention_mask": mask, "labels": labels}

    def _tokens(self, text: str) -> Tensor:
        """Token ids of a text; each text is tokenized once in a process."""
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(packaged.minilm())
        if text not in self._ids:
            cut = self._tokenizer(text, truncation=True, max_length=self.settings["length"])
            self._ids[text] = torch.tensor(cut["input_ids"])
        return self._ids[text]
