"""The LightningModule: a classifier of images by texts."""

from itertools import chain
from typing import Any, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from typing_extensions import override

from recipes.clip.model import DEFAULT_LORA, add_lora, image_features, text_features
from recipes.clip.module import ClipModule
from recipes.clip_fewshot.batches import Batch
from recipes.clip_fewshot.data import FewShotData
from recipes.clip_fewshot.evaluation import Evaluation, write_evaluation
from recipes.clip_fewshot.prompts import tokenize
from recipes.training.diverged import wrong_where_nan
from recipes.training.predictions import PredictionWriter

_CHUNK = 256  # texts that the text tower reads at once in evaluation


class FewShot(ClipModule):
    """CLIP with LoRA as a classifier of images by texts.

    In evaluation, a class's features are the mean of its texts' normalized features, normalized again. Training uses
    these features too, computed once, if the text tower is frozen; if it is adapted, every step encodes each class's
    first text again. The logits are the cosine similarities times the model's own scale, which stays frozen.

    Args:
        model: see :class:`recipes.clip.module.ClipModule`.
        pretrained: see there.
        quick_gelu: see there.
        lora: see there; None is rank 2, alpha 1, scaling 1 / sqrt(2), dropout 0.25 on q, k, v in all blocks of both
            towers.
        learning_rate: AdamW's rate at the start.
        weight_decay: AdamW's weight decay, on the adapter.
        min_learning_rate: rate at the end of the cosine schedule, which spans the run.
        predictions: name of the file that `predict` writes, .jsonl or .csv.
    """

    def __init__(
        self,
        model: str = "ViT-B-16",
        pretrained: str | None = "openai",
        quick_gelu: bool | None = None,
        lora: dict[str, Any] | None = None,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.01,
        min_learning_rate: float = 1e-6,
        predictions: str = "predictions.jsonl",
    ) -> None:
        optimizer: dict[str, Any] = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        super().__init__(model, pretrained, quick_gelu, DEFAULT_LORA if lora is None else lora, **optimizer)
        self.min_learning_rate = min_learning_rate
        self.writer = PredictionWriter(predictions, "images")
        self.classes: list[str] = []
        self.prompts: list[list[str]] = []
        self.tokens: Tensor
        self.metrics: Any = nn.ModuleDict()
        self._trains_text = True
        self._class_features: Tensor | None = None

    @override
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, FewShotData):
            raise MisconfigurationException(
                f"{type(self).__name__} takes its classes from FewShotData: pass one as the Trainer's datamodule"
            )
        self.classes, self.prompts = data.classes, data.prompts
        # Not in __init__: only the data know how many classes there are.
        self.metrics = nn.ModuleDict({name: Evaluation(len(self.classes)) for name in ("val", "test")})
        self._class_features = None

    @property
    def preprocess_cfg(self) -> PreprocessCfg:
        """The model's image size, mean and standard deviation; the data module takes them from here."""
        return PreprocessCfg(**cast("dict[str, Any]", self._base().visual.preprocess_cfg))

    @override
    def load_net(self) -> Any:
        scalars_as_buffers(self.clip.net)
        net = add_lora(self.clip.net, self.lora)
        self._trains_text = any(p.requires_grad for name, p in net.named_parameters() if "visual" not in name)
        return net

    @override
    def configure_model(self) -> None:
        super().configure_model()
        # The export builds the network without data. Not in checkpoints: the data give the texts in every run.
        if self.prompts:
            self.register_buffer("tokens", self._tokens(), persistent=False)

    @override
    def must_fit(self) -> dict[str, Any]:
        return {**super().must_fit(), "classes": self.classes}

    def _tokens(self) -> Tensor:
        """Return the prompts' token ids (classes, templates, context)."""
        texts = list(chain.from_iterable(self.prompts))
        tokens = tokenize(texts, self.clip.tokenizer, self._base().context_length)
        return tokens.view(len(self.prompts), -1, tokens.shape[1])

    def _base(self) -> Any:
        """Return the open_clip model inside."""
        return self.net.get_base_model()

    @override
    def recipe_schedule(self, optimizer: Optimizer) -> LRScheduler:
        return CosineAnnealingLR(optimizer, self.optimizer_steps(), eta_min=self.min_learning_rate)

    @override
    def loss(self, batch: Batch) -> Tensor:
        """Return the cross entropy of the classes, in nats; logged as ``train_loss``, with ``train_accuracy``."""
        if self._trains_text:
            self._class_features = None  # this step changes them
            features = self._encode_texts(self.tokens[:, 0])
        else:
            features = self.class_features()
        logits = self._logits(batch["images"], features)
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        accuracy = (logits.argmax(dim=1) == batch["labels"]).float().mean()
        shown = {"train_loss": loss.detach(), "train_accuracy": accuracy}
        self.log_dict(shown, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probability of each class for each image, (n, classes), from all texts of the classes."""
        return self._logits(images, self.class_features()).softmax(dim=1)

    def class_features(self) -> Tensor:
        """Return the normalized mean of every class's texts, (classes, d), kept until the next training step."""
        if self._class_features is None:
            # Not in inference mode: with a frozen text tower training uses these tensors too.
            with torch.inference_mode(False), torch.no_grad():
                chunks = torch.split(self.tokens.flatten(0, 1), _CHUNK)
                each = torch.cat([self._encode_texts(chunk) for chunk in chunks]).view(*self.tokens.shape[:2], -1)
                self._class_features = nn.functional.normalize(each.mean(dim=1), dim=-1)
        return self._class_features

    def _logits(self, images: Tensor, features: Tensor) -> Tensor:
        encoded = image_features(self.net, images)
        with torch.autocast(self.device.type, enabled=False):  # a scale of 100 would make bfloat16's rounding visible
            return cast("Tensor", self._base().logit_scale.float().exp() * encoded.float() @ features.float().T)

    def _encode_texts(self, tokens: Tensor) -> Tensor:
        return text_features(self.net, tokens).float()

    # -- evaluation

    @override
    def evaluate(self, stage: str, batch: Batch) -> None:
        probabilities = wrong_where_nan(self.probabilities(batch["images"]), batch["labels"])
        self.metrics[stage].update(probabilities, batch["labels"])

    @override
    def log_evaluation(self, stage: str) -> None:
        values, confusion = self.metrics[stage].take()
        self.log_dict({f"{stage}_{name}": value for name, value in values.items()}, prog_bar=stage == "val")
        if stage == "test":
            write_evaluation(self.trainer, stage, values, confusion, self.classes)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        probabilities, labels = self.probabilities(batch["images"]).max(dim=1)
        rows = zip(batch["paths"], labels.tolist(), probabilities.tolist(), strict=True)
        return [{"image": path, "class": self.classes[label], "probability": p} for path, label, p in rows]


def scalars_as_buffers(net: nn.Module) -> None:
    """Turn frozen numbers, such as the logit scale, into buffers: FSDP can't shard them as parameters."""
    for name, parameter in list(net.named_parameters(recurse=False)):
        if parameter.ndim == 0:
            delattr(net, name)
            net.register_buffer(name, parameter.detach())
