"""CommonsenseQA by SmolLM2: of five answers the one whose text is the most likely."""

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from recipes.comparison.task import Batch, Judged, Task, with_network
from recipes.instruction_tuning.data import InstructionData
from recipes.instruction_tuning.module import InstructionTuning
from recipes.language.chat import PLAIN_TEMPLATE
from recipes.language.model import PACKAGED, PACKAGED_LORA, model_source, weights_dtype
from recipes.studies.plan import Config


class CommonsenseTask(Task):
    """Questions with five answers; settings: ``examples`` to train on, ``epochs`` and ``batch_size``."""

    model = PACKAGED

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._parts: dict[str, Any] = {}

    @override
    def module(self, config: Config, full: bool) -> InstructionTuning:
        module = InstructionTuning(
            model=self.model,
            lora={**PACKAGED_LORA, "lora_dropout": config.get("dropout", 0.0)},
            dtype="float32" if full else weights_dtype(self.precision),  # of the base: what is trained is in float32
            learning_rate=config["learning_rate"],
            weight_decay=config.get("weight_decay", 0.0),
        )
        ready: InstructionTuning = with_network(module, full)
        return ready

    @override
    def data(self, seed: int) -> InstructionData:
        data = InstructionData(
            "packaged:commonsense_qa",
            tokenizer=model_source(self.model),
            batch_size=self.settings["batch_size"],
            chat_template=PLAIN_TEMPLATE,
            validation_share=0.15,
            test_share=0.25,
            seed=seed,
        )
        # A copy, because the next lines put this seed's examples into it.
        data.parts = dict(self._tokenized(data))
        drawn = np.random.default_rng(seed).permutation(len(data.parts["train"]))[: self.settings["examples"]]
        data.parts["train"] = data.parts["train"].select(drawn)
        return data

    def _tokenized(self, data: InstructionData) -> dict[str, Any]:
        """All parts, once in a process."""
        if not self._parts:
            data.prepare_data()
            data.setup("fit")
            data.setup("test")
            self._parts = data.parts
        return self._parts

    @override
    def read(self, trainer: L.Trainer, part: str) -> list[Batch]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loaders = {"train": data.train_dataloader, "validation": data.val_dataloader, "test": data.test_dataloader}
        return list(loaders[part]())

    @override
    def loss(self, module: InstructionTuning, batch: Batch) -> Tensor:
        log_likelihood, tokens = module.log_likelihood(batch)
        return -log_likelihood.sum() / tokens.sum()

    @override
    def judge(self, module: InstructionTuning, batch: Batch) -> Judged:
        log_likelihood, tokens = module.log_likelihood(batch)
        gold, counts = batch["gold"], batch["options"]
        scores = torch.split(log_likelihood / tokens, counts)
        firsts = np.cumsum([0, *counts[:-1]]).tolist()
        correct = []
        for of_question, first, right in zip(scores, firsts, gold, strict=True):
            # Of a model that has diverged argmax would take the first option.
            correct.append((of_question.argmax() + first == right) & ~of_question.isnan().any())
        return Judged(torch.stack(correct).sum(), -log_likelihood[gold].sum(), tokens[gold].sum(), len(counts))
