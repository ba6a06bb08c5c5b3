"""The LightningModule: a classifier of texts."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from recipes.classification.data import TextData
from recipes.classification.metrics import chosen_metrics, new_metric
from recipes.classification.readouts import Batch, LabelWords, NewHead
from recipes.language.model import PACKAGED_ENCODER
from recipes.language.module import PretrainedModel
from recipes.shared.diverged import wrong_where_nan
from recipes.shared.predictions import PredictionWriter


class TextClassification(PretrainedModel):
    """A pretrained model with LoRA that tells the class of a text or a number, by a new head or by label words.

    A head is trained plainly beside the adapter: the methods perturb the weights that LoRA adapts, and no others. The
    loss is the cross-entropy over the classes, or the squared error of the number.

    Args:
        model: a Hub name or a local directory that AutoModelForSequenceClassification loads (with ``label_words``
            AutoModelForMaskedLM or AutoModelForCausalLM), or "packaged:minilm" for all-MiniLM-L6-v2.
        metrics: some of "accuracy", "f1" and "matthews" for classes, "pearson" and "spearman" for a regression; the
            first is logged as the score, too. None is accuracy, or both correlations.
        label_words: a word of one token for each class, which the model predicts where the data's template says; None
            gives the model a new head.
        head_learning_rate: of what is trained beside the adapter, at its highest; None is ``learning_rate``.
        start_from: folder of another run's adapter, whose LoRA weights this one starts from; the head is new. Only
            `fit` reads it; a run that resumes from a checkpoint may leave it out.
        predictions: name of the file that `predict` writes, .jsonl or .csv.
        kwargs: of the next class: the optimizer's settings, and for FMLoRA's module rho and others.
    """

    packaged_model = PACKAGED_ENCODER

    def __init__(
        self,
        metrics: str | list[str] | None = None,
        label_words: Mapping[str, str] | None = None,
        head_learning_rate: float | None = None,
        start_from: str | None = None,
        predictions: str = "predictions.jsonl",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.wanted_metrics = [metrics] if isinstance(metrics, str) else metrics
        self.metric_names: list[str] = []
        self.readout = NewHead() if label_words is None else LabelWords(label_words)
        self.head_learning_rate = head_learning_rate
        self.start_from = start_from
        self.writer = PredictionWriter(predictions, "texts")
        self.metrics: Any = nn.ModuleDict()

    @property
    def data(self) -> TextData:
        """The data that the trainer was given."""
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    @override
    def load_adapted(self) -> Any:
        self._add_metrics()
        return self.readout.load(self.model_name, self.lora, self.weights_dtype(), self.data, self.tokenizer)

    @override
    def must_fit(self) -> dict[str, Any]:
        # A label is a place in the list of classes, so another list would give each of them another meaning.
        return {"classes": list(self.data.classes)}

    def _add_metrics(self) -> None:
        """Metrics of every part; they depend on the number of classes, which only the data know."""
        classes = len(self.data.classes)
        self.metric_names = chosen_metrics(self.wanted_metrics, classes)
        for stage in (*self._validations(), "test"):
            self.metrics[f"{stage}_loss"] = MeanMetric()
            for name in self.metric_names:
                self.metrics[f"{stage}_{name}"] = new_metric(name, classes)

    def _validations(self) -> list[str]:
        """Return what the metrics of each validation part begin with."""
        return ["val", *self.data.validation_parts[1:]]

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        head = [parameter for name, parameter in trained if ".modules_to_save." in name]
        adapter = [parameter for name, parameter in trained if ".modules_to_save." not in name]
        if head:
            rate = self.learning_rate if self.head_learning_rate is None else self.head_learning_rate
            return [{"params": adapter}, {"params": head, "lr": rate}]
        if self.head_learning_rate is not None:
            raise MisconfigurationException(
                f"head_learning_rate={self.head_learning_rate}, and nothing is trained beside the adapter: set it to "
                "null, or name modules in lora.modules_to_save"
            )
        return [{"params": adapter}]

    def logits(self, batch: Batch) -> Tensor:
        """Of the classes, or the number, float32, (rows, classes or 1)."""
        return self.readout.logits(self.net, batch)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Each row's loss: its cross-entropy in nats, or the squared error of its number."""
        if self.data.regression:
            return (logits.squeeze(1) - labels).square()
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    @override
    def loss(self, batch: Batch) -> Tensor:
        loss = self.losses(self.logits(batch), batch["labels"]).mean()
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(self._validations()[dataloader_idx], batch)

    @override
    def on_validation_epoch_end(self) -> None:
        for stage in self._validations():
            self.log_evaluation(stage)

    @override
    def evaluate(self, stage: str, batch: Batch) -> None:
        logits, labels = self.logits(batch), batch["labels"]
        predicted = logits.squeeze(1) if self.data.regression else wrong_where_nan(logits, labels).argmax(dim=1)
        self.metrics[f"{stage}_loss"].update(self.losses(logits, labels))
        for name in self.metric_names:
            self.metrics[f"{stage}_{name}"].update(predicted, labels)

    @override
    def log_evaluation(self, stage: str) -> None:
        for name in ("loss", *self.metric_names):
            self.log(f"{stage}_{name}", self.metrics[f"{stage}_{name}"], prog_bar=True)
        self.log(f"{stage}_score", self.metrics[f"{stage}_{self.metric_names[0]}"])

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """The texts of each row by their columns, with ``class`` and its ``probability``, or with ``number``."""
        logits = self.logits(batch)
        if self.data.regression:
            found = [{"number": number} for number in logits.squeeze(1).tolist()]
        else:
            probabilities, labels = logits.softmax(dim=1).max(dim=1)
            found = []
            for label, probability in zip(labels.tolist(), probabilities.tolist(), strict=True):
                found.append({"class": self.data.classes[label], "probability": probability})
        rows = []
        for texts, of_row in zip(batch["texts"], found, strict=True):
            rows.append({**dict(zip(self.data.text_columns, texts, strict=True)), **of_row})
        return rows
