"""The LightningModule: a classifier of texts."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from recipes.classification.data import TextData
from recipes.classification.metrics import new_metrics
from recipes.classification.prompts import is_masked, word_tokens
from recipes.classification.readouts import Batch, head_logits, load_for_words, load_with_head, word_logits
from recipes.language.batches import padding_id
from recipes.language.model import PACKAGED_ENCODER
from recipes.language.module import PretrainedModel
from recipes.training.diverged import wrong_where_nan
from recipes.training.predictions import PredictionWriter


class TextClassification(PretrainedModel):
    """A pretrained model with LoRA that predicts a text's class or number, with a new head or by label words.

    The head is trained without perturbation: the methods perturb only the weights that LoRA adapts. The loss is the
    cross-entropy over the classes, or the squared error of the number.

    Args:
        model: a Hub name or a local directory that AutoModelForSequenceClassification loads (with ``label_words``
            AutoModelForMaskedLM or AutoModelForCausalLM), or "packaged:minilm" for all-MiniLM-L6-v2.
        metrics: some of "accuracy", "f1" and "matthews" for classes, "pearson" and "spearman" for a regression; the
            first is also logged as the score. None means accuracy, or both correlations.
        label_words: a word of one token for each class, which the model predicts at the place given by the data's
            template; None gives the model a new head.
        head_learning_rate: peak rate of the head and of all else that is trained next to the adapter; None means
            ``learning_rate``.
        start_from: folder of another run's adapter, whose LoRA weights this run starts from; the head is new. Only
            `fit` reads it; a run resumed from a checkpoint may omit it.
        predictions: name of the file that `predict` writes, .jsonl or .csv.
        kwargs: the optimizer's settings and, for FMLoRA's module, rho and others.
    """

    task = "text-classification"
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
        self.label_words = label_words
        self.word_ids: list[int] = []
        self.head_learning_rate = head_learning_rate
        self.start_from = start_from
        self.writer = PredictionWriter(predictions, "texts")
        self.metrics: Any = nn.ModuleDict()

    @property
    def data(self) -> TextData:
        """Return the data that the trainer was given."""
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    @override
    def load_adapted(self) -> Any:
        data, words, dtype = self.data, self.label_words, self.weights_dtype()
        if (words is None) != (data.template is None) or (words is not None and data.regression):
            raise MisconfigurationException(
                f"label_words={words} and template={data.template!r}: prompts need both, and classes; set "
                "model.label_words and data.template to null for a new head"
            )
        self._add_metrics()
        if words is None:
            names = data.classes or ["number"]
            return load_with_head(self.model_name, self.lora, dtype, names, padding_id(self.tokenizer))
        self.word_ids = word_tokens(words, data.classes, self.tokenizer)
        return load_for_words(self.model_name, self.lora, dtype, is_masked(str(data.template)))

    @override
    def must_fit(self) -> dict[str, Any]:
        # A label is an index into the list of classes, so another list would change its meaning.
        return {"classes": list(self.data.classes)}

    def _add_metrics(self) -> None:
        """Add the metrics, which need the data's number of classes."""
        for stage in ("val", "test"):
            found = new_metrics(self.wanted_metrics, len(self.data.classes))
            self.metric_names = list(found)
            for name, metric in {"loss": MeanMetric(), **found}.items():
                self.metrics[f"{stage}_{name}"] = metric

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
                f"head_learning_rate={self.head_learning_rate}, but nothing is trained next to the adapter: set it to "
                "null, or name modules in lora.modules_to_save"
            )
        return [{"params": adapter}]

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of the classes, or the number, float32, (rows, classes or 1)."""
        if self.label_words is None:
            return head_logits(self.net, batch)
        return word_logits(self.net, batch, self.word_ids, is_masked(str(self.data.template)))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return each row's loss: its cross-entropy in nats, or the squared error of its number."""
        if self.data.regression:
            return (logits.squeeze(1) - labels).square()
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    @override
    def loss(self, batch: Batch) -> Tensor:
        loss = self.losses(self.logits(batch), batch["labels"]).mean()
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return loss

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
        """Return the texts of each row by their columns, with ``class`` and its ``probability``, or with ``number``."""
        logits = self.logits(batch)
        probabilities, labels = logits.softmax(dim=1).max(dim=1)
        rows = []
        for index, texts in enumerate(batch["texts"]):
            row = dict(zip(self.data.text_columns, texts, strict=True))
            if self.data.regression:
                row["number"] = logits[index].item()
            else:
                row |= {"class": self.data.classes[labels[index]], "probability": probabilities[index].item()}
            rows.append(row)
        return rows
