"""The steps and the checkpoints of DeepSpeed's engine, whose optimizers have no hooks."""

from collections.abc import Callable
from inspect import signature
from typing import Any

from lightning_flatlora.patching import put_on, put_on_instance

State = dict[str, Any]


def before_steps(optimizer: Any, act: Callable[[], None]) -> Callable[[], None]:
    """Act before each step of one of DeepSpeed's optimizers, when the averaged gradients of its window are complete.

    Returns:
        A function that ends this.
    """
    original = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        act()
        return original(*args, **kwargs)

    return put_on_instance(optimizer, "step", step)


def in_checkpoints(engine: Any, add: Callable[[State], None], take: Callable[[State], None]) -> Callable[[], None]:
    """Add to the client state of each checkpoint that an engine saves, and take from each that it loads.

    What is loaded without the optimizer's state starts a new run, of which nothing is taken.

    Returns:
        A function that ends this.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_checkpoint(save_dir: Any, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any) -> Any:
        state = dict(client_state or {})
        add(state)
        return save(save_dir, tag, state, *args, **kwargs)

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, state = load(*args, **kwargs)
        given = signature(load).bind(*args, **kwargs).arguments
        if path is not None and given.get("load_optimizer_states", True) and not given.get("load_module_only"):
            take(state)
        return path, state

    return put_on(engine, {"save_checkpoint": save_checkpoint, "load_checkpoint": load_checkpoint}).close
