"""Both passes of a step see the batch as it came, whatever its class and whatever the step does with it."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from helpers import Classifier, TwoPassClassifier, build, fit, make_loader, same, weights
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_flatlora.methods.batches import own_containers


class Pair(NamedTuple):
    """A batch that can't be built from an iterable."""

    parts: dict[str, Tensor]
    more: list[Tensor]


@dataclass
class Batch:
    """A batch whose tensors a step may replace."""

    inputs: Tensor
    labels: Tensor
    factor: Tensor


class Movable(SimpleNamespace):
    """A batch of a library's own class, which says how it is moved to a device."""

    def to(self, *args: Any, **kwargs: Any) -> "Movable":
        return copy.copy(self)


BATCHES: dict[str, Any] = {
    "dataclass": lambda batch: Batch(*batch),
    "movable": lambda batch: Movable(inputs=batch[0], labels=batch[1], factor=batch[2]),
    "named tuple": lambda batch: Pair({"inputs": batch[0]}, [batch[1], batch[2]]),
    "ordered": lambda batch: OrderedDict(parts={"inputs": batch[0]}, more=[batch[1], batch[2]]),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("front_end", ["fmlora", "module"])
def test_a_step_may_take_batches_of_any_class_apart(tmp_path: Any, front_end: str, kind: str) -> None:
    class Taking:
        def loss(self, batch: Any, batch_idx: int) -> Any:
            if kind in ("dataclass", "movable"):
                # In place of the old tensor, as a step may normalize its batch.
                batch.inputs = batch.inputs + 1
                return super().loss((batch.inputs, batch.labels, batch.factor), batch_idx)  # type: ignore[misc]
            parts, more = batch if kind == "named tuple" else batch.values()
            factor, labels = more.pop(), more.pop()
            return super().loss((parts.pop("inputs") + 1, labels, factor), batch_idx)  # type: ignore[misc]

    class Shifting:
        def loss(self, batch: Any, batch_idx: int) -> Any:
            return super().loss((batch[0] + 1, *batch[1:]), batch_idx)  # type: ignore[misc]

    trained = []
    for own, as_batch in ((Shifting, tuple), (Taking, BATCHES[kind])):
        classes = type("Own", (own, Classifier), {}), type("Own", (own, TwoPassClassifier), {})
        module, callbacks, more = build(front_end, classes=classes)
        batches = [as_batch(batch) for batch in make_loader(4)]
        fit(tmp_path, module, callbacks, loader=DataLoader(batches, batch_size=None), **more)
        trained.append(weights(module))
    assert same(*trained)


def tensors_in(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    own_containers(batch, found.append)
    return found


@pytest.mark.parametrize("kind", ["tuple", *BATCHES])
@pytest.mark.parametrize("front_end", ["fmlora", "module"])
def test_both_passes_see_the_batch_as_it_came_though_a_step_writes_it(tmp_path: Any, front_end: str, kind: str) -> None:
    seen: list[float] = []

    class Writing:
        def loss(self, batch: Any, batch_idx: int) -> Any:
            inputs, labels, factor = tensors_in(batch)
            inputs.add_(1)
            seen.append(float(inputs.sum()))
            return super().loss((inputs, labels, factor), batch_idx)  # type: ignore[misc]

    classes = type("Own", (Writing, Classifier), {}), type("Own", (Writing, TwoPassClassifier), {})
    module, callbacks, more = build(front_end, classes=classes)
    batches = [BATCHES.get(kind, tuple)(batch) for batch in make_loader(4)]
    expected = [float((tensors_in(batch)[0] + 1).sum()) for batch in batches]
    fit(tmp_path, module, callbacks, loader=DataLoader(batches, batch_size=None), max_epochs=1, **more)
    assert seen[::2] == seen[1::2] == expected
