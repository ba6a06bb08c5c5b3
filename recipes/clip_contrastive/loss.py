"""open_clip's contrastive losses over the joint batch of all ranks, with the logit scale they share."""

import math
from typing import Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

Kind = Literal["auto", "clip", "siglip"]
_LARGEST = math.log(100)  # CLIP's bound: a larger scale made its training unstable


class ContrastiveLoss(nn.Module):
    """The loss of a batch of matching images and captions.

    Every rank has b pairs. Each of its images is compared with the captions of all ranks, each caption with all images,
    and the gradient goes back to the rank that a feature came from. So the mean of the ranks' losses is the loss of one
    process on the joint batch. In backward a feature receives the sum over the ranks' losses, so the mean over ranks
    that DDP and FSDP take of the gradients is that loss's gradient.

    Args:
        logit_scale: logarithm of the scale of the cosine similarities, one number.
        logit_bias: a SigLIP model's bias, added to the logits, one number; None in other models.
        kind: "clip" for CLIP's softmax over the batch, "siglip" for SigLIP's sigmoid of each pair, "auto" for the one
            that the model was made for: SigLIP's if there is a bias.
        learnt: train scale and bias.

    Raises:
        MisconfigurationException: SigLIP's loss for a model without a bias, or CLIP's for a model with one.
    """

    def __init__(
        self, logit_scale: Tensor, logit_bias: Tensor | None, kind: Kind = "auto", learnt: bool = False
    ) -> None:
        super().__init__()
        made_for = "clip" if logit_bias is None else "siglip"
        if kind not in ("auto", made_for):
            raise MisconfigurationException(
                f"loss={kind!r} does not fit the model, which has {'no' if logit_bias is None else 'a'} logit bias: "
                f"set it to 'auto' or {made_for!r}"
            )
        self.kind = made_for
        # Kept for the export: in open_clip models they have no dimensions, or one.
        self._shape = logit_scale.shape
        # One element each: FSDP can't shard a tensor without dimensions.
        self.logit_scale = nn.Parameter(logit_scale.detach().float().reshape(1).clone(), requires_grad=learnt)
        self.logit_bias = None
        if logit_bias is not None:
            self.logit_bias = nn.Parameter(logit_bias.detach().float().reshape(1).clone(), requires_grad=learnt)

    def forward(self, image_features_bd: Tensor, text_features_bd: Tensor, joint: bool = True) -> Tensor:
        """Compute this rank's share of the loss.

        Args:
            image_features_bd: normalized, (b, D).
            text_features_bd: normalized, of the images' captions, (b, D); every rank needs the same b.
            joint: compare over all ranks; False takes this rank's batch as the whole.

        Returns:
            A scalar in nats, float32.
        """
        ranks = dist.get_world_size() if joint and dist.is_available() and dist.is_initialized() else 1
        rank = dist.get_rank() if ranks > 1 else 0
        # bfloat16 would round logits of up to 100 to halves.
        with torch.autocast(image_features_bd.device.type, enabled=False):
            features = image_features_bd.float(), text_features_bd.float()
            scale = self.logit_scale.float().exp()
            if self.logit_bias is None:
                # Each rank computes only its own rows of the logits.
                loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=ranks)(*features, scale)
            else:
                loss = SigLipLoss(rank=rank, world_size=ranks)(*features, scale, self.logit_bias.float())
        assert isinstance(loss, Tensor)
        return loss

    def open_clip_state(self) -> dict[str, Tensor]:
        """Return scale and bias by their names in an open_clip model, in its shapes."""
        return {name: value.reshape(self._shape) for name, value in self.state_dict().items()}

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep CLIP's scale between 1 and 100. Pretrained SigLIP models may exceed it, which their loss tolerates."""
        if self.kind == "clip" and self.logit_scale.requires_grad:
            self.logit_scale.clamp_(0, _LARGEST)
