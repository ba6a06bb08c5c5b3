"""What goes into a checkpoint, whole and on the CPU, under every strategy.

What a base's own loader gives again is never gathered: only what learns, and what the optimizer keeps of it, travels.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_flatlora.callbacks.checkpoint.changes import Print, record_of, sums_of
from lightning_flatlora.callbacks.checkpoint.parts import Entry, Kind, entries_of, unwrapped
from lightning_flatlora.callbacks.two_passes import put_on_instance
from lightning_flatlora.distributed import Layout, is_sharded, layout_of
from lightning_flatlora.lightning_names import MisconfigurationException
from lightning_flatlora.pairs import clean_name

MARK = "lightning_flatlora_adapter"
"""The key of a checkpoint under which it says that it is one of ours.

In old files the value is 1, and since then a dictionary with the "version" of the format, 2, and under "left_out" the
prints of the tensors that are not in the file, by name, as JSON. "shortened" lists the places of state dicts that were
whole, beside Lightning's own, until the same tensors were taken out.
"""


@dataclass(frozen=True)
class Selection:
    """What a checkpoint holds of a module.

    Attributes:
        entries: of the unwrapped module, all of them.
        saved: those that go into the file.
        left_out: the others of the base, described.
        new: names of the base that differ since the last look.
    """

    entries: dict[str, Entry]
    saved: dict[str, Entry]
    left_out: dict[str, Print]
    new: list[str]


def select(trainer: Trainer) -> Selection:
    """Look at the module; every rank has to.

    Args:
        trainer: in a fit, after the strategy's setup.
    """
    module = trainer.lightning_module
    record, entries = record_of(module), entries_of(unwrapped(module))
    sharded = is_sharded(trainer.strategy.model)
    if not record.prints:  # saved before the fit has begun, after an error
        record.start(entries, whole=not sharded)
    new = record.look(entries, _union_over_ranks(trainer) if sharded else _as_it_is)
    saved, left_out = {}, {}
    for name, entry in entries.items():
        if record.saves(name, entry):
            saved[name] = entry
        elif entry.kind is Kind.BASE:
            # What a rank reads of its own part tells nothing to the others.
            left_out[name] = dict.fromkeys(record.prints[name]) if sharded else record.prints[name]
    return Selection(entries, saved, left_out, new)


def _as_it_is(answers: list[bool]) -> list[bool]:
    return answers


def _union_over_ranks(trainer: Trainer) -> Callable[[list[bool]], list[bool]]:
    """Each rank sees its own parts alone: what differs on one of them is gathered by all."""

    def agree(answers: list[bool]) -> list[bool]:
        flags = torch.tensor(answers, dtype=torch.int32, device=trainer.strategy.root_device)
        return [bool(flag) for flag in trainer.strategy.reduce(flags, reduce_op="sum").tolist()]

    return agree


@contextmanager
def written_as_adapter(trainer: Trainer, write: Callable[[dict[str, Any], Path], None]) -> Iterator[Selection]:
    """Inside, a checkpoint that the trainer saves holds whole values of what learns, whatever the strategy.

    Args:
        trainer: in a fit.
        write: is given the checkpoint and its path on rank zero alone; every rank takes part in the gathering.
    """
    strategy, selection = trainer.strategy, select(trainer)
    selected: dict[str, Any] = {}

    def lightning_module_state_dict() -> dict[str, Any]:
        selected.update(_weights(trainer, selection))
        return dict(selected)

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        if strategy.is_global_zero:
            write(_with_all_weights(_of_selection(checkpoint, selection), selected), Path(filepath))

    methods: dict[str, Any] = {
        "lightning_module_state_dict": lightning_module_state_dict,
        "save_checkpoint": save_checkpoint,
    }
    if is_sharded(strategy.model):
        methods["optimizer_state"] = lambda optimizer: optimizer_state(trainer, optimizer)
    put_back = put_on(strategy, methods)
    try:
        yield selection
    finally:
        put_back()


def put_on(strategy: Strategy, methods: dict[str, Any]) -> Callable[[], None]:
    """Give a strategy methods of its own.

    Returns:
        A function that takes them off again.
    """
    puts_back = [put_on_instance(cast(Any, strategy), name, method) for name, method in methods.items()]

    def put_back() -> None:
        for each in puts_back:
            each()

    return put_back


def _weights(trainer: Trainer, selection: Selection) -> dict[str, Any]:
    """The selected entries, whole, by clean names; tensors that have two names stay one."""
    values = {name: entry.value for name, entry in selection.saved.items()}
    layout = layout_for(trainer, [value for value in values.values() if isinstance(value, nn.Parameter)])
    whole: dict[int, Any] = {}
    for value in values.values():
        if id(value) not in whole:
            gathered = layout.gather(value, value) if isinstance(value, Tensor) else value  # type: ignore[arg-type]
            whole[id(value)] = gathered
    return {name: whole[id(value)] for name, value in values.items()}


def _of_selection(checkpoint: dict[str, Any], selection: Selection) -> dict[str, Any]:
    """A checkpoint on the CPU, without what is left out and with our mark.

    Callbacks may have put whole state dicts into it. WeightAveraging puts its averages into the place of the state dict
    and moves that to "current_model_state"; StochasticWeightAveraging has its averages in its own state.
    """
    mark: dict[str, Any] = {"version": 2, "left_out": json.dumps(selection.left_out), "shortened": []}
    slim = {**checkpoint, MARK: mark}
    for path in list(_whole_states(checkpoint, selection)):
        slim = changed_at(slim, path, lambda state: _shortened(state, selection))
        mark["shortened"].append(list(path))
    return cast(dict[str, Any], on_cpu(slim, {}))


def _with_all_weights(checkpoint: dict[str, Any], selected: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint whose state dict holds every selected entry.

    A module or callback may take weights out in its ``on_save_checkpoint``, to make Lightning's own file smaller. Here
    it is small already, and without them no run could be resumed from it. Values that were replaced stay as they are.
    """
    state = checkpoint.get("state_dict", {})
    lost = {name: value for name, value in selected.items() if name not in state}
    if not lost:
        return checkpoint
    return {**checkpoint, "state_dict": {**on_cpu(lost, {}), **state}}


def _whole_states(value: Any, selection: Selection, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where nested dictionaries hold all entries of the module."""
    if not isinstance(value, dict):
        return
    if len(value) >= len(selection.saved) + len(selection.left_out) and selection.left_out:
        names = {clean_name(name) for name in value if isinstance(name, str)}
        if names >= set(selection.saved) and names >= set(selection.left_out):
            yield path
            return
    for key, inner in value.items():
        yield from _whole_states(inner, selection, (*path, key))


def _shortened(state: dict[str, Any], selection: Selection) -> dict[str, Any]:
    """A state dict by clean names, without what equals the base to the bit."""
    named = {clean_name(name): value for name, value in state.items()}
    sums = sums_of({name: named[name] for name in selection.left_out if isinstance(named[name], Tensor)})
    for name, sum_of_bits in sums.items():
        if sum_of_bits == selection.left_out[name]["sum"]:
            del named[name]
    return {
        name: value
        for name, value in named.items()
        if name not in selection.entries or selection.entries[name].kind is not Kind.DERIVED
    }


def changed_at(tree: dict[Any, Any], path: Sequence[Any], change: Callable[[Any], Any]) -> dict[Any, Any]:
    """A copy of nested dictionaries with another value in one place; what it shares with the old ones stays as it is.

    Example:
        >>> changed_at({"a": {"b": 1}, "c": 2}, ("a", "b"), lambda value: value + 5)
        {'a': {'b': 6}, 'c': 2}
    """
    if not path:
        return cast(dict[Any, Any], change(tree))
    key, *rest = path
    inner = changed_at(tree[key], rest, change) if rest else change(tree[key])
    return {**tree, key: inner}


def on_cpu(value: Any, seen: dict[int, Tensor]) -> Any:
    """Nested plain containers with their tensors on the CPU; one tensor in two places stays one."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.detach().cpu()
        return seen[id(value)]
    if type(value) is dict:
        return {key: on_cpu(each, seen) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(on_cpu(each, seen) for each in value)
    return value


def layout_for(trainer: Trainer, parameters: list[nn.Parameter]) -> Layout:
    """How the ranks share these parameters."""
    return layout_of(trainer.strategy.model, parameters) if parameters else Layout()


def optimizer_state(trainer: Trainer, optimizer: Optimizer) -> dict[str, Any]:
    """A sharded optimizer's state in its own format, with whole values on the CPU."""
    parameters = parameters_of(optimizer)
    layout = layout_for(trainer, parameters)
    packed = optimizer.state_dict()
    check_form(optimizer, packed)
    own = {(index, key): value for index, state in packed["state"].items() for key, value in state.items()}
    outline = {}
    for (index, key), value in own.items():
        parameter = parameters[index] if index in range(len(parameters)) else None
        if parameter is None or parameter.numel():
            outline[index, key] = _outlined(key, value, parameter, layout)
    # Under FSDP1 a rank without a part of a parameter has no state for it: all ranks agree on what there is.
    table = layout.merged(outline)
    _refuse_odd(table)
    whole: dict[Any, dict[str, Any]] = {}
    for (index, key), value in table.items():
        if isinstance(value, torch.dtype):
            parameter = parameters[index]
            mine = own.get((index, key), parameter.detach().new_empty(0, dtype=value))
            value = layout.gather(mine, parameter).cpu()
        whole.setdefault(index, {})[key] = value
    return {**packed, "state": whole}


def check_form(optimizer: Optimizer, packed: dict[str, Any]) -> None:
    """Raise an error if the state of a sharded optimizer isn't of the form that PyTorch's optimizers have."""
    if set(packed) != {"state", "param_groups"}:
        raise MisconfigurationException(
            f"AdapterCheckpoint: the state of {type(optimizer).__name__} has the entries {sorted(map(str, packed))}, "
            "and nothing tells which of them are split over the ranks: use an optimizer that keeps its state as "
            "PyTorch's do, or train on one device or under DDP"
        )


def _refuse_odd(table: dict[tuple[Any, str], Any]) -> None:
    """Raise on every rank, so that none waits for another, if a value is split and not as its parameter is."""
    for (_, key), value in table.items():
        if isinstance(value, torch.Size):
            raise MisconfigurationException(
                f"AdapterCheckpoint: the optimizer keeps {key!r} of the shape {tuple(value)} for a parameter that is "
                "sharded, and nothing tells how to make it whole: use another optimizer, or Lightning's ModelCheckpoint"
            )


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """An optimizer's parameters in the order of its state's numbers."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_split(key: str, value: Any, shape: torch.Size) -> bool:
    """Whether an optimizer's value is as large as the parameter, and split as it is."""
    return isinstance(value, Tensor) and key != "step" and value.shape == shape


def _outlined(key: str, value: Any, parameter: nn.Parameter | None, layout: Layout) -> Any:
    """The dtype of a value that is split as the parameter is, the shape of one split in another way, or the value.

    The optimizer may keep states of its own, of no parameter: nothing tells how a tensor of those is split.
    """
    if not isinstance(value, Tensor):
        return value
    if parameter is not None and is_split(key, value, parameter.shape):
        return value.dtype
    split = parameter is None or layout.splits(parameter)
    return value.shape if value.numel() > 1 and split else value.cpu()
