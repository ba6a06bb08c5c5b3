"""A LoRA pair (A, B), and the result of a search for the pairs of a model."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_flatlora.perturbed_read import AnyRef, as_ref


class NoPairsError(ValueError):
    """The model holds nothing that can be perturbed; the message lists its layers.

    Example:
        >>> from lightning_flatlora import find_pairs
        >>> try:
        ...     pairs = find_pairs(nn.Linear(4, 3)).pairs
        ... except NoPairsError:
        ...     pairs = []
    """


# Compared by identity: fields are tensors, whose == returns tensors.
@dataclass(frozen=True, eq=False)
class LoRAPair:
    """The two factors of one LoRA update s B A.

    Attributes:
        name: clean name of B's parameter, equal under every wrapper.
        A: shape (r, m), or ``(r, m, *kernel)`` for a convolution.
        B: shape (n, r), or (n, r, 1, ...) for a convolution.
        scaling: s, alpha / r (or alpha / sqrt(r) with rsLoRA).
        readers: where the layers read B: modules whose ``weight`` is B, such as peft's ``lora_B``, or a
            :class:`~lightning_flatlora.ParameterRef` for another attribute or for some rows of it. Several if the
            adapter is tied.
        A_readers: where the layers read A.
        layers: the modules whose forward reads B, for the methods of :mod:`lightning_flatlora.loops`; empty if these
            are the readers themselves.
        A_rows: this pair's rows of A's parameter, if the parameter holds several factors; None for all rows.
        B_rows: this pair's rows of B's parameter, likewise.
        base: the Linear to whose output the update is added, for noise on the whole weight; None if it is unknown, and
            for peft's layers, which know it themselves.
        base_rows: the rows of its weight that the update affects; None for all.
        experts: number of products that the factors hold, for LoRA on a parameter of several experts, (experts, n, m).
            peft keeps A as (experts * r, m), expert after expert, and B as (n, r * experts), whose column
            ``k * experts + e`` is column k of expert e.
        is_transposed: whether the parameters are stored as A^T (m, r) and B^T (r, n).
        A_is_fixed: whether A was frozen and in no optimizer when the pair was found, as in LoRA-FA. It counts as frozen
            even if it requires a gradient later: peft sees to that whenever it enables adapters, as after a reference
            pass.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora import find_pairs
        >>> config = LoraConfig(r=2, lora_alpha=8, target_modules=["0"])
        >>> (pair,) = find_pairs(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)).pairs
        >>> tuple(pair.A.shape), tuple(pair.B.shape), pair.scaling
        ((2, 4), (3, 2), 4.0)
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    readers: list[AnyRef] = field(default_factory=list)
    A_readers: list[AnyRef] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)
    A_rows: range | None = None
    B_rows: range | None = None
    base: nn.Module | None = None
    base_rows: range | None = None
    experts: int = 1
    is_transposed: bool = False
    A_is_fixed: bool = False

    @property
    def learns_A(self) -> bool:
        """False for LoRA-FA, whose A is frozen."""
        return self.A.requires_grad and not self.A_is_fixed

    @property
    def key(self) -> Hashable:
        """The identity of B, which identifies the pair: names change when a module is wrapped."""
        return id(self.B) if self.B_rows is None else (id(self.B), self.B_rows)

    @property
    def current_B(self) -> Any:
        """The layer's current parameter for B, since sharding may have replaced it."""
        return as_ref(self.readers[0]).parameter

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A and B as stored, with a kernel's dimensions among the columns: see :meth:`products`."""
        A, B = rows_of(self.A.detach(), self.A_rows), rows_of(self.B.detach(), self.B_rows)
        return self.products(A.flatten(1), B.flatten(1))

    def products(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Reshape tensors of the parameters' shapes to A (r, m) and B (n, r), or to stacks of these for experts."""
        if self.is_transposed:
            return A.mT, B.mT
        if self.experts == 1:
            return A, B
        return A.reshape(self.experts, -1, A.shape[1]), B.reshape(len(B), -1, self.experts).movedim(-1, 0)

    def as_stored(self, B: Tensor) -> Tensor:
        """Reshape the B of :meth:`products` to the stored parameter's shape."""
        if self.is_transposed:
            return B.mT
        return B if self.experts == 1 else B.movedim(-3, -1).flatten(-2)


@dataclass(frozen=True)
class PairSearch:
    """The result of :func:`~lightning_flatlora.find_pairs`.

    Attributes:
        pairs: in the order of the model's modules.
        left_out: one line for each kind of LoRA layer that can't be perturbed, with the reason.
        resting: the other pairs, whose B is not trained now or whose scaling is 0.
        share_left_out: share of the adapters' trained parameters that is left out, from 0 to 1.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora import find_pairs
        >>> net = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> search = find_pairs(net)
        >>> len(search.pairs), search.left_out, search.resting
        (1, [], [])
    """

    pairs: list[LoRAPair]
    left_out: list[str]
    resting: list[LoRAPair] = field(default_factory=list)
    share_left_out: float = 0.0

    @property
    def names(self) -> set[str]:
        """The names of all pairs, trained or not."""
        return {pair.name for pair in (*self.pairs, *self.resting)}


class Finder(Protocol):
    """A function that finds the pairs of a model whose LoRA layers are not peft's.

    It is called at the start of a fit and of each epoch, by FlatnessMonitor at each measurement, and by
    AdapterCheckpoint at each save and load. If processes are spawned, it must be picklable: an object, or a module's
    named function.

    Example:
        >>> import torch
        >>> from lightning_flatlora import LoRAPair, ParameterRef, find_pairs
        >>> class LoRALinear(nn.Linear):
        ...     def __init__(self):
        ...         super().__init__(4, 3)
        ...         self.A, self.B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))
        ...     def forward(self, x):
        ...         return super().forward(x) + 2.0 * x @ self.A.T @ self.B.T
        >>> def my_pairs(model):
        ...     pairs = []
        ...     for name, layer in model.named_modules():
        ...         if isinstance(layer, LoRALinear):
        ...             where = {"readers": [ParameterRef(layer, "B")], "A_readers": [ParameterRef(layer, "A")]}
        ...             pairs.append(LoRAPair(f"{name}.B", layer.A, layer.B, scaling=2.0, **where))
        ...     return pairs
        >>> [pair.name for pair in find_pairs(nn.Sequential(LoRALinear()), finder=my_pairs).pairs]
        ['0.B']
    """

    def __call__(self, model: nn.Module, /) -> list[LoRAPair]:
        """Return all pairs of a model, trained or not, each with its readers, in an order that never changes."""


def rows_of(tensor: Tensor, rows: range | None) -> Tensor:
    """Return some rows of a tensor as a view; the tensor itself for None."""
    return tensor if rows is None else tensor[rows.start : rows.stop]


def all_factors(pairs: Iterable[LoRAPair]) -> list[nn.Parameter]:
    """Return the parameters of the pairs' factors, each once, A before B."""
    return list(dict.fromkeys(chain.from_iterable((pair.A, pair.B) for pair in pairs)))


def trained_factors(pairs: Iterable[LoRAPair]) -> list[nn.Parameter]:
    """Return the parameters of the pairs' trained factors, each once, A before B.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora import find_pairs
        >>> net = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> [tuple(factor.shape) for factor in trained_factors(find_pairs(net).pairs)]
        [(2, 4), (3, 2)]
    """
    factors = chain.from_iterable((pair.A, pair.B) if pair.learns_A else (pair.B,) for pair in pairs)
    return [factor for factor in dict.fromkeys(factors) if factor.requires_grad]


def readers_of(pairs: Iterable[LoRAPair]) -> list[AnyRef]:
    """List where the layers read the B of pairs."""
    return list(chain.from_iterable(pair.readers for pair in pairs))
