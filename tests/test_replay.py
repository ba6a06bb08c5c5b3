"""What a second pass must not write, and copies of batches; for what it restores, see test_hostile_modules.py."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import BatchEncoding

from lightning_flatlora.methods.put_back import copied_batch
from lightning_flatlora.methods.replay import Replay

CPU = torch.device("cpu")


class Model(nn.Module):
    """One weight that is trained, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.frozen = nn.Linear(2, 2), nn.Parameter(torch.zeros(2), requires_grad=False)


@pytest.mark.parametrize("write", [lambda p: p.add_(1), lambda p: setattr(p, "data", p.data + 1)], ids=["in", "new"])
def test_a_written_parameter_is_refused_unless_an_optimizer_trains_it(write: Callable[[Any], Any]) -> None:
    model = Model()
    trains_it = torch.optim.SGD([model.frozen], lr=0.1)
    for replay, refuses in ((Replay(model), True), (Replay(model, [trains_it]), False)):
        replay.first_pass_starts(CPU)
        with torch.no_grad():
            write(model.frozen)
        assert replay.written_parameter() == ("frozen" if refuses else None)
        if refuses:
            with pytest.raises(MisconfigurationException, match="the parameter frozen, which no optimizer trains"):
                replay.running().__enter__()


def test_a_buffer_in_a_files_memory_is_not_written(tmp_path: Path) -> None:
    """Writing to it would crash the process."""
    np.save(tmp_path / "table.npy", np.arange(3.0))
    model = Model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        table = torch.from_numpy(np.load(tmp_path / "table.npy", mmap_mode="r"))
    model.register_buffer("table", table)
    replay = Replay(model)
    replay.first_pass_starts(CPU)
    with replay.running():
        pass
    assert model.table.tolist() == [0, 1, 2]


class Pair(NamedTuple):
    """It can't be constructed from an iterable."""

    parts: dict[str, Tensor]
    more: list[Tensor]


@dataclass
class Fields:
    parts: dict[str, Tensor]
    more: list[Tensor]


class Movable(SimpleNamespace):
    """A library's own class, which defines how it is moved to a device."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self


FORMS: dict[str, Callable[[dict[str, Tensor], list[Tensor]], Any]] = {
    "tuple": lambda parts, more: (parts, more),
    "list": lambda parts, more: [parts, more],
    "dict": lambda parts, more: {"parts": parts, "more": more},
    "ordered dict": lambda parts, more: OrderedDict(parts=parts, more=more),
    "encoding": lambda parts, more: BatchEncoding({"parts": parts, "more": more}),
    "named tuple": Pair,
    "dataclass": Fields,
    "class of a library": lambda parts, more: Movable(parts=parts, more=more),
}


def all_in(thing: Any) -> list[Any]:
    """The tensors and the mutable containers."""
    found = [] if isinstance(thing, tuple) else [thing]
    if not isinstance(thing, Tensor):
        inner = thing if isinstance(thing, list | tuple) else dict(thing if isinstance(thing, Mapping) else vars(thing))
        for each in inner.values() if isinstance(inner, dict) else inner:
            found += all_in(each)
    return found


@pytest.mark.filterwarnings("ignore:.*BatchEncoding:DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_a_copy_shares_nothing(form: str) -> None:
    batch = FORMS[form]({"inputs": torch.ones(2)}, [torch.zeros(3), torch.zeros(1)])
    copied = copied_batch(batch)
    assert type(copied) is type(batch)
    ours, theirs = all_in(copied), all_in(batch)
    assert not {id(each) for each in ours} & {id(each) for each in theirs}
    pairs = [each for each in zip(ours, theirs, strict=True) if isinstance(each[0], Tensor)]
    assert len(pairs) == 3
    for one, other in pairs:
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_what_can_be_read_only_once_is_refused() -> None:
    with pytest.raises(RuntimeError, match="batch, a list_iterator, again: let the loader return lists"):
        copied_batch({"parts": [iter([torch.ones(1)])]})
