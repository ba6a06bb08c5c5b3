"""A data module whose training loader resumes where a checkpoint left off."""

import signal
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

PARTS_OF_STAGE = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}


def _ignore_sigterm(_: int) -> None:
    """Let a worker outlive a signal to all processes of a job, so that this process can end between two steps."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class LateLoader(StatefulDataLoader):  # type: ignore[misc]
    """A loader that starts when the first batch is asked for, at the position given until then.

    A trainer that builds its optimizer before it loads a checkpoint, as under FSDP, asks for the iterator earlier.
    """

    @override
    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()


class ResumableData(L.LightningDataModule):
    """Keeps the position in the epoch in checkpoints; a subclass fills ``parts`` in `setup` and defines :meth:`loader`.

    Lightning keeps it too, but does not restore it if ``trainer.estimated_stepping_batches`` was read before the loops'
    state is restored, as learning rate schedules do.

    The training loader comes from :meth:`whole_batches`, with a DistributedSampler whose order depends on the epoch.

    Attributes:
        parts: the examples of "train", "validation", "test" and "predict", as far as they are set up.
    """

    batch_size: int
    num_workers: int
    seed: int
    parts: dict[str, Any]

    deciding: ClassVar[tuple[str, ...]] = ()
    """The settings that decide which rows train."""

    def __init__(self) -> None:
        super().__init__()
        self._position: dict[str, Any] = {}

    @property
    def trained_module(self) -> Any:
        """Return the Trainer's module, whose tokenizer or image size the data take."""
        return cast("L.Trainer", self.trainer).lightning_module

    def loader(self, part: str) -> LateLoader:
        """Return the batches of a part."""
        raise NotImplementedError

    def sizes(self) -> str:
        """Describe how many examples each part of a fit has."""
        return ", ".join(f"{part} {len(rows)}" for part, rows in self.parts.items())

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
        position = {"epoch": loader.sampler.epoch, "ranks": loader.sampler.num_replicas, "trained": self._trained_on()}
        position["examples"] = len(self.parts["train"])
        # This epoch is complete: a resumed run begins with the next one.
        if self.trainer and self.trainer.is_last_batch:
            return position | {"epoch": position["epoch"] + 1}
        return position | {"train_loader": loader.state_dict()}  # each rank has given as many batches

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = state_dict
        self._refuse_trained_rows(state_dict.get("trained"))
        loader = self.trainer.train_dataloader if self.trainer else None
        if loader is not None:  # FSDP builds the optimizer, whose schedule asks for the loader, before it loads
            self.resumed(loader)

    def _trained_on(self) -> dict[str, Any]:
        """Return where the training rows come from, and what selects them."""
        return {name: getattr(self, name) for name in ("dataset", "split", *self.deciding)}

    def _refuse_trained_rows(self, trained: dict[str, Any] | None) -> None:
        """Refuse to evaluate a checkpoint on the training data of its own run, described by :meth:`_trained_on`."""

    def resumed(self, loader: LateLoader) -> LateLoader:
        """Return the training loader, moved once to the position in a checkpoint."""
        for name, now in (("ranks", loader.sampler.num_replicas), ("examples", len(self.parts["train"]))):
            before = self._position.get(name, now)
            if before != now:
                rank_zero_warn(
                    f"The checkpoint's run had {before} {name}, but this one has {now}: the interrupted epoch "
                    "repeats some examples and misses others, and the number of steps may differ"
                )
        loader.sampler.set_epoch(self._position.get("epoch", 0))
        # An empty state makes the loader forget an iterator that has begun, and start at the first batch.
        loader.load_state_dict(self._position.get("train_loader", {}))
        self._position = {}
        return loader

    def whole_batches(
        self, rows: Any, sampler: DistributedSampler[Any], collate_fn: Callable[[Any], Any] | None = None
    ) -> LateLoader:
        """Return a loader of whole batches from a sampler."""
        return LateLoader(
            rows,
            batch_size=None,
            sampler=sampler,
            collate_fn=collate_fn,
            num_workers=self.num_workers,
            worker_init_fn=_ignore_sigterm,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: a loader draws a seed whenever it starts, which is at another moment in a resumed run.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def ranks(self) -> dict[str, Any]:
        """Return the number of processes and this one's rank: arguments of a DistributedSampler."""
        # Strategies of a single device have no such attribute.
        ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) if self.trainer else None
        return ranks or {"num_replicas": 1, "rank": 0}
