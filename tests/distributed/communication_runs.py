"""Bytes that collectives move in one optimizer step, counted at the calls of the process group."""

import os
from collections import Counter
from typing import Any

import lightning as L
from fits import PRECISION_OF_FLOAT64, Sharded, parts
from float64_runs import dataset, fit_in_float64, network
from strategies import places, strategy_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Counts calls by name, and bytes of the whole tensors: the sum, what is gathered or scattered; the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            name = str(func).split(".")[1].strip("_")
            if "wrap" not in name:
                self.calls[name] += 1
                shares = int(args[1]) if name == "all_gather_into_tensor" else 1  # it makes its output itself
                size = shares * max(_size(argument) for argument in args)
                self.bytes += size
                self.largest = max(self.largest, size)
        return func(*args, **(kwargs or {}))


def _size(argument: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(argument) if isinstance(t, Tensor))


class OneStep(L.Callback):
    """Counts in the accumulation window that ends with the optimizer's third step."""

    def __init__(self, window: int) -> None:
        self.first, self.last = 2 * window, 3 * window - 1
        self.mode = Collectives()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.mode.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.last:
            self.mode.__exit__(None, None, None)


def count(strategy: str, front_end: str, accumulate: int) -> dict[str, Any]:
    net = network()
    module, callbacks, trainer = parts(front_end, net, accumulate)
    counter = OneStep(accumulate)
    precision, double = PRECISION_OF_FLOAT64[strategy.partition("-")[0]]
    devices = {**places(), "max_steps": 4}
    loader = Sharded(dataset(), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    used = strategy_of(strategy, **double)
    fit_in_float64(module, 1, [*callbacks, counter], loader, strategy=used, precision=precision, **devices, **trainer)
    # Rank 3: two ranks share the rows of A unevenly, the rows of B evenly.
    factors = sum(p.numel() for name, p in network().named_parameters() if ".lora_" in name)
    return {"bytes": counter.mode.bytes, "calls": sum(counter.mode.calls.values()), "factors": 8 * factors}
