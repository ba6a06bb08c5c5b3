"""The buffers and untrained parameters that a step writes: both passes begin with the same, and a batch counts once."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_flatlora.callbacks.tensor_writes import (
    KeptValues,
    Marks,
    that_fit,
    untrained_parameters,
    writable_buffers,
)

_MOST_BYTES = 2**27
"""Of the tensors that are copied while nobody knows yet whether the step writes them."""

Place = tuple[int, str]
"""The identity of a module and a buffer's name in it, which stay the same where a step puts another tensor in the
buffer's place; or the identity of a parameter."""


class WrittenTensors:
    """Finds out which tensors of a module a first pass writes, and gives them their values before and after it.

    A tensor that has not been there during a first pass is copied before it, the smallest first and up to 128 MB of
    them; later only those that a first pass has written. The copies also show what is written in place through
    ``.data``, which leaves no mark.

    Args:
        module: that owns the tensors.
        optimizers: all that train it.
        is_sharded: whether ranks hold parts of its parameters, which are then not watched.

    Example:
        >>> import torch
        >>> module = nn.Module()
        >>> module.register_buffer("count", torch.zeros(()))
        >>> tensors = WrittenTensors(module)
        >>> tensors.first_pass_starts()
        >>> module.count.data += 1
        >>> tensors.first_pass_ended()
        >>> int(module.count)
        0
        >>> tensors.second_pass_ended()
        >>> int(module.count)
        1
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer] = (), is_sharded: bool = False) -> None:
        self._module = module
        self._is_sharded = is_sharded
        # The places that have been there during a first pass, and those that one has written.
        self._watched: set[Place] = set()
        self._written: set[Place] = set()
        self._parts: list[nn.Module] = []
        self._norms: list[_NormBase] = []
        self._untrained: list[nn.Parameter] = []
        self.look(optimizers)

    def look(self, optimizers: Iterable[Optimizer]) -> None:
        """Find the parts of the module, and what no optimizer trains."""
        before = set(map(id, [*self._parts, *self._untrained]))
        self._parts = list(self._module.modules())
        self._norms = [part for part in self._parts if isinstance(part, _NormBase)]
        self._untrained = [] if self._is_sharded else untrained_parameters(self._module, optimizers)
        # What is new may have the identity of what is gone.
        kept = before.intersection(map(id, [*self._parts, *self._untrained]))
        self._watched = {place for place in self._watched if place[0] in kept}
        self._written = {place for place in self._written if place[0] in kept}

    def first_pass_starts(self) -> None:
        """Keep the values that the second pass may have to begin with."""
        owners = self._buffer_owners()
        self._tensors = self._tensors_now(owners)
        self._marks = Marks(self._tensors.values())
        written, unknown = [], []
        tracking = self._tracking()
        for place, tensor in self._tensors.items():
            owner, _ = place
            if owner in tracking:
                continue
            if place in self._written:
                written.append(tensor)
            elif place not in self._watched:
                unknown.append(tensor)
        self._before = KeptValues(written)
        # There may be too much to copy in every step, such as a data set among the buffers.
        self._unknown_before = KeptValues(that_fit(unknown, _MOST_BYTES))
        self._bound_before = _Bindings(owners)

    def first_pass_ended(self) -> None:
        """Note what the pass has written, and let the tensors be as they were before it."""
        owners = self._buffer_owners()
        tensors = self._tensors_now(owners)
        # By their values too, since not every write leaves a mark.
        changed = {id(tensor) for tensor in [*self._marks.moved(), *self._unknown_before.changed()]}
        self._written.update(place for place, tensor in self._tensors.items() if id(tensor) in changed)
        # Where a step has put another tensor, also if it had written the former one in place.
        self._written.update(place for place, tensor in tensors.items() if not self._marks.knows(tensor))
        # A part that writes one of its buffers may write the others without a mark, as InstanceNorm's kernel does.
        writers = self._tracking().union(owner for owner, _ in self._written)
        self._written.update(place for place in tensors if place[0] in writers)
        self._watched.update(tensors)
        self._after = KeptValues([tensor for place, tensor in tensors.items() if place in self._written])
        self._bound_after = _Bindings(owners)
        self._bound_before.put_back(owners)
        self._before.put_back()
        written = {id(tensor) for place, tensor in self._tensors.items() if place in self._written}
        self._unknown_before.put_back(among=written)
        self._before = self._unknown_before = KeptValues()

    def second_pass_ended(self) -> None:
        """Let the tensors be as the first pass has left them."""
        self._bound_after.put_back(self._buffer_owners())
        self._after.put_back()
        self._after = KeptValues()

    def _buffer_owners(self) -> list[nn.Module]:
        """The few parts that have buffers now: any part may register some in a step, or remove them."""
        return [part for part in self._parts if part._buffers]

    def _tensors_now(self, owners: Iterable[nn.Module]) -> dict[Place, Tensor]:
        """What a step may write."""
        tensors: dict[Place, Tensor] = {(id(parameter), ""): parameter for parameter in self._untrained}
        for owner in owners:
            for name, buffer in writable_buffers(owner).items():
                tensors[id(owner), name] = buffer
        return tensors

    def _tracking(self) -> set[int]:
        """The identities of the norms in training, which write their statistics and do not read them."""
        return {id(norm) for norm in self._norms if norm.training}


class _Bindings:
    """Which tensors are the buffers of some parts, so that what a step puts in their place can be undone.

    Args:
        owners: the parts that have buffers.
    """

    def __init__(self, owners: Iterable[nn.Module]) -> None:
        self._owners = list(owners)
        self._bound = {id(owner): dict(owner._buffers) for owner in self._owners}

    def put_back(self, owners: Iterable[nn.Module]) -> None:
        """Let them be so again.

        Args:
            owners: the parts that have buffers now, which may be others.
        """
        for owner in [*self._owners, *owners]:
            # A scripted module has its buffers in C++, and its steps write them in place.
            if isinstance(owner, ScriptModule):
                continue
            bound = self._bound.get(id(owner), {})
            if owner._buffers.keys() != bound.keys():
                owner._buffers.clear()
            owner._buffers.update(bound)
