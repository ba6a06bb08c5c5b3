"""Batches are taken from a loader that then gives its batches as if nobody had looked."""

import functools
import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ResumableLoader, make_dataset, same
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from lightning_flatlora.callbacks.monitor.held_batches import first_batches

CPU = torch.device("cpu")


def combined(*loaders: Any, mode: str = "max_size_cycle") -> CombinedLoader:
    return CombinedLoader(list(loaders) if len(loaders) > 1 else loaders[0], mode)


def streams() -> Any:
    return torch.get_rng_state(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_shuffling_loader_goes_on_as_if_nobody_had_looked(own_generator: bool) -> None:
    orders = []
    for looks in (False, True):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(6) if own_generator else None
        loader = combined(DataLoader(make_dataset(12), batch_size=2, shuffle=True, generator=generator))
        running = iter(loader)
        got = [next(running)[0]]
        if looks:
            before = streams()
            held = first_batches(loader, 3, CPU)
            assert len(held) == 3
            assert same(streams(), before)
        got += [batch for batch, *_ in running] + [batch for batch, *_ in loader]
        orders.append(got)
    assert same(*orders)


class Augments:
    """A transform with generators of its own, hidden where only a walk finds them."""

    def __init__(self) -> None:
        self.inner = {"numpy": [np.random.default_rng(1)], "old": (np.random.RandomState(1),)}
        python, numpy = random.Random(1), np.random.default_rng(2)
        self.draw = lambda: python.random() + numpy.random()
        self.seen: Counter[int] = Counter()

    def __call__(self, index: int) -> float:
        self.seen[index] += 1
        (first,), (second,) = self.inner["numpy"], self.inner["old"]
        return first.random() + second.rand() + self.draw()


class Foreign:
    """A library's transform, as albumentations' Compose."""

    def __init__(self) -> None:
        self.random_generator = np.random.default_rng(3)


Foreign.__module__ = "elsewhere.transforms"


class Drawn(Dataset):  # type: ignore[type-arg]
    """Every sample is drawn anew, whichever way a data set may draw."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.augments, self.foreign = Augments(), Foreign()
        self.reads = 0
        self.data = np.zeros(100_000)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads += 1
        drawn = self.augments(index) + self.foreign.random_generator.random() + MODULE_WIDE.random()
        return torch.rand(2, generator=self.generator) + drawn + self.reads + self.data[0]


MODULE_WIDE = random.Random(1)


def collate_with_noise(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(samples) + MODULE_WIDE.random()


def test_data_sets_that_draw_from_generators_of_their_own_go_on_as_if_nobody_had_looked() -> None:
    drawn = []
    for looks in (False, True):
        MODULE_WIDE.seed(5)
        data = Drawn()
        loader = combined(
            DataLoader(Subset(ConcatDataset([data, data]), range(12)), batch_size=2, collate_fn=collate_with_noise)
        )
        running = iter(loader)
        got = [next(running)[0]]
        if looks:
            first_batches(loader, 3, CPU)
            assert data.reads == 2
            assert not data.augments.seen[3]
        got += [batch for batch, *_ in running]
        drawn.append(got)
    assert same(*drawn)


class Collates(LightningModule):
    """Collates by a method of its own, and can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.lock, self.calls = nn.Linear(2, 2), threading.Lock(), 0
        self.random = random.Random(1)

    def collate(self, samples: list[Any]) -> torch.Tensor:
        self.calls += 1
        return torch.stack([sample[0] for sample in samples]) + self.random.random()

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a whole model was copied")


@pytest.mark.parametrize("how", ["method", "partial", "stream"])
def test_what_a_loader_is_bound_to_is_neither_copied_nor_changed(how: str) -> None:
    module = Collates()
    if how == "stream":
        stream = Stream()
        stream.module = module  # type: ignore[attr-defined]
        loader: Any = DataLoader(stream, batch_size=2)
    else:
        collate = module.collate if how == "method" else functools.partial(lambda own, x: own.collate(x), module)
        loader = DataLoader(make_dataset(8), batch_size=2, collate_fn=collate)
    held = first_batches(combined(loader), 2, CPU, [module])
    assert module.calls == 0
    assert same(held, list(loader)[:2])  # the generator, too, is where it was


def test_a_loader_that_keeps_its_position_keeps_it() -> None:
    loader = ResumableLoader([torch.tensor(i) for i in range(4)])
    held = first_batches(combined(loader), 2, CPU)
    assert len(held) == 2
    assert loader.position == 0


def test_workers_are_the_copys_own() -> None:
    loader = DataLoader(make_dataset(8), batch_size=2, num_workers=1, persistent_workers=True)
    running = iter(loader)
    next(running)
    held = first_batches(combined(loader), 2, CPU)
    assert same(held[0], next(iter(DataLoader(make_dataset(8), batch_size=2))))
    assert len(list(running)) == 3
    running._shutdown_workers()


def test_fewer_batches_and_several_loaders() -> None:
    first, second = (DataLoader(make_dataset(4, seed), batch_size=2) for seed in (1, 2))
    assert len(first_batches(combined(first), 9, CPU)) == 2
    both = first_batches(combined(first, second), 1, CPU)
    assert same(both[0], [next(iter(first)), next(iter(second))])
    assert len(first_batches(combined(first, second, mode="sequential"), 3, CPU)) == 3


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Counts on where it was."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        while self.position < 6:
            self.position += 1
            yield self.position


def test_a_stream_stays_where_it_is() -> None:
    loader = DataLoader(Stream(), batch_size=2)
    assert [batch.tolist() for batch in first_batches(combined(loader), 2, CPU)] == [[1, 2], [3, 4]]
    assert loader.dataset.position == 0  # type: ignore[attr-defined]


def test_what_can_be_read_once_only_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="a generator that can't be copied"):
        first_batches(combined(i for i in range(3)), 1, CPU)
