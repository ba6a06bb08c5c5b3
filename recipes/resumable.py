"""A data module whose training loader goes on where a checkpoint has left it."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override


class LateLoader(StatefulDataLoader):  # type: ignore[misc]
    """A loader that starts with the first batch asked for, at the place that it has been given until then.

    A trainer that builds its optimizer before it loads a checkpoint, as under FSDP, has asked for the iterator already.
    """

    @override
    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()


class ResumableData(L.LightningDataModule):
    """Keeps the place in the epoch in checkpoints; ``train_dataloader`` has to pass its loader through ``gone_on``.

    Lightning keeps it too, but does not put it back if anybody has asked for ``trainer.estimated_stepping_batches``
    before the loops' state is restored, as learning rate schedules do.

    The loader is of ``whole_batches``, around a DistributedSampler whose order is a function of the epoch.
    """

    num_workers: int
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self._place: dict[str, Any] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        loader = self.trainer.train_dataloader if self.trainer else None
        if loader is None:
            return {}
        place = {"epoch": loader.sampler.epoch, "ranks": loader.sampler.num_replicas}
        if self.trainer and self.trainer.is_last_batch:
            return place | {"epoch": place["epoch"] + 1}
        return place | {"train_loader": loader.state_dict()}  # each rank has given as many batches

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._place = state_dict
        loader = self.trainer.train_dataloader if self.trainer else None
        if loader is not None:  # FSDP builds the optimizer, whose schedule asks for the loader, before it loads
            self.gone_on(loader)

    def gone_on(self, loader: LateLoader) -> LateLoader:
        """The training loader, put at the place that a checkpoint has told, once."""
        ranks = loader.sampler.num_replicas
        if "train_loader" in self._place and self._place.get("ranks", 1) != ranks:
            rank_zero_warn(
                f"The checkpoint is of {self._place.get('ranks', 1)} devices and this run has {ranks}: the rest of its "
                "epoch repeats examples and leaves others out"
            )
        loader.sampler.set_epoch(self._place.get("epoch", 0))
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

    def ranks(self) -> dict[str, int]:
        """How many processes share the data, and which this one is: arguments of a DistributedSampler."""
        ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) if self.trainer else None
        return ranks or {"num_replicas": 1, "rank": 0}
