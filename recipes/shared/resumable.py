"""A data module whose training loader resumes where a checkpoint has left it."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from recipes.shared.parts import place_of

PARTS_OF_STAGE = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}


class LateLoader(StatefulDataLoader):  # type: ignore[misc]
    """A loader that starts with the first batch asked for, at the place that it has been given until then.

    A trainer that builds its optimizer before it loads a checkpoint, as under FSDP, has asked for the iterator already.
    """

    @override
    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()


class ResumableData(L.LightningDataModule):
    """Keeps the place in the epoch in checkpoints; a subclass fills ``parts`` in `setup` and defines :meth:`loader`.

    Lightning keeps it too, but does not put it back if anybody has asked for ``trainer.estimated_stepping_batches``
    before the loops' state is restored, as learning rate schedules do.

    The training loader is one of :meth:`whole_batches`, around a DistributedSampler whose order is a function of the
    epoch.

    Attributes:
        parts: the examples of "train", "validation", "test" and "predict", as far as they are set up.
    """

    batch_size: int
    num_workers: int
    seed: int
    parts: dict[str, Any]

    predicts: ClassVar[bool] = True
    """Whether `predict` has anything to do; False where the method for it is inherited and of no use."""
    deciding: ClassVar[tuple[str, ...]] = ()
    """The settings that decide, beside the shares themselves, which rows fall into them."""

    def __init__(self) -> None:
        super().__init__()
        self._place: dict[str, Any] = {}

    def loader(self, part: str) -> LateLoader:
        """The batches of a part."""
        raise NotImplementedError

    @override
    def train_dataloader(self) -> LateLoader:
        return self.resumed(self.loader("train"))

    @override
    def val_dataloader(self) -> LateLoader | list[Any]:
        return self.loader("validation") if len(self.parts["validation"]) else []

    @override
    def test_dataloader(self) -> LateLoader | list[Any]:
        return self.loader("test")

    @override
    def state_dict(self) -> dict[str, Any]:
        loader = self.trainer.train_dataloader if self.trainer else None
        if loader is None:
            return {}
        place = {"epoch": loader.sampler.epoch, "ranks": loader.sampler.num_replicas, "trained": self._trained_on()}
        # Nothing of this epoch is left: a resumed run begins with the next one.
        if self.trainer and self.trainer.is_last_batch:
            return place | {"epoch": place["epoch"] + 1}
        return place | {"train_loader": loader.state_dict()}  # each rank has given as many batches

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._place = state_dict
        self._refuse_trained_rows(state_dict.get("trained"))
        loader = self.trainer.train_dataloader if self.trainer else None
        if loader is not None:  # FSDP builds the optimizer, whose schedule asks for the loader, before it loads
            self.resumed(loader)

    def _trained_on(self) -> dict[str, Any]:
        """What decides which rows train: a share of the training split is held out by it."""
        return {name: getattr(self, name, None) for name in ("dataset", "split", "shares", *self.deciding)}

    def _refuse_trained_rows(self, trained: dict[str, Any] | None) -> None:
        """Refuse to judge a checkpoint on what its own run has trained on.

        Raises:
            MisconfigurationException: a part is that run's training split, or a share that it did not hold out.
        """
        parts = {TrainerFn.VALIDATING: "validation", TrainerFn.TESTING: "test"}
        part = parts.get(self.trainer.state.fn) if self.trainer and self.trainer.state.fn else None
        now = self._trained_on()
        if part is None or trained is None or now["shares"] is None:
            return
        dataset, split = getattr(self, "own_datasets", {}).get(part), getattr(self, "own_splits", {}).get(part)
        own = dataset or split
        # A data set of a part's own is read as its split "train".
        judged = place_of(dataset, "train") if dataset else place_of(now["dataset"], split or now["split"])
        # A checkpoint of an older version may not hold all of them.
        held_out_by = {name: trained[name] for name in ("shares", *self.deciding) if name in trained}
        is_other_share = now["shares"][part] and any(now[name] != value for name, value in held_out_by.items())
        if judged == place_of(trained["dataset"], trained["split"]) and (own is not None or is_other_share):
            more = "".join(f" of {name} {value!r}" for name, value in held_out_by.items() if name != "shares")
            raise MisconfigurationException(
                f"{part}: {own or now['split']!r} is what the checkpoint's run was trained on, except for the shares "
                f"{trained['shares']}{more}: give these, or another split or file"
            )

    def resumed(self, loader: LateLoader) -> LateLoader:
        """The training loader, put once at the place that a checkpoint holds."""
        ranks = loader.sampler.num_replicas
        if "train_loader" in self._place and self._place["ranks"] != ranks:
            rank_zero_warn(
                f"The checkpoint is of {self._place['ranks']} devices and this run has {ranks}: the rest of its "
                "epoch repeats examples and leaves others out"
            )
        loader.sampler.set_epoch(self._place.get("epoch", 0))
        # An empty state makes the loader forget an iterator that it has begun, and start at the first batch.
        loader.load_state_dict(self._place.get("train_loader", {}))
        self._place = {}
        return loader

    def whole_batches(
        self, rows: Any, sampler: DistributedSampler[Any], collate_fn: Callable[[Any], Any] | None = None
    ) -> LateLoader:
        """A loader of batches that the sampler gives whole.

        Raises:
            MisconfigurationException: the Trainer is to overfit some batches, for which it replaces samplers.
        """
        if getattr(self.trainer, "overfit_batches", False):
            raise MisconfigurationException(
                "overfit_batches puts another sampler in the place of this data's, which gives whole batches: set "
                "limit_train_batches instead, or give a dataset of a few rows"
            )
        return LateLoader(
            rows,
            batch_size=None,
            sampler=sampler,
            collate_fn=collate_fn,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: a loader draws a seed whenever it starts, which a resumed run does at another moment.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def prompts_loader(self, collate_fn: Callable[[Any], Any]) -> DataLoader[Any]:
        """The rows of "predict", the same number for each rank, which FSDP needs."""
        rows = self.parts["predict"]
        ranks: dict[str, Any] = dict(self.ranks())
        sampler: DistributedSampler[Any] = DistributedSampler(rows, shuffle=False, **ranks)
        # Not a LateLoader: a prediction has nothing to resume.
        return DataLoader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=collate_fn)

    def ranks(self) -> dict[str, int]:
        """How many processes share the data, and which this one is: arguments of a DistributedSampler."""
        # Strategies of a single device have no such attribute.
        ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) if self.trainer else None
        return ranks or {"num_replicas": 1, "rank": 0}
