"""A step of two passes writes what a step of one pass writes, and refuses what it can't put back."""

import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FEATURES, fit, same, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from two_pass_runs import TWO_PASSES, Keeping, beside_a_plain_run, two_passes

from lightning_flatlora.methods import put_back


class Registering(nn.Module):
    """Registers its first buffer in its first forward pass."""

    def forward(self) -> float:
        if not self._buffers:
            self.register_buffer("count", torch.zeros(()))
        self.count += 1
        return float(self.count)


class Writing:
    """Writes buffers in every way, keeps lists and numbers, and draws from all global generators.

    ``seen``, a tuple, holds of each pass what its loss depends on besides the weights.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        module: Any = self
        module.register_buffer("average", torch.zeros(FEATURES))
        module.register_buffer("queue", torch.ones(FEATURES))
        module.register_buffer("bank", torch.empty(0))
        module.register_buffer("small", torch.zeros(4).to(torch.float8_e4m3fn))
        self.part, self.norm = Registering(), nn.LazyBatchNorm1d(affine=False)
        self.steps, self.rate, self._private = 0, 1.0, [0]
        self.losses: list[float] = []
        self.table: dict[str, float] = {}
        self.kinds, self.recent, self.tally = {0}, deque([0], maxlen=2), Counter(a=1)
        self.seen: tuple[tuple[float, ...], ...] = ()
        random.seed(0)
        np.random.seed(0)

    @property
    def own(self) -> list[Any]:
        """Every number, list, dict and set."""
        containers = [self._private, self.losses, self.table, self.kinds, list(self.recent), dict(self.tally)]
        return [self.steps, self.rate, *containers]

    def loss(self, batch: Any, batch_idx: int) -> Any:
        inputs = batch[0] + self.average + self.queue
        if not len(self.bank):
            self.bank = torch.zeros(FEATURES)
        drawn = float(torch.rand(())), random.random(), np.random.rand()
        state = (self.average.sum(), self.queue.sum(), self.bank.sum(), self.small.float().sum(), self.steps)
        self.seen += ((*drawn, self.part(), len(self.losses), sum(self.kinds), *map(float, state)),)
        self.average.data.lerp_(batch[0].mean(0), 0.5)
        self.queue[0] += 1
        self.queue = nn.functional.normalize(self.queue, dim=0)
        self.bank += batch[0].mean(0)
        self.small.data = (self.small.float() + 1).to(torch.float8_e4m3fn)
        self.steps, self.rate = self.steps + 1, self.rate * 0.5
        self._private.append(self.steps)
        self.kinds.add(self.steps)
        self.recent.append(self.steps)
        self.tally["a"] += 1
        self.table[str(self.steps)] = self.rate
        loss = super().loss((self.norm(inputs) * sum(drawn), *batch[1:]), batch_idx)  # type: ignore[misc]
        # One list is written into, as well as replaced by another one.
        self.losses = [*self.losses, loss.item()]
        return loss


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_buffers_generators_and_own_attributes_count_once_from_the_first_step_on(tmp_path: Any, kind: str) -> None:
    plain, module = beside_a_plain_run(tmp_path, kind, Writing)
    assert module.seen[::2] == module.seen[1::2] == plain.seen
    assert module.steps == 6
    assert same(plain.own, module.own)
    assert same(weights(plain), weights(module))
    assert same(dict(plain.named_buffers()), dict(module.named_buffers()))


def test_own_attributes_stay_the_same_objects(tmp_path: Any) -> None:
    module, callbacks, more = two_passes("fmlora", Writing)
    kept, shared = module.kinds, module.recent
    fit(tmp_path, module, callbacks, max_epochs=1, **more)
    assert module.kinds is kept
    assert module.recent is shared


class Deeper:
    """Counts one level deeper than what is put back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts = {"batches": [0]}

    def loss(self, batch: Any, batch_idx: int) -> Any:
        self.counts["batches"][0] += 1
        return super().loss(batch, batch_idx)  # type: ignore[misc]


def test_what_lies_deeper_sees_both_passes(tmp_path: Any) -> None:
    """The documented limit: such counts belong in on_train_batch_end."""
    module, callbacks, more = two_passes("fmlora", Deeper)
    fit(tmp_path, module, callbacks, max_epochs=1, **more)
    assert module.counts == {"batches": [12]}


class Filling:
    """Counts passes in two buffers, one of floats and one of integers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("floats", torch.zeros(100))  # type: ignore[attr-defined]
        self.register_buffer("packed", torch.zeros(10, dtype=torch.int32))  # type: ignore[attr-defined]

    def loss(self, batch: Any, batch_idx: int) -> Any:
        self.floats += 1
        self.packed += 1
        return super().loss(batch, batch_idx)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("limit", "kept"), [("_MOST_BYTES", (False, True)), ("_MOST_BYTES_OF_INTEGERS", (True, False))]
)
def test_buffers_too_large_to_copy_are_written_by_both_passes(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, limit: str, kept: tuple[bool, bool]
) -> None:
    monkeypatch.setattr(put_back, limit, 40 if limit == "_MOST_BYTES" else 39)
    module, callbacks, more = two_passes("fmlora", Filling)
    fit(tmp_path, module, callbacks, max_epochs=1, **more)
    assert [int(module.floats[0]), int(module.packed[0])] == [6 if each else 12 for each in kept]


# -- parameters that no optimizer trains


def by_lerp(module: Any) -> None:
    with torch.no_grad():
        for own, other in zip(module.teacher.parameters(), module.head.parameters(), strict=True):
            own.lerp_(other, 0.5)


def by_data(module: Any) -> None:
    for own, other in zip(module.teacher.parameters(), module.head.parameters(), strict=True):
        own.data = own.data * 0.5 + other.data * 0.5


def by_average(module: Any) -> None:
    module.average.update_parameters(module.head)


UPDATES: dict[str, Callable[[Any], None]] = {"lerp_": by_lerp, ".data": by_data, "AveragedModel": by_average}


class Teaching:
    """A momentum encoder of a head, and an average whose copies require gradients and get none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        torch.manual_seed(0)
        self.head, self.teacher = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.teacher.requires_grad_(False)
        self.average = AveragedModel(self.head)
        # The first update of all would be a copy, which shows nothing.
        self.average.update_parameters(self.teacher)

    def loss(self, batch: Any, batch_idx: int) -> Any:
        return super().loss((self.head(batch[0]), *batch[1:]), batch_idx)  # type: ignore[misc]

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]  # type: ignore[attr-defined]
        return torch.optim.SGD([*trained, *self.head.parameters()], lr=self.lr)  # type: ignore[attr-defined]


@pytest.mark.parametrize("update", UPDATES.values(), ids=list(UPDATES))
@pytest.mark.parametrize("kind", TWO_PASSES)
def test_a_momentum_encoder_is_refused_inside_of_a_step(
    tmp_path: Any, kind: str, update: Callable[[Any], None]
) -> None:
    class Inside(Teaching):
        def loss(self, batch: Any, batch_idx: int) -> Any:
            update(self)
            return super().loss(batch, batch_idx)

    module, callbacks, more = two_passes(kind, Inside)
    name = "average.module" if update is by_average else "teacher"
    with pytest.raises(
        MisconfigurationException, match=rf"writes the parameter {name}\..* no optimizer trains.*on_train_batch_end"
    ):
        fit(tmp_path, module, callbacks, max_epochs=1, **more)


@pytest.mark.parametrize("update", UPDATES.values(), ids=list(UPDATES))
@pytest.mark.parametrize("kind", TWO_PASSES)
def test_a_momentum_encoder_is_updated_after_a_step(tmp_path: Any, kind: str, update: Callable[[Any], None]) -> None:
    """And a trained weight may be written inside, as one that is kept in a range."""

    class After(Teaching):
        def loss(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                self.head.weight.clamp_(-0.1, 0.1)
            return super().loss(batch, batch_idx)

        def on_train_batch_end(self, *args: Any) -> None:
            update(self)

    plain, module = beside_a_plain_run(tmp_path, kind, After)
    assert same(weights(plain), weights(module))


class Remembering:
    """A queue that the loss reads and then replaces in place, and inputs that are written in place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("queue", torch.zeros(FEATURES))  # type: ignore[attr-defined]

    def loss(self, batch: Any, batch_idx: int) -> Any:
        inputs = batch[0].mul_(0.5)
        loss = super().loss((inputs + self.queue, *batch[1:]), batch_idx)  # type: ignore[misc]
        self.queue.copy_(inputs.mean(dim=0))
        return loss


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(tmp_path: Any, kind: str) -> None:
    """Though the first step of its process can't know what is written."""
    trained = []
    for ckpt_path in (None, tmp_path / "kept" / "epoch=0.ckpt"):
        module, callbacks, more = two_passes(kind, Remembering)
        saver = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1, enable_version_counter=False)
        fit(tmp_path, module, [*callbacks, saver], max_epochs=2, ckpt_path=ckpt_path, **more)
        trained.append({**weights(module), "queue": module.queue.clone()})
    assert same(*trained)


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_wrapped_metrics_and_logged_values_count_a_batch_once(tmp_path: Any, kind: str) -> None:
    plain, module = beside_a_plain_run(tmp_path, kind, Keeping)
    assert [float(count) for count in plain.found()["sums"]] == [6, 6]
    assert {"around", "own/stored_epoch"} <= set(plain.found()["logged"])
    assert same(plain.found(), module.found())


class Logs(Callback):
    """Logs around the backward pass, by the method that Lightning gives to callbacks."""

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.log("before", loss.detach(), on_step=False, on_epoch=True, batch_size=4)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.log("after", float(trainer.global_step), on_step=False, on_epoch=True, batch_size=4)


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_what_callbacks_log_around_the_backward_pass_is_that_of_the_first(tmp_path: Any, kind: str) -> None:
    logged = []
    for each in ("plain", kind):
        module, callbacks, more = two_passes(each, Plain, lr=0.0)
        module.optimizer_class = torch.optim.SGD
        logged.append(fit(tmp_path, module, [*callbacks, Logs()], **more).callback_metrics)
    assert set(logged[0]) == {"before", "after"}
    assert same(*logged)


class Plain:
    """Adds nothing to the module."""


class Joining(Callback):
    """Gives a head to the optimizer at the start of the first epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.optimizers[0].add_param_group({"params": list(pl_module.head.parameters())})


class WithHead:
    """A head that no optimizer holds at first; ``seen`` has the norm of its weight in each pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        torch.manual_seed(0)
        self.head, self.seen = nn.Linear(FEATURES, FEATURES), ()

    def loss(self, batch: Any, batch_idx: int) -> Any:
        self.seen += (float(self.head.weight.detach().norm()),)  # type: ignore[assignment]
        return super().loss((self.head(batch[0]), *batch[1:]), batch_idx)  # type: ignore[misc]

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]  # type: ignore[attr-defined]
        return torch.optim.SGD(trained, lr=self.lr)  # type: ignore[attr-defined]


@pytest.mark.parametrize("comes_first", [True, False])
def test_weights_that_join_the_optimizer_are_perturbed_in_every_second_pass(tmp_path: Any, comes_first: bool) -> None:
    module, callbacks, more = two_passes("sam", WithHead, lr=0.0)
    callbacks = [Joining(), *callbacks] if comes_first else [*callbacks, Joining()]
    fit(tmp_path, module, callbacks, max_epochs=1, **more)
    first, second = module.seen[::2], module.seen[1::2]
    assert len(set(first)) == 1
    assert all(moved != first[0] for moved in second)


class Scripted:
    """A scripted part with BatchNorm, whose state is in C++, and a buffer that is expanded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        torch.manual_seed(0)
        self.extractor = torch.jit.script(nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES)))
        self.register_buffer("mask", torch.ones(1, FEATURES).expand(4, FEATURES))  # type: ignore[attr-defined]
        self.register_buffer("batches", torch.zeros(()))  # type: ignore[attr-defined]

    def loss(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        return super().loss((self.extractor(batch[0] * self.mask), *batch[1:]), batch_idx)  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", TWO_PASSES)
def test_scripted_parts_and_expanded_buffers_are_written_once(tmp_path: Any, kind: str) -> None:
    plain, module = beside_a_plain_run(tmp_path, kind, Scripted)
    assert same(weights(plain), weights(module))
    assert module.batches == 6
