"""The LightningModule: images and captions learn to find each other."""

from typing import Any, cast

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchmetrics import MeanMetric
from typing_extensions import override

from recipes.clip.model import add_lora, export_open_clip, image_features, text_features
from recipes.clip.module import ClipModule
from recipes.clip_contrastive.batches import Batch
from recipes.clip_contrastive.loss import ContrastiveLoss, Kind
from recipes.clip_contrastive.retrieval import Retrieval


class ContrastiveModel(ClipModule):
    """An open_clip model trained on images and captions.

    Args:
        model: see :class:`recipes.clip.module.ClipModule`.
        pretrained: see there.
        quick_gelu: see there.
        lora: see there; None trains all weights.
        loss: "clip" or "siglip"; "auto" takes the one that the model was made for. CoCa models are trained as CLIP, and
            their text decoder does not change.
        learn_logit_scale: also train the scale of the similarities, and SigLIP's bias; None does so if all weights are
            trained. CLIP's scale is at most 100.
        gradient_checkpointing: compute activations again in backward instead of keeping them: larger batches in the
            same memory, for a third more time.
        augmentation: fields of open_clip's AugmentationCfg for training, such as ``scale``, the smallest and largest
            share of an image's area that a random crop keeps; None takes open_clip's, 0.9 to 1.
        kwargs: the optimizer's settings; ``weight_decay`` applies to matrices, not to vectors such as biases and norms,
            nor to the logit scale.
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        pretrained: str | None = None,
        quick_gelu: bool | None = None,
        lora: dict[str, Any] | None = None,
        loss: Kind = "auto",
        learn_logit_scale: bool | None = None,
        gradient_checkpointing: bool = False,
        augmentation: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, pretrained, quick_gelu, lora, **kwargs)
        self.loss_kind: Kind = loss
        self.learn_logit_scale = lora is None if learn_logit_scale is None else learn_logit_scale
        self.gradient_checkpointing = gradient_checkpointing
        self.augmentation = augmentation
        self.contrastive: Any = None  # made by `load_net`
        self._vectors: set[str] = set()
        # Each image's mean loss within its batch, and recall in both directions.
        self.losses: Any = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})
        self.retrievals: Any = nn.ModuleDict({stage: Retrieval() for stage in ("val", "test")})

    @override
    def load_net(self) -> Any:
        base: Any = self.clip.net
        self.contrastive = ContrastiveLoss(
            base.logit_scale, getattr(base, "logit_bias", None), self.loss_kind, self.learn_logit_scale
        )
        for name in self.contrastive.state_dict():  # which has them now; and FSDP can't shard what has no dimension
            base.register_parameter(name, None)
        if self.gradient_checkpointing:
            base.set_grad_checkpointing(True)
        return add_lora(base, self.lora) if self.lora is not None else unfrozen(base)

    @override
    def configure_model(self) -> None:
        if self._trainer is not None:
            self._check_trainer(self.trainer)
        super().configure_model()
        if not self._vectors:
            # Noted before FSDP1 flattens parameters: a flat matrix looks like a vector.
            self._vectors = {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
        # Lightning calls this before every stage, and a module can be sharded only once.
        if self.device_mesh is not None and not isinstance(self.contrastive, FSDPModule):
            fully_shard(self.contrastive, mesh=self.device_mesh["data_parallel"])

    def _check_trainer(self, trainer: L.Trainer) -> None:
        """Refuse strategies and settings that can't work with this loss."""
        if isinstance(trainer.strategy, FSDPStrategy) and self.lora is None:
            raise MisconfigurationException("lora=None trains all weights, which FSDP1 can't do here: use FSDP2 or ddp")
        methods = [getattr(each, "method", None) for each in trainer.callbacks]  # type: ignore[attr-defined]
        if trainer.world_size > 1 and any(getattr(method, "sync_ascent", True) is False for method in methods):
            raise MisconfigurationException(
                "sync_ascent=False has no meaning here: the loss is that of all devices' joint batch; set it to true"
            )

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        vectors: list[nn.Parameter] = []
        matrices: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                is_vector = name.replace("_fsdp_wrapped_module.", "") in self._vectors
                (vectors if is_vector else matrices).append(parameter)
        groups: list[dict[str, Any]] = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}]
        return [group for group in groups if group["params"]]

    @override
    def loss(self, batch: Batch) -> Tensor:
        """Compute this rank's share of the joint batch's loss, in nats; logged as ``train_loss``.

        Args:
            batch: ``images`` (b, 3, H, W) and ``tokens`` (b, context length), one caption for each image.
        """
        images, texts = image_features(self.net, batch["images"]), text_features(self.net, batch["tokens"])
        loss = self.contrastive(images, texts)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(images), sync_dist=True)
        return cast("Tensor", loss)

    def open_clip_state(self) -> dict[str, Tensor]:
        """Return all weights by their names in a plain open_clip model, with the adapter merged in."""
        return cast("dict[str, Tensor]", export_open_clip(self.net) | self.contrastive.open_clip_state())

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.contrastive.clamp()

    @override
    def evaluate(self, stage: str, batch: Batch) -> None:
        """Take up images with all their captions; the loss is that of each image's first caption."""
        images, texts = image_features(self.net, batch["images"]), text_features(self.net, batch["tokens"])
        # Only this rank's batch: a joint batch, and with it the loss, would grow with the number of devices.
        loss = self.contrastive(images, texts[batch["first_captions"]], joint=False)
        self.losses[stage].update(loss, batch["weight"])
        self.retrievals[stage].update(images, batch["image_ids"], texts, batch["text_ids"], batch["pairs"])

    @override
    def log_evaluation(self, stage: str) -> None:
        self.log(f"{stage}_loss", self.losses[stage], prog_bar=True)
        # Computed and reset here, because Lightning logs only metrics that give one number.
        recalls = self.retrievals[stage].compute()  # over all ranks, and equal on each
        self.retrievals[stage].reset()
        # sync_dist changes nothing, but without it Lightning warns.
        self.log_dict({f"{stage}_{name}": recall for name, recall in recalls.items()}, sync_dist=True)


def unfrozen(base: nn.Module) -> nn.Module:
    """Make all weights trainable that the contrastive loss reaches, in training mode.

    CoCa's text decoder is not among them.
    """
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(not name.startswith("text_decoder."))
    return base.train()
