"""The CLIP demo's few-shot task: a small CLIP that is trained here, and a style of drawing that it has never seen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora.callbacks.patches import silenced
from recipes.clip import emoji
from recipes.clip.model import DEFAULT_LORA
from recipes.clip_contrastive.pretrain import Pretraining, pretrained
from recipes.clip_fewshot.data import FewShotData
from recipes.clip_fewshot.emoji import emoji_data, examples
from recipes.clip_fewshot.module import FewShot
from recipes.comparison.task import Batch, Judged, Task, with_network
from recipes.shared.diverged import wrong_where_nan
from recipes.studies.plan import Config


class EmojiTask(Task):
    """Emoji in 23 classes; settings: ``shots`` of each class, ``steps_per_shot``, ``epochs`` (1) and ``batch_size``."""

    pretraining: Mapping[str, Any] = {}
    """What the small CLIP's training has other than usual."""

    @override
    def prepare(self) -> None:
        self._model()

    def _model(self) -> Path:
        """Folder of the small CLIP, trained in the precision of the runs."""
        return pretrained(Pretraining(**self.pretraining, precision=self.precision), emoji.prepare())

    @override
    def module(self, config: Config, full: bool) -> FewShot:
        module = FewShot(
            model=f"local-dir:{self._model()}",
            pretrained=None,
            lora={"r": 2, "lora_alpha": 1, "lora_dropout": config.get("dropout", DEFAULT_LORA["lora_dropout"])},
            learning_rate=config["learning_rate"],
            weight_decay=config.get("weight_decay", 0.01),
        )
        ready: FewShot = with_network(module, full)
        return ready

    @override
    def data(self, seed: int) -> FewShotData:
        images, settings = emoji.prepare().target, self.settings
        return emoji_data(images, settings["shots"], seed, settings["batch_size"], settings["steps_per_shot"])

    @override
    def read(self, trainer: L.Trainer, part: str) -> list[Batch]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.parts["test"] = data.parts["train"] if part == "train" else examples(emoji.prepare().target, part)
        return list(data.test_dataloader())  # which does not augment

    @override
    def loss(self, module: FewShot, batch: Batch) -> Tensor:
        # The loss logs itself, which Lightning refuses outside of its loops.
        with silenced(module):
            return module.loss(batch)

    @override
    def judge(self, module: FewShot, batch: Batch) -> Judged:
        probabilities, labels = module.probabilities(batch["images"]), batch["labels"]
        loss = nn.functional.nll_loss(probabilities.log(), labels, reduction="sum")
        correct = (wrong_where_nan(probabilities, labels).argmax(dim=1) == labels).sum()
        return Judged(correct, loss, torch.tensor(len(labels)), len(labels))
