"""Batches are taken from a loader that goes on as if nobody had looked."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ResumableLoader, make_dataset, same
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatlora.callbacks.held_batches import first_batches

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
