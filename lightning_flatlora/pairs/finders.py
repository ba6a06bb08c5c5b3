"""Finders: functions that find a model's LoRA pairs in layers that are not peft's.

See :class:`~lightning_flatlora.Finder` for the protocol. Pass a finder to a callback, to FMLoRAModule or to
:func:`~lightning_flatlora.find_pairs`. If each layer keeps one A and one B under fixed names, :class:`PairsByName` is
enough.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, compress
from typing import Any

from torch import nn

from lightning_flatlora.pairs.lora_pair import LoRAPair
from lightning_flatlora.perturbed_read import ParameterRef
from lightning_flatlora.wrappers import bare, clean_name


@dataclass(frozen=True)
class PairsByName:
    """Find the layers that keep A and B under two names, as parameters or as modules with a weight.

    A must be stored as (r, m) and B as (n, r), and the layer's output must contain exactly s B A x for an input x. The
    layer must read both as attributes in its forward, as layers usually do.

    Args:
        a: the attribute that is A, or a module whose ``weight`` is A.
        b: the attribute that is B, or a module whose ``weight`` is B.
        scaling: the attribute that is s, or a function of the layer that returns it: a named function of a module if
            processes are spawned, since it is pickled.
        where: tells whether a layer with both names is a LoRA layer; None takes all.
        base: the attribute that is the frozen Linear, needed for noise on the whole weight; None if there is none.

    Raises:
        AttributeError: a layer has no attribute named by ``scaling`` or ``base``.

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
        """Find the pairs of a model, in the order of its modules."""
        pairs = []
        for name, layer in model.named_modules():
            A, B = _reader(layer, self.a), _reader(layer, self.b)
            if A is None or B is None or not (self.where is None or self.where(layer)):
                continue
            scaling = getattr(layer, self.scaling) if isinstance(self.scaling, str) else self.scaling(layer)
            base = None if self.base is None else getattr(layer, self.base)
            pairs.append(_pair(name, self.b, scaling, A, B, base=base))
        return pairs


def litgpt_pairs(model: nn.Module, /) -> list[LoRAPair]:
    """Find the pairs of litgpt's layers, ``LoRALinear`` and ``LoRAQKVLinear``, from :mod:`litgpt.lora`.

    The latter stacks the factors of q, k and v in one parameter for A and one for B. Each of the three is a pair, since
    its update is a product of its own rows. A layer whose update is merged into its weight is left out.

    Example:
        >>> from lightning_flatlora import EFMLoRA
        >>> callback = EFMLoRA(rho=0.05, finder=litgpt_pairs)
    """
    pairs = []
    for name, layer in model.named_modules():
        A, B = _reader(layer, "lora_A"), _reader(layer, "lora_B")
        if A is None or B is None or not hasattr(layer, "scaling") or getattr(layer, "merged", False):
            continue
        base = getattr(layer, "linear", None)
        in_base: Any = _rows_in_base(layer) if hasattr(layer, "qkv_shapes") else [None]
        start = 0
        for index, rows in enumerate(in_base):
            if len(in_base) > 1:
                # The rank is not read from a shape, since FSDP1 leaves a flat part of each parameter.
                A = replace(A, rows=range(index * layer.r, (index + 1) * layer.r))
                B = replace(B, rows=range(start, start + len(rows)))
                start += len(rows)
            pairs.append(_pair(name, "lora_B", layer.scaling, A, B, base=base, base_rows=rows))
    return pairs


def _rows_in_base(layer: Any) -> list[range]:
    """List the rows of q, k and v, of those that have LoRA, in the weight that holds all three."""
    queries, keys = layer.head_size * layer.n_head, layer.head_size * layer.n_query_groups
    ends = [0, queries, queries + keys, queries + 2 * keys]
    return list(compress(map(range, ends[:-1], ends[1:]), layer.enable_lora))


# Named functions, since a finder must be picklable if processes are spawned.
def _has(names: tuple[str, ...], layer: Any) -> bool:
    return all(hasattr(layer, name) for name in names)


def _alpha_over(rank: str, layer: Any) -> float:
    return float(layer.alpha / getattr(layer, rank))


def _is_linear_adapter(layer: Any) -> bool:
    """Tell whether a layer is LoRA: feed-forward blocks share the names, other adapters add an activation or a norm."""
    activation = getattr(layer, "activation", None)
    has_none = activation is None or isinstance(activation, nn.Identity)
    return _has(("alpha", "dim"), layer) and has_none and getattr(layer, "norm_position", None) is None


_TORCHTUNE = PairsByName("lora_a", "lora_b", partial(_alpha_over, "rank"), where=partial(_has, ("alpha", "rank")))
_NEMO = (
    PairsByName("linear_in", "linear_out", partial(_alpha_over, "dim"), where=_is_linear_adapter),
    PairsByName("lora_a", "lora_b", "scale", where=partial(_has, ("scale",))),
    PairsByName("lora_A", "lora_B", "scale", where=partial(_has, ("scale",))),
)


def torchtune_pairs(model: nn.Module, /) -> list[LoRAPair]:
    """Find the pairs of layers like torchtune's: ``lora_a`` and ``lora_b``, scaled by alpha / rank.

    Example:
        >>> layer = nn.Module()
        >>> layer.lora_a, layer.lora_b = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        >>> layer.alpha, layer.rank = 16, 2
        >>> [(pair.name, pair.scaling) for pair in torchtune_pairs(nn.Sequential(layer))]
        [('0.lora_b.weight', 8.0)]
    """
    return _TORCHTUNE(model)


def nemo_pairs(model: nn.Module, /) -> list[LoRAPair]:
    """Find the pairs of layers like NeMo's: its Megatron adapters, and those on models from Hugging Face.

    The former keep ``linear_in`` and ``linear_out``, scaled by alpha / dim, the latter ``lora_a`` and ``lora_b`` (in
    AutoModel ``lora_A`` and ``lora_B``), scaled by ``scale``. Tensor parallelism, which splits the factors themselves,
    is not supported.

    Example:
        >>> layer = nn.Module()
        >>> layer.linear_in, layer.linear_out = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        >>> layer.alpha, layer.dim = 16, 2
        >>> [(pair.name, pair.scaling) for pair in nemo_pairs(nn.Sequential(layer))]
        [('0.linear_out.weight', 8.0)]
    """
    return list(chain.from_iterable(finder(model) for finder in _NEMO))


def _reader(layer: nn.Module, name: str) -> ParameterRef | None:
    """Find a factor that a layer keeps under a name, as a parameter or as the weight of a module."""
    child = layer._modules.get(name)
    reader = ParameterRef(layer, name) if child is None else ParameterRef(bare(child))
    return None if reader.parameter is None else reader


def _pair(layer_name: str, b: str, scaling: Any, A: ParameterRef, B: ParameterRef, **of_base: Any) -> LoRAPair:
    name = f"{layer_name}.{b}" if B.name == b else f"{layer_name}.{b}.weight"
    if B.rows is not None:
        name += f"[{B.rows.start}:{B.rows.stop}]"
    places: Any = {"readers": [B], "A_readers": [A], "A_rows": A.rows, "B_rows": B.rows}
    return LoRAPair(clean_name(name), A.parameter, B.parameter, float(scaling), **places, **of_base)
