"""Give learning rate schedulers back the state that they had before a pass stepped them."""

from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


def schedule_restorer(trainer: Trainer) -> Callable[[], None]:
    """A function that gives the schedulers of a trainer, and what they set in the optimizers, back as they are now."""
    kept = []
    for config in trainer.lr_scheduler_configs:
        for scheduler in _with_inner_ones(config.scheduler):
            optimizer = getattr(scheduler, "optimizer", None)
            param_groups = getattr(optimizer, "param_groups", [])
            kept.append((vars(scheduler), dict(vars(scheduler)), [(group, _settings(group)) for group in param_groups]))

    def put_back() -> None:
        for state, before, groups in kept:
            # Those that nobody has stepped stay untouched.
            if all(state.get(name) is value for name, value in before.items()):
                continue
            state.clear()
            state.update(before)
            for group, settings in groups:
                _put_back(group, settings)

    return put_back


def _with_inner_ones(scheduler: Any) -> Iterator[Any]:
    """A scheduler, and those that it steps itself, as SequentialLR does."""
    if not hasattr(scheduler, "__dict__"):
        return
    yield scheduler
    inner = vars(scheduler).get("_schedulers")
    for each in inner if isinstance(inner, (list, tuple)) else []:
        yield from _with_inner_ones(each)


def _settings(param_group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer does with a group of parameters, such as its learning rate, which may be a tensor."""
    settings = {}
    for name, value in param_group.items():
        if name != "params":
            settings[name] = value.clone() if isinstance(value, Tensor) else value
    return settings


def _put_back(param_group: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(value, Tensor):
            param_group[name].copy_(value)  # in place, as schedulers write it: a compiled step holds the tensor
        else:
            param_group[name] = value
