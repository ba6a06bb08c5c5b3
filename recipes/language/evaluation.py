"""What validation and test measure."""

from collections.abc import Collection, Mapping
from typing import cast

import lightning as L
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from recipes.language.batches import Batch
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
