"""The contrastive loss and recall, compared with other implementations."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.retrieval import RetrievalHitRate

from recipes.clip_contrastive.loss import ContrastiveLoss
from recipes.clip_contrastive.retrieval import Retrieval


def random_features(number: int, seed: int, size: int = 8) -> Tensor:
    return F.normalize(torch.randn(number, size, generator=torch.Generator().manual_seed(seed)), dim=-1)


# -- loss


def test_the_loss_of_clip_is_the_mean_cross_entropy_both_ways() -> None:
    images, texts = random_features(5, 0), random_features(5, 1)
    logits = 10 * images @ texts.T
    expected = -(logits.log_softmax(0).diagonal().mean() + logits.log_softmax(1).diagonal().mean()) / 2
    loss = ContrastiveLoss(torch.tensor(10.0).log(), None)
    torch.testing.assert_close(loss(images, texts), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(images, texts), expected)


def test_the_loss_of_siglip_is_a_sigmoid_of_each_pair() -> None:
    images, texts = random_features(5, 0), random_features(5, 1)
    logits = 10 * images @ texts.T - 3
    signs = 2 * torch.eye(5) - 1
    loss = ContrastiveLoss(torch.tensor(10.0).log(), torch.tensor(-3.0))
    torch.testing.assert_close(loss(images, texts), -F.logsigmoid(signs * logits).sum() / 5)


@pytest.mark.parametrize(("kind", "bias"), [("clip", torch.tensor(-10.0)), ("siglip", None)])
def test_a_loss_that_does_not_fit_the_model_is_refused(kind: Any, bias: Tensor | None) -> None:
    with pytest.raises(MisconfigurationException, match=f"loss='{kind}' does not fit.*'auto'"):
        ContrastiveLoss(torch.tensor(1.0), bias, kind)


def test_clips_scale_stays_between_1_and_100_and_siglips_as_it_is() -> None:
    loss = ContrastiveLoss(torch.tensor(10.0).log(), None)
    loss.logit_scale.requires_grad_()
    for value, kept in ((-1.0, 1.0), (9.0, 100.0)):
        loss.logit_scale.data.fill_(value)
        loss.clamp()
        assert loss.logit_scale.exp().item() == pytest.approx(kept)
    siglip = ContrastiveLoss(torch.tensor(4.7), torch.tensor(-10.0), learnt=True)
    siglip.clamp()
    assert siglip.logit_scale.item() == pytest.approx(4.7)


# -- retrieval


def by_torchmetrics(queries: Tensor, answers: Tensor, right: Tensor, k: int) -> float:
    """torchmetrics' hit rate over each query's answers."""
    indexes = torch.arange(len(queries))[:, None].expand(right.shape)
    return RetrievalHitRate(top_k=k)(queries @ answers.T, right, indexes=indexes).item()


def test_recall_is_torchmetrics_hit_rate_with_several_captions_an_image() -> None:
    images, texts = random_features(30, 0), random_features(65, 1)
    owners = torch.cat([torch.arange(30), torch.randint(30, (35,))])
    right = owners[None] == torch.arange(30)[:, None]
    right[3, 7] = True  # a text that belongs to two images
    metric = Retrieval()
    for chunk in (torch.arange(9, 30), torch.arange(0, 10)):  # image 9 is in both
        image, text = right[chunk].nonzero(as_tuple=True)
        metric.update(images[chunk], chunk, texts[text], text, torch.stack([chunk[image], text], dim=1))
    found = metric.compute()
    for k in (1, 5, 10):
        assert found[f"image_to_text_recall@{k}"].item() == pytest.approx(by_torchmetrics(images, texts, right, k))
        assert found[f"text_to_image_recall@{k}"].item() == pytest.approx(by_torchmetrics(texts, images, right.T, k))
    assert 0 < found["image_to_text_recall@1"] < found["image_to_text_recall@10"] < 1


@pytest.mark.parametrize("features", [F.normalize(torch.ones(20, 4), dim=-1), torch.full((20, 4), torch.nan)])
def test_a_model_with_one_answer_to_everything_or_none_finds_nothing(features: Tensor) -> None:
    metric, ids = Retrieval(), torch.arange(20)
    metric.update(features, ids, features, ids, torch.stack([ids, ids], dim=1))
    assert {value.item() for value in metric.compute().values()} == {0.0}
