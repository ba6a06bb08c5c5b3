"""A step of two passes writes what a step of one pass writes, whatever it writes and wherever it draws from."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import FEATURES, Classifier, TwoPassClassifier, build, fit, make_loader, same, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import SumMetric
from torchmetrics.wrappers import ClasswiseWrapper
from two_pass_runs import TWO_PASSES, Keeping, beside_a_plain_run, two_passes

from lightning_flatlora.callbacks.methods import second_pass, written_tensors
from lightning_flatlora.callbacks.methods.training_step import tensors_in
from lightning_flatlora.callbacks.tensor_writes import KeptValues, Marks, untrained_parameters, writable_buffers


class Following:
    """A momentum encoder, a count in a frozen parameter, a queue written in place, and noise of generators of its own.

    ``seen`` holds of each pass what its loss depends on besides the weights.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)  # type: ignore[has-type]
        self.count = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.noise, self.rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
        self.register_buffer("queue", torch.zeros(4))  # type: ignore[attr-defined]
        self.seen: tuple[tuple[float, ...], ...] = ()

    def loss(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            for own, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                own.data = own.data * 0.5 + other.data * 0.5
            self.count += 1
            before = self.queue.sum()
            self.queue[int(self.count) % 4] = self.count
        noise = torch.randn((), generator=self.noise) + self.rng.random()
        target = self.teacher(batch[0]).sum()
        self.seen += ((float(target), float(before), float(noise)),)
        return super().loss((batch[0] + noise, *batch[1:]), batch_idx)  # type: ignore[misc]


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_parameters_and_queues_move_once_and_both_passes_see_the_same(tmp_path: Any, kind: str) -> None:
    plain, module = beside_a_plain_run(tmp_path, kind, Following)
    assert same(weights(plain), weights(module))
    assert same(plain.noise.get_state(), module.noise.get_state())
    assert plain.rng.random() == module.rng.random()
    assert module.count == 6
    first, second = module.seen[::2], module.seen[1::2]
    # SAM moves the weights themselves in the second pass, and the teacher follows them.
    assert first == second or kind == "sam"


def test_a_teacher_that_follows_a_moving_student_is_the_same_in_both_passes(tmp_path: Any) -> None:
    module, callbacks, more = two_passes("fmlora", Following)
    with torch.no_grad():
        for parameter in module.teacher.parameters():
            parameter.add_(0.1)
    fit(tmp_path, module, callbacks, max_epochs=1, **more)
    assert module.seen[::2] == module.seen[1::2]


def test_what_is_too_large_to_copy_unseen_is_copied_from_the_second_step_on(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, callbacks, more = two_passes("fmlora", Following)
    written = [*module.buffers(), *module.teacher.parameters(), module.count]
    small = [tensor.nbytes for tensor in written if tensor.nbytes <= module.queue.nbytes]
    monkeypatch.setattr(written_tensors, "_MOST_BYTES", sum(small))
    with torch.no_grad():
        for parameter in module.teacher.parameters():
            parameter.add_(0.1)
    fit(tmp_path, module, callbacks, max_epochs=1, **more)
    first, second = module.seen[::2], module.seen[1::2]
    assert first[0][0] != second[0][0]
    assert first[0][1:] == second[0][1:]
    assert first[1:] == second[1:]


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


GENERATOR = torch.Generator()


class Counting(nn.Module):
    """Registers its first buffer in its first forward pass."""

    def forward(self) -> float:
        if not self._buffers:
            self.register_buffer("count", torch.zeros(()))
        self.count += 1
        return float(self.count)


class Slotted:
    __slots__ = ("rng",)


class Unusual:
    """Writes through ``.data``, replaces what it has written, has buffers without a value or a shape, and draws from
    generators in a global variable, in a class and in slots.
    """

    rng: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        module: Any = self
        module.register_buffer("average", torch.zeros(FEATURES))
        module.register_buffer("queue", torch.ones(FEATURES))
        module.register_buffer("bank", torch.empty(0))
        self.teacher = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.part, self.norm, self.slotted = Counting(), nn.LazyBatchNorm1d(affine=False), Slotted()
        self.seen: tuple[tuple[float, ...], ...] = ()
        type(self).rng, self.slotted.rng = np.random.default_rng(0), np.random.default_rng(0)
        GENERATOR.manual_seed(0)

    @property
    def noise(self) -> float:
        return float(torch.rand((), generator=GENERATOR)) + self.rng.random() + self.slotted.rng.random()

    def loss(self, batch: Any, batch_idx: int) -> Any:
        inputs = batch[0] + self.average + self.queue
        if not len(self.bank):
            self.bank = torch.zeros(FEATURES)
        tensors = (self.teacher, self.average.sum(), self.queue.sum(), self.bank.sum())
        self.seen += ((self.noise, self.part(), *map(float, tensors)),)
        self.average.data.lerp_(batch[0].mean(0), 0.5)
        self.teacher.data += 1
        self.queue[0] += 1
        self.queue = nn.functional.normalize(self.queue, dim=0)
        self.bank += batch[0].mean(0)
        return super().loss((self.norm(inputs), *batch[1:]), batch_idx)  # type: ignore[misc]


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_unusual_writes_and_generators_count_once_from_the_first_step_on(tmp_path: Any, kind: str) -> None:
    plain, module = beside_a_plain_run(tmp_path, kind, Unusual)
    assert module.seen[::2] == module.seen[1::2] == plain.seen
    assert same(weights(plain), weights(module))
    assert same(dict(plain.named_buffers()), dict(module.named_buffers()))
    assert module.slotted.rng.random() == plain.slotted.rng.random()


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


# In manual optimization the loss comes before the first optimizer step.
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("kind", TWO_PASSES)
def test_averages_wrapped_metrics_and_logged_values_count_a_batch_once(tmp_path: Any, kind: str) -> None:
    plain, module = beside_a_plain_run(tmp_path, kind, Keeping)
    assert [float(count) for count in plain.found()["sums"]] == [6, 6, 6]
    assert {"around", "own/stored_epoch"} <= set(plain.found()["logged"])
    assert same(plain.found(), module.found())


def test_metrics_among_the_modules_are_found_beside_many_samples() -> None:
    module = nn.Module()
    module.samples = []
    for number in range(9_000):
        module.samples.append({name: [number] for name in "abcdefghijkl"})
    module.metrics = nn.ModuleList([SumMetric(), ClasswiseWrapper(SumMetric()), ClasswiseWrapper(SumMetric())])
    steps = second_pass.SecondPass(module)
    for _ in range(2):
        steps.first_pass_starts(torch.device("cpu"))
        module.metrics[0].update(1.0)
        with steps.running():
            module.metrics[0].update(1.0)
    assert module.metrics[0].compute() == 2
    # torchmetrics' == of two metrics is a third metric, which is true.
    assert len(steps._metrics) == 5


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


def test_what_is_written_is_noticed_and_put_back() -> None:
    module = nn.Module()
    module.replaced, module.in_place = (nn.Parameter(torch.ones(2), requires_grad=False) for _ in range(2))
    module.trained = nn.Parameter(torch.ones(2))
    # As bitsandbytes' Params4bit: a class of its own around values that are a plain tensor.
    module.quantized = type("Quantized", (nn.Parameter,), {})(torch.ones(2), requires_grad=False)
    module.register_buffer("sparse", torch.eye(2).to_sparse())
    module.register_buffer("expanded", torch.ones(1).expand(3))
    module.average = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([module.trained], lr=0.1)
    untrained, buffers = untrained_parameters(module, [optimizer]), list(writable_buffers(module).values())
    assert untrained == [module.replaced, module.in_place, module.average]
    frozen = untrained[:2]
    assert len(buffers) == 1
    small = [torch.zeros(2, dtype=torch.uint8).view(dtype) for dtype in (torch.bool, torch.float8_e4m3fn)]
    of_bytes = KeptValues(small)
    small[1].view(torch.uint8)[1] = 1
    assert [id(tensor) for tensor in of_bytes.changed()] == [id(small[1])]
    marks, values = Marks([*frozen, *buffers]), KeptValues([*frozen, *buffers])
    assert marks.moved() == []
    memory = module.replaced.data_ptr()
    module.replaced.data = torch.zeros(2)
    with torch.no_grad():
        module.in_place.zero_()
    module.sparse.zero_()
    assert [id(tensor) for tensor in marks.moved()] == [id(tensor) for tensor in (*frozen, *buffers)]
    assert marks.has_moved(torch.zeros(1))
    values.put_back()
    assert module.replaced.data_ptr() == memory
    assert module.replaced.tolist() == module.in_place.tolist() == [1, 1]
    assert torch.equal(module.sparse.to_dense(), torch.eye(2))
