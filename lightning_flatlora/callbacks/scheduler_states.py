"""Give learning rate schedulers back the state that they had before a pass stepped them."""

from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


def schedule_restorer(trainer: Trainer) -> Callable[[], None]:
    """A function that gives the schedulers of a trainer, and what they set in the optimizers, back as they are now."""
    states, groups = [], []
    for config in trainer.lr_scheduler_configs:
        for scheduler in _with_inner_ones(config.scheduler):
            states.append((vars(scheduler), dict(vars(scheduler))))
    # Without a scheduler nothing is copied.
    for optimizer in trainer.optimizers if states else []:
        groups += [(param_group, _settings(param_group)) for param_group in optimizer.param_groups]

    def put_back() -> None:
        # Where nobody has stepped any, all stays untouched.
        if not any(_differs(state, before) for state, before in states):
            return
        for state, before in states:
            state.clear()
            state.update(before)
        for param_group, settings in groups:
            _put_back(param_group, settings)

    return put_back


def _differs(state: dict[str, Any], before: dict[str, Any]) -> bool:
    return any(state.get(name) is not value for name, value in before.items())


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
