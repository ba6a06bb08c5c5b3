"""What goes into a checkpoint, whole and on the CPU, under every strategy.

What a base's own loader gives again is never gathered. Only what is trained, and what the optimizer keeps for it, is
sent between the ranks.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_flatlora.callbacks.checkpoint.changes import Fingerprint, record_of, sums_of
from lightning_flatlora.callbacks.checkpoint.optimizer_states import optimizer_state
from lightning_flatlora.callbacks.checkpoint.parts import Entry, Kind, scalings_of, state_entries, twin_of
from lightning_flatlora.callbacks.patches import put_on
from lightning_flatlora.distributed import is_sharded, layout_of
from lightning_flatlora.pairs import clean_name

MARK = "lightning_flatlora_adapter"
"""The key of a checkpoint under which it says that it is one of ours.

In old files the value is 1, and since then a dictionary with the "version" of the format, 2, and under "left_out" the
fingerprints of the tensors that are not in the file, by name, as JSON. "shortened" lists the places of state dicts that
were whole, beside Lightning's own, until the same tensors were taken out. "scalings", which came later, is
:func:`scalings_of` the module as JSON.
"""


@dataclass(frozen=True)
class Selection:
    """What a checkpoint holds of a module.

    Attributes:
        entries: of the unwrapped module, all of them.
        saved: those that go into the file.
        left_out: the others of the base, described.
        new: names of the base that differ since the last look.
        scalings: see :func:`scalings_of`.
    """

    entries: dict[str, Entry]
    saved: dict[str, Entry]
    left_out: dict[str, Fingerprint]
    new: list[str]
    scalings: dict[str, float]


def select(trainer: Trainer) -> Selection:
    """Decide what a checkpoint holds; every rank must call this.

    Args:
        trainer: in a fit, after the strategy's setup.
    """
    module = trainer.lightning_module
    record = record_of(module)
    twin = twin_of(module)
    entries = state_entries(twin, record.finder)
    sharded = is_sharded(trainer.strategy.model)
    # The fingerprints are missing where an error makes the trainer save before the fit has begun.
    if not record.fingerprints:
        record.start(entries, whole=not sharded)
    differs = record.differs(entries)
    if sharded:
        differs = _on_any_rank(trainer, differs)
    new = record.add([name for name, has_changed in differs.items() if has_changed], entries)
    saved, left_out = {}, {}
    for name, entry in entries.items():
        if entry.kind is Kind.BASE and name not in record.changed:
            # The sums of one rank's part say nothing about the whole tensor.
            left_out[name] = dict.fromkeys(record.fingerprints[name]) if sharded else record.fingerprints[name]
        elif entry.kind is not Kind.DERIVED:
            saved[name] = entry
    return Selection(entries, saved, left_out, new, scalings_of(twin, record.finder))


def _on_any_rank(trainer: Trainer, differs: dict[str, bool]) -> dict[str, bool]:
    """What differs on any rank, since each rank sees only its own parts."""
    # As numbers in the order of the names, which all ranks share.
    flags = torch.tensor(list(differs.values()), dtype=torch.int32, device=trainer.strategy.root_device)
    anywhere = trainer.strategy.reduce(flags, reduce_op="sum").tolist()
    return {name: bool(flag) for name, flag in zip(differs, anywhere, strict=True)}


@contextmanager
def written_as_adapter(trainer: Trainer, write: Callable[[dict[str, Any], Path], None]) -> Iterator[Selection]:
    """Inside, a checkpoint that the trainer saves holds whole values of what is trained, under every strategy.

    Args:
        trainer: in a fit.
        write: called with the checkpoint and its path, on rank zero alone; every rank takes part in the gathering.
    """
    strategy, selection = trainer.strategy, select(trainer)
    selected: dict[str, Any] = {}

    def lightning_module_state_dict() -> dict[str, Any]:
        # Kept, since callbacks may take weights out of the state dict before it is written.
        selected.update(_weights(trainer, selection))
        return dict(selected)

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        # The other ranks have taken part in the gathering, and have nothing to write.
        if strategy.is_global_zero:
            write(_with_all_weights(_of_selection(checkpoint, selection), selected), Path(filepath))

    # The strategy's methods are replaced, because its own would gather the whole model, and no hook says what is saved.
    methods: dict[str, Any] = {
        "lightning_module_state_dict": lightning_module_state_dict,
        "save_checkpoint": save_checkpoint,
    }
    if is_sharded(strategy.model):
        methods["optimizer_state"] = lambda optimizer: optimizer_state(trainer, optimizer)
    with put_on(strategy, methods):
        yield selection


def _weights(trainer: Trainer, selection: Selection) -> dict[str, Any]:
    """The selected entries, whole, by clean names; a tensor with two names stays one tensor."""
    values = {name: entry.value for name, entry in selection.saved.items()}
    layout = layout_of(trainer.strategy.model)
    whole: dict[int, Any] = {}
    for value in values.values():
        # Tied tensors are gathered once and stay one tensor in the file.
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
    mark["scalings"] = json.dumps(selection.scalings)
    slim = {**checkpoint, MARK: mark}
    # A list, since the search walks through dictionaries that the loop replaces.
    for path in list(_whole_states(checkpoint, selection)):
        is_average = path == ("state_dict",) and "current_model_state" in checkpoint
        slim = changed_at(slim, path, partial(_shortened, selection=selection, is_average=is_average))
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
    """The places at which nested dictionaries hold all entries of the module."""
    if not isinstance(value, dict):
        return
    # The lengths first, which are cheap to compare: a checkpoint holds many small dictionaries.
    if len(value) >= len(selection.saved) + len(selection.left_out) and selection.left_out:
        names = {clean_name(name) for name in value if isinstance(name, str)}
        if names >= set(selection.saved) and names >= set(selection.left_out):
            yield path
            return
    for key, inner in value.items():
        yield from _whole_states(inner, selection, (*path, key))


def _shortened(state: dict[str, Any], selection: Selection, is_average: bool) -> dict[str, Any]:
    """A state dict by clean names, without what equals the base bit for bit; of averages, without the base's.

    These are averages of weights that have never changed, and differ from them by the rounding of their updates alone.
    """
    named = {clean_name(name): value for name, value in state.items()}
    of_base = {name: named[name] for name in selection.left_out if isinstance(named[name], Tensor)}
    sums = {} if is_average else sums_of(of_base)
    for name in of_base:
        if is_average or sums[name] == selection.left_out[name]["sum"]:
            del named[name]
    shortened = {}
    for name, value in named.items():
        entry = selection.entries.get(name)
        if entry is None or entry.kind is not Kind.DERIVED:
            shortened[name] = value
    return shortened


def changed_at(tree: dict[Any, Any], path: Sequence[Any], change: Callable[[Any], Any]) -> dict[Any, Any]:
    """A copy of nested dictionaries with another value in one place; the original stays as it is.

    Example:
        >>> changed_at({"a": {"b": 1}, "c": 2}, ("a", "b"), lambda value: value + 5)
        {'a': {'b': 6}, 'c': 2}
    """
    if not path:
        return cast(dict[Any, Any], change(tree))
    key, *rest = path
    return {**tree, key: changed_at(tree[key], rest, change)}


def on_cpu(value: Any, seen: dict[int, Tensor]) -> Any:
    """Nested plain containers with their tensors on the CPU; a tensor in two places stays one tensor."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.detach().cpu()
        return seen[id(value)]
    if type(value) is dict:
        return {key: on_cpu(each, seen) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(on_cpu(each, seen) for each in value)
    return value
