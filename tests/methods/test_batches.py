"""A copy of a batch shares no tensor and no container with it, whatever the batch is."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from lightning_flatlora.methods.batches import copied_batch


class Pair(NamedTuple):
    """It can't be built from an iterable."""

    parts: dict[str, Tensor]
    more: list[Tensor]


@dataclass(frozen=True)
class Fields:
    parts: dict[str, Tensor]
    more: list[Tensor]


class Movable(SimpleNamespace):
    """Of a library's own class, which says how it is moved to a device."""

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
    """The tensors, and the containers that can be written into."""
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
    with pytest.raises(RuntimeError, match="a list_iterator can be read only once: let the loader give lists"):
        copied_batch({"parts": [iter([torch.ones(1)])]})
