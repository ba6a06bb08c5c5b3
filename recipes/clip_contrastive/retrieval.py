"""Recall of captions by images and of images by captions, exact on any number of ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_QUERIES = 1024  # compared at once


class Retrieval(Metric):
    """Recall@k in both directions over all images and captions of an evaluation.

    It is the share of queries with a right answer among the k most similar: for an image any of its captions, for a
    caption any of its images. A text that several images share is right for each. A wrong answer that is as similar as
    the best right one ranks before it, so that a model with one answer to everything finds nothing.

    Images and texts are identified by numbers; one that is seen twice, on one rank or on two, counts once.

    Args:
        top: the values of k.
    """

    full_state_update = False
    image_features: list[Tensor]
    image_ids: list[Tensor]
    text_features: list[Tensor]
    text_ids: list[Tensor]
    pairs: list[Tensor]

    def __init__(self, top: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__()
        self.top = tuple(top)
        for name in ("image_features", "image_ids", "text_features", "text_ids", "pairs"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        image_features_nd: Tensor,
        image_ids_n: Tensor,
        text_features_md: Tensor,
        text_ids_m: Tensor,
        pairs_p2: Tensor,
    ) -> None:
        """Take up images and all their captions.

        Args:
            image_features_nd: normalized, (N, D).
            image_ids_n: the images' numbers, (N,).
            text_features_md: normalized, (M, D).
            text_ids_m: the captions' numbers, equal for equal texts, (M,).
            pairs_p2: numbers of an image and of a text that belong to each other, (P, 2).
        """
        self.image_features.append(image_features_nd.float())
        self.image_ids.append(image_ids_n)
        self.text_features.append(text_features_md.float())
        self.text_ids.append(text_ids_m)
        self.pairs.append(pairs_p2)

    def compute(self) -> dict[str, Tensor]:
        """``image_to_text_recall@k`` and ``text_to_image_recall@k`` for each k, scalars between 0 and 1."""
        image_ids_n, images_nd = _once(dim_zero_cat(self.image_ids), dim_zero_cat(self.image_features))
        text_ids_m, texts_md = _once(dim_zero_cat(self.text_ids), dim_zero_cat(self.text_features))
        pairs_2p = dim_zero_cat(self.pairs).T.contiguous()
        right_nm = torch.zeros(len(image_ids_n), len(text_ids_m), dtype=torch.bool, device=images_nd.device)
        right_nm[torch.searchsorted(image_ids_n, pairs_2p[0]), torch.searchsorted(text_ids_m, pairs_2p[1])] = True
        ways = {
            "image_to_text": better_answers(images_nd, texts_md, right_nm),
            "text_to_image": better_answers(texts_md, images_nd, right_nm.T),
        }
        recalls = {}
        for way, better in ways.items():
            for k in self.top:
                recalls[f"{way}_recall@{k}"] = (better < k).float().mean()
        return recalls


def better_answers(queries_nd: Tensor, answers_md: Tensor, right_nm: Tensor) -> Tensor:
    """Count the wrong answers that are at least as similar to each query as its best right one, (N,).

    Args:
        queries_nd: normalized features, (N, D).
        answers_md: normalized features, (M, D).
        right_nm: which answers are right for a query, boolean, (N, M).

    Example:
        >>> better_answers(torch.eye(2), torch.eye(2), torch.tensor([[True, False], [True, False]]))
        tensor([0, 1])
    """
    # In pieces, so that the whole matrix of similarities is never in memory.
    counts = []
    for queries_qd, right_qm in zip(torch.split(queries_nd, _QUERIES), torch.split(right_nm, _QUERIES), strict=True):
        similar_qm = queries_qd @ answers_md.T
        best_q1 = similar_qm.masked_fill(~right_qm, -torch.inf).amax(dim=1, keepdim=True)
        # Not >=, which is false for nan: a model that has diverged would find everything.
        counts.append((~(similar_qm < best_q1) & ~right_qm).sum(dim=1))
    return torch.cat(counts)


def _once(ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return each number once, in ascending order, and the features of its first occurrence."""
    unique, inverse = torch.unique(ids, return_inverse=True)
    first = torch.full_like(unique, len(ids)).scatter_reduce(
        0, inverse, torch.arange(len(ids), device=ids.device), "amin"
    )
    return unique, features[first]
