"""A LoRA pair (A, B), and what a search for the pairs of a model gives."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_flatlora.perturbed_read import AnyRef, as_ref


class NoPairsError(ValueError):
    """The model holds nothing that can be perturbed; the message lists what it holds.

    Example:
        >>> from lightning_flatlora import find_pairs
        >>> try:
        ...     pairs = find_pairs(nn.Linear(4, 3)).pairs
        ... except NoPairsError:
        ...     pairs = []
    """


# Compared by identity: fields are tensors, whose == gives tensors.
@dataclass(frozen=True, eq=False)
class LoRAPair:
    """The two factors of one LoRA update s B A.

    Attributes:
        name: clean name of B's parameter, the same under every wrapper.
        A: shape (r, m), or ``(r, m, *kernel)`` for a convolution.
        B: shape (n, r), or (n, r, 1, ...) for a convolution.
        scaling: s, alpha / r (or alpha / sqrt(r) with rsLoRA).
        readers: where the layers read B: modules whose ``weight`` it is, such as peft's ``lora_B``, or a
            :class:`~lightning_flatlora.ParameterRef` for another attribute or some rows of it. Several if the adapter
            is tied.
        A_readers: where the layers read A.
        layers: the modules in whose forward B is read, for the methods of :mod:`lightning_flatlora.loops`; empty where
            these are the readers themselves.
        A_rows: which rows of the parameter are this pair's A, where one parameter holds several; None for all of it.
        B_rows: which rows of the parameter are this pair's B.
        base: the Linear to whose output the update is added, for noise on the whole weight; None where it is not known,
            and for peft's layers, which are asked themselves.
        base_rows: the rows of its weight that the update is of; None for all.
        experts: how many products the two factors hold, for LoRA on a parameter of several experts, (experts, n, m).
            peft keeps A as (experts * r, m), one expert's rows after another's, and B as (n, r * experts), in which
            column ``k * experts + e`` is column k of expert e.
        is_transposed: whether the parameters are stored as A^T (m, r) and B^T (r, n).

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

    @property
    def learns_A(self) -> bool:
        """False for LoRA-FA, whose frozen A has no gradient."""
        return self.A.requires_grad

    @property
    def key(self) -> Hashable:
        """The identity of B, by which a pair is known: names change when a module is wrapped."""
        return id(self.B) if self.B_rows is None else (id(self.B), self.B_rows)

    @property
    def current_B(self) -> Any:
        """The parameter that the layer has for B now, since sharding may have replaced it."""
        return as_ref(self.readers[0]).parameter

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A and B as they are stored, a kernel's dimensions among the columns: see :meth:`products`."""
        A, B = rows_of(self.A.detach(), self.A_rows), rows_of(self.B.detach(), self.B_rows)
        return self.products(A.flatten(1), B.flatten(1))

    def products(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return what has the shapes of the parameters as A (r, m) and B (n, r); of experts as stacks of these."""
        if self.is_transposed:
            return A.mT, B.mT
        if self.experts == 1:
            return A, B
        return A.reshape(self.experts, -1, A.shape[1]), B.reshape(len(B), -1, self.experts).movedim(-1, 0)

    def as_stored(self, B: Tensor) -> Tensor:
        """Return what :meth:`products` gives for B, as the parameter is stored."""
        if self.is_transposed:
            return B.mT
        return B if self.experts == 1 else B.movedim(-3, -1).flatten(-2)


@dataclass(frozen=True)
class PairSearch:
    """What :func:`~lightning_flatlora.find_pairs` found.

    Attributes:
        pairs: in the order of the model's modules.
        left_out: one line for each kind of LoRA layer that cannot be perturbed, naming it and the reason.
        resting: the other pairs: their B is not trained now, or their scaling is 0.
        share_left_out: of the adapters' trained parameters, how many are left out, from 0 to 1.

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
    """A function that says what the pairs of a model are, for LoRA layers that are not peft's.

    It is called at the start of a fit and of each epoch, by FlatnessMonitor at each measurement, and by
    AdapterCheckpoint at each save and load. It must be a function of a module or an object that can be pickled if
    processes are spawned.

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
        """Return all pairs of a model, trained or not, each with its readers, in the same order at every call."""


def rows_of(tensor: Tensor, rows: range | None) -> Tensor:
    """Return some rows of a tensor, as a view; the tensor itself for None."""
    return tensor if rows is None else tensor[rows.start : rows.stop]


def all_factors(pairs: Iterable[LoRAPair]) -> list[nn.Parameter]:
    """Return the parameters that hold the factors of pairs, each once, A before B."""
    factors = chain.from_iterable((pair.A, pair.B) for pair in pairs)
    return list(dict.fromkeys(factors))


def trained_factors(pairs: Iterable[LoRAPair]) -> list[nn.Parameter]:
    """Return the parameters with ``requires_grad`` that hold the factors of pairs, each once, A before B.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora import find_pairs
        >>> net = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> [tuple(factor.shape) for factor in trained_factors(find_pairs(net).pairs)]
        [(2, 4), (3, 2)]
    """
    return [factor for factor in all_factors(pairs) if factor.requires_grad]


def readers_of(pairs: Iterable[LoRAPair]) -> list[AnyRef]:
    """List where the layers read the B of pairs."""
    return list(chain.from_iterable(pair.readers for pair in pairs))
