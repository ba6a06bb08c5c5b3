"""The metrics of validation and test."""

import lightning as L
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from recipes.language.batches import Batch
from recipes.training.ranks import gathered

_SHOWN = ("loss", "accuracy", "exact_match")


class Perplexity(MeanMetric):
    """exp of the mean negative log-likelihood per token."""

    @override
    def compute(self) -> Tensor:
        return super().compute().exp()


class Means(nn.Module):
    """The means of one evaluation by name; each is made with its first value, on any rank.

    Attributes:
        compared: number of answers that the ranks have compared so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.ModuleDict({"loss": MeanMetric()})
        self.compared = 0

    def __getitem__(self, name: str) -> MeanMetric:
        """Return the mean of this name; "perplexity" is that of a negative log-likelihood."""
        if name not in self.means:
            kind = Perplexity if name == "perplexity" else MeanMetric
            # In the middle of an evaluation, when the other metrics are on their device already.
            self.means[name] = kind().to(self["loss"].device)
        return self.means[name]  # type: ignore[return-value]

    def log(self, module: L.LightningModule, stage: str) -> None:
        """Log the means that any rank has updated, at the end of an evaluation; every rank must call it."""
        self.compared = 0
        updated = {name for name in self.means if self[name].update_called}
        for name in sorted(set().union(*gathered(updated))):
            self[name].update(0.0, weight=0.0)  # changes nothing; torchmetrics warns of ranks without an update
            # Lightning itself finds only attributes that were there when it first logged a metric.
            module.log(f"{stage}_{name}", self[name], prog_bar=name in _SHOWN, metric_attribute=name)


def right_choices(scores: Tensor, batch: Batch) -> list[Tensor]:
    """Return for each example with options 1 if the right one has the highest score, else 0.

    Args:
        scores: mean log-likelihood of each row, (rows,).
        batch: batch with the number of rows of each example, and its right row.
    """
    rights: list[Tensor] = []
    first = 0
    for count, gold in zip(batch["options"], batch["gold"].tolist(), strict=True):
        if count > 1:
            of_options = scores[first : first + count]
            # If the model has diverged, argmax would take the first option.
            is_right = (of_options.argmax() + first == gold) & ~of_options.isnan().any()
            rights.append(is_right.float())
        first += count
    return rights
