"""What validation and test measure, and where predicted answers go."""

import json
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

import lightning as L
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from recipes.language.batches import Batch
from recipes.shared.files import set_aside
from recipes.shared.predictions import run_folder
from recipes.shared.ranks import gathered
from recipes.shared.text_metrics import is_same


class Perplexity(MeanMetric):
    """exp of the mean negative log-likelihood per token."""

    @override
    def compute(self) -> Tensor:
        return super().compute().exp()


def log_updated(
    module: L.LightningModule, stage: str, metrics: Mapping[str, MeanMetric], shown: Collection[str]
) -> None:
    """Log the metrics that some rank's data has updated, at the end of an evaluation; every rank has to call it.

    Args:
        module: that logs them.
        stage: "val" or "test", with which the names begin.
        metrics: by name, in the same order on all ranks.
        shown: names of those for the progress bar.
    """
    for name, metric in metrics.items():
        if module.trainer.strategy.reduce_boolean_decision(metric.update_called, all=False):
            metric.update(0.0, weight=0.0)  # changes nothing; torchmetrics warns of ranks without an update
            module.log(f"{stage}_{name}", metric, prog_bar=name in shown)


class EvaluationMetrics(nn.Module):
    """Metrics of one evaluation: loss and perplexity per answer token, accuracy of choices or free answers.

    Attributes:
        compared: free answers that the ranks have compared so far, at most as many as there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.perplexity = Perplexity()
        self.accuracy = MeanMetric()
        self.exact_match = MeanMetric()
        self.compared = 0

    def log(self, module: L.LightningModule, stage: str) -> None:
        """Log those that some rank's data has updated, at the end of an evaluation; every rank has to call it."""
        self.compared = 0
        metrics = cast("dict[str, MeanMetric]", dict(self.named_children()))
        log_updated(module, stage, metrics, shown=("loss", "accuracy", "exact_match"))

    def update_loss(self, log_likelihood: Tensor, tokens: Tensor) -> None:
        """Take up right answers' log-likelihoods in nats and numbers of tokens, each (examples,)."""
        for metric in (self.loss, self.perplexity):
            metric.update(-log_likelihood / tokens, tokens)

    def update_choices(self, scores: Tensor, batch: Batch) -> None:
        """Take up whether each example's best option is the right one; scores (rows,) are mean log-likelihoods."""
        first = 0
        for count, gold in zip(batch["options"], batch["gold"].tolist(), strict=True):
            if count > 1:
                of_options = scores[first : first + count]
                # Of a model that has diverged argmax would take the first option.
                is_right = (of_options.argmax() + first == gold) & ~of_options.isnan().any()
                self.accuracy.update(is_right.float())
            first += count

    def update_exact_match(self, answers: list[str], expected: list[str]) -> None:
        """Take up whether answers equal the expected ones except for case, punctuation and spaces."""
        for answer, right in zip(answers, expected, strict=True):
            self.exact_match.update(float(is_same(answer, right)))


class AnswerWriter(L.Callback):
    """Print predicted answers, and write them as JSON lines into the run's folder: all ranks' into one file."""

    def __init__(self) -> None:
        self._written = 0

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._written = 0
        path = self._path(trainer)
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            set_aside(path)
            path.touch()

    @override
    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        path = self._path(trainer)
        numbered = list(chain.from_iterable(gathered(list(zip(batch["line"], outputs, strict=True)))))
        if not trainer.is_global_zero:
            return
        with path.open("a", encoding="utf-8") as lines:
            for line, row in sorted(numbered, key=lambda pair: pair[0]):
                if line < self._written:  # the ranks' last batches are filled up with the first prompts
                    continue
                self._written += 1
                print(f"> {row['prompt']}\n{row['answer']}\n")
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = self._path(trainer)
        if trainer.is_global_zero:
            print(f"Answers are in {path}")

    def _path(self, trainer: L.Trainer) -> Path:
        return run_folder(trainer) / "answers.jsonl"
