"""Finders: what the LoRA pairs of a model are where its layers are not peft's.

A finder is a function of the model, see :class:`~lightning_flatlora.Finder`. It is given to a callback, to FMLoRAModule
or to :func:`~lightning_flatlora.find_pairs`. For layers that keep one A and one B under some names,
:class:`PairsByName` is enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_flatlora.pairs import bare, clean_name
from lightning_flatlora.pairs.lora_pair import LoRAPair
from lightning_flatlora.read_through import Reader


@dataclass(frozen=True)
class PairsByName:
    """Finds the layers that keep A and B under two names, as parameters of their own or as modules with a weight.

    A has to be stored as (r, m), B as (n, r), and the layer's output to hold exactly s B A x for an input x. The layer
    has to read both as attributes in its forward, as layers do.

    Args:
        a: the attribute that is A, or a module whose ``weight`` is A.
        b: the attribute that is B, or a module whose ``weight`` is B.
        scaling: the attribute that is s, or a function of the layer that gives it. One that has a name in a module
            can be pickled, as is needed where processes are spawned.
        where: says of a layer with both names whether it is a LoRA layer; None takes all.
        base: the attribute that is the frozen Linear, which noise on the whole weight needs; None if there is none.

    Raises:
        ValueError: a layer has no attribute of the name ``scaling`` or ``base``.

    Example:
        >>> import torch
        >>> layer = nn.Module()
        >>> layer.down, layer.up, layer.scale = nn.Linear(4, 2), nn.Parameter(torch.zeros(3, 2)), 2.0
        >>> finder = PairsByName(a="down", b="up", scaling="scale")
        >>> [(pair.name, pair.scaling) for pair in finder(nn.Sequential(layer))]
        [('0.up', 2.0)]
    """

    a: str
    b: str
    scaling: str | Callable[[Any], float]
    where: Callable[[Any], bool] | None = None
    base: str | None = None

    def __call__(self, model: nn.Module, /) -> list[LoRAPair]:
        """The pairs of a model, in the order of its modules."""
        pairs = []
        for name, layer in model.named_modules():
            A_reader, B_reader = _reader(layer, self.a), _reader(layer, self.b)
            if A_reader is None or B_reader is None or not (self.where is None or self.where(layer)):
                continue
            pair = _pair(name, self.b, self._scaling_of(name, layer), A_reader, B_reader)
            base = None if self.base is None else self._attribute(name, layer, self.base, "leave base out")
            pairs.append(replace(pair, base=base))
        return pairs

    def _scaling_of(self, name: str, layer: nn.Module) -> Any:
        if not isinstance(self.scaling, str):
            return self.scaling(layer)
        return self._attribute(name, layer, self.scaling, "give scaling as a function of the layer")

    def _attribute(self, name: str, layer: nn.Module, attribute: str, remedy: str) -> Any:
        if not hasattr(layer, attribute):
            raise ValueError(
                f"{name or 'the model'} ({type(layer).__name__}) has {self.a} and {self.b}, but no {attribute}: "
                f"{remedy}, or leave such layers out by where"
            )
        return getattr(layer, attribute)


def litgpt_pairs(model: nn.Module, /) -> list[LoRAPair]:
    """The pairs of litgpt's layers, ``LoRALinear`` and ``LoRAQKVLinear``, from :mod:`litgpt.lora`.

    The second keeps the factors of q, k and v stacked in one parameter each. Each of the three is a pair of its own,
    since its update is a product of its own rows. A layer whose update is merged into its weight is left out.

    Args:
        model: holds litgpt's layers at any depth.

    Returns:
        The pairs, in the order of the modules.

    Example:
        >>> from lightning_flatlora import EFMLoRA
        >>> callback = EFMLoRA(rho=0.05, finder=litgpt_pairs)
    """
    pairs = []
    for name, layer in model.named_modules():
        A, B = _reader(layer, "lora_A"), _reader(layer, "lora_B")
        if A is None or B is None or not hasattr(layer, "scaling") or getattr(layer, "merged", False):
            continue
        scaling: Any = layer.scaling
        sizes: Sequence[int] = getattr(layer, "qkv_shapes", ())
        base: Any = getattr(layer, "linear", None)
        starts = _starts_in_base(layer) if sizes else []
        if len(sizes) < 2:
            base_rows = range(starts[0], starts[0] + sizes[0]) if sizes else None
            pairs.append(replace(_pair(name, "lora_B", scaling, A, B), base=base, base_rows=base_rows))
            continue
        r, start = layer.r, 0  # not from a shape, since FSDP1 leaves a flat part of each parameter
        for index, size in enumerate(sizes):
            A_rows, B_rows = range(index * r, (index + 1) * r), range(start, start + size)
            of_rows = (Reader(A.module, A.attribute, A_rows), Reader(B.module, B.attribute, B_rows))
            base_rows = range(starts[index], starts[index] + size)
            pairs.append(replace(_pair(name, "lora_B", scaling, *of_rows), base=base, base_rows=base_rows))
            start += size
    return pairs


def _starts_in_base(layer: Any) -> list[int]:
    """Where those of q, k and v that have LoRA begin among the rows of the weight that holds all three."""
    of_queries, of_keys = layer.head_size * layer.n_head, layer.head_size * layer.n_query_groups
    starts = (0, of_queries, of_queries + of_keys)
    return [start for start, is_on in zip(starts, layer.enable_lora, strict=True) if is_on]


def _alpha_over_rank(layer: Any) -> float:
    return float(layer.alpha / layer.rank)


def _alpha_over_dim(layer: Any) -> float:
    return float(layer.alpha / layer.dim)


def _has_alpha_and_rank(layer: Any) -> bool:
    return hasattr(layer, "alpha") and hasattr(layer, "rank")


def _is_linear_adapter(layer: Any) -> bool:
    """Whether it is a LoRA: feed-forward blocks have the same names, and other adapters an activation or a norm."""
    if not (hasattr(layer, "alpha") and hasattr(layer, "dim")):
        return False
    activation = getattr(layer, "activation", None)
    return (activation is None or isinstance(activation, nn.Identity)) and getattr(layer, "norm_position", None) is None


def _has_scale(layer: Any) -> bool:
    return hasattr(layer, "scale")


_TORCHTUNE = PairsByName(a="lora_a", b="lora_b", scaling=_alpha_over_rank, where=_has_alpha_and_rank)
_NEMO = (
    PairsByName(a="linear_in", b="linear_out", scaling=_alpha_over_dim, where=_is_linear_adapter),
    PairsByName(a="lora_a", b="lora_b", scaling="scale", where=_has_scale),
    PairsByName(a="lora_A", b="lora_B", scaling="scale", where=_has_scale),
)


def torchtune_pairs(model: nn.Module, /) -> list[LoRAPair]:
    """The pairs of layers such as torchtune's: ``lora_a`` and ``lora_b``, scaled by alpha / rank.

    Args:
        model: holds such layers at any depth.

    Returns:
        The pairs, in the order of the modules.

    Example:
        >>> layer = nn.Module()
        >>> layer.lora_a, layer.lora_b = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        >>> layer.alpha, layer.rank = 16, 2
        >>> [(pair.name, pair.scaling) for pair in torchtune_pairs(nn.Sequential(layer))]
        [('0.lora_b.weight', 8.0)]
    """
    return _TORCHTUNE(model)


def nemo_pairs(model: nn.Module, /) -> list[LoRAPair]:
    """The pairs of layers such as NeMo's, of its Megatron adapters and of those on models from Hugging Face.

    The former keep ``linear_in`` and ``linear_out``, scaled by alpha / dim, the latter ``lora_a`` and ``lora_b`` (in
    AutoModel ``lora_A`` and ``lora_B``), scaled by ``scale``. Tensor parallelism, which splits the factors themselves,
    is not supported.

    Args:
        model: holds such layers at any depth.

    Returns:
        The pairs, kind by kind.

    Example:
        >>> layer = nn.Module()
        >>> layer.linear_in, layer.linear_out = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        >>> layer.alpha, layer.dim = 16, 2
        >>> [(pair.name, pair.scaling) for pair in nemo_pairs(nn.Sequential(layer))]
        [('0.linear_out.weight', 8.0)]
    """
    pairs: list[LoRAPair] = []
    for finder in _NEMO:
        pairs += finder(model)
    return pairs


def _reader(layer: nn.Module, name: str) -> Reader | None:
    """Where a layer keeps a factor: under this name itself, or in the weight of a module of this name."""
    if layer._parameters.get(name) is not None:
        return Reader(layer, name)
    child = layer._modules.get(name)
    if child is None:
        return None
    module = bare(child)
    return Reader(module) if module._parameters.get("weight") is not None else None


def _parameter(reader: Reader) -> nn.Parameter:
    # Not the attribute, which may be B + E at the moment.
    parameter = reader.module._parameters[reader.attribute]
    assert parameter is not None
    return parameter


def _pair(layer_name: str, b: str, scaling: Any, A: Reader, B: Reader) -> LoRAPair:
    name = f"{layer_name}.{b}" if B.attribute == b else f"{layer_name}.{b}.weight"
    if B.rows is not None:
        name += f"[{B.rows.start}:{B.rows.stop}]"
    return LoRAPair(
        clean_name(name).removeprefix("."),
        _parameter(A),
        _parameter(B),
        float(scaling),
        readers=[B],
        A_readers=[A],
        A_rows=A.rows,
        B_rows=B.rows,
    )
