"""Divide the pairs of a model into those that are trained, those that are not, and those that can't be perturbed."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import isfinite
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lightning_flatlora.pairs.lora_pair import LoRAPair, PairSearch
from lightning_flatlora.perturbed_read import as_ref

SCALING_IS_0 = "its scaling is 0, so that no perturbation of B moves its weight"
IS_SHARED = "a factor is shared with another pair or scaling, so its gradient is of several products"


def divided(
    pairs: Sequence[LoRAPair],
    is_trained: Callable[[LoRAPair], bool],
    left_out: Mapping[str, Sequence[str]] | None = None,
    others: Iterable[Any] = (),
) -> PairSearch:
    """Divide the pairs of a model into those that are trained and those that are not, without those that share factors.

    Pairs of the same factors and scaling are one pair with the readers of all: a tied adapter.

    Args:
        pairs: all of a model, in the order of its modules.
        is_trained: whether a pair is trained now.
        left_out: names of layers by the reason for which they are no pair.
        others: factors of adapters that are no pair.

    Raises:
        ValueError: two pairs have one name.
    """
    pairs = _tied_as_one(pairs)
    for name, count in Counter(pair.name for pair in pairs).items():
        if count > 1:  # checkpoints know a pair by its name
            raise ValueError(f"the finder gives {count} pairs the name {name!r}: give each a name of its own")
    reasons = {reason: list(names) for reason, names in (left_out or {}).items()}
    search = PairSearch([], [])
    shared = _shared(pairs, others)
    for pair in pairs:
        trains = is_trained(pair)
        if pair.key not in shared:
            (search.pairs if trains and pair.scaling != 0 else search.resting).append(pair)
        reason = IS_SHARED if pair.key in shared else SCALING_IS_0
        # What is not trained in any case is not missed.
        if trains and (pair.key in shared or pair.scaling == 0):
            reasons.setdefault(reason, []).append(pair.name)
    for reason, names in reasons.items():
        search.left_out.append(f"{reason} ({len(names)} in all, first {names[0]})")
    return search


def check_found(pairs: Sequence[LoRAPair]) -> None:
    """Check the pairs that a finder gave.

    Raises:
        ValueError: shapes or rows that don't fit, a scaling that is not a number, or a reader that does not hold the
            factor.
    """
    for pair in pairs:
        problem = _misfit(pair)
        if problem:
            raise ValueError(f"the finder's pair {pair.name} can't be perturbed: {problem}")


def _tied_as_one(pairs: Sequence[LoRAPair]) -> list[LoRAPair]:
    """The pairs, those of one product with the readers of all of its layers."""
    by_product: dict[Hashable, LoRAPair] = {}
    for pair in pairs:
        product = (id(pair.A), pair.A_rows, id(pair.B), pair.B_rows, pair.scaling)
        if product in by_product:
            first = by_product[product]
            pair = replace(
                first,
                readers=[*first.readers, *pair.readers],
                A_readers=[*first.A_readers, *pair.A_readers],
                layers=[*first.layers, *pair.layers],
            )
        by_product[product] = pair
    return list(by_product.values())


def _misfit(pair: LoRAPair) -> str | None:
    """Why a pair can't be read as s B A; None if it can."""
    if not isfinite(pair.scaling):
        return f"scaling must be a finite number, got {pair.scaling!r}"
    if not pair.readers:
        return "no reader is given, so nothing would read B + E"
    if pair.A.requires_grad and not pair.A_readers:
        return "A is trained and no reader of it is given (A_readers)"
    for factor, rows, readers in ((pair.A, pair.A_rows, pair.A_readers), (pair.B, pair.B_rows, pair.readers)):
        for each in readers:
            reader = as_ref(each)
            owner = f"{reader.name} of the reader {type(reader.module).__name__}"
            if reader.parameter is not factor:
                return f"{owner} is another parameter"
            if reader.rows != rows:
                return f"{owner} is read in the rows {reader.rows}, but the pair's are {rows}"
        if rows is not None and (rows.step != 1 or rows.start < 0 or not rows):
            return f"rows must be a range of rows one after another, got {rows}"
        if rows is not None and factor.ndim > 1 and rows.stop > len(factor):
            return f"the rows {rows} are not all there: the parameter has {len(factor)}"
    # Between its passes FSDP1 leaves a flat part of each parameter, which says nothing about shapes.
    if min(pair.A.ndim, pair.B.ndim) < 2:
        return None
    A, B = (factor.shape for factor in pair.matrices())
    if A[0] != B[1]:
        return f"A must be (r, m) and B (n, r), got {tuple(A)} and {tuple(B)}"
    if A[0] > max(A[1], B[0]):
        return f"A must be (r, m) and B (n, r), got {tuple(A)} and {tuple(B)}, which look transposed"
    return None


def _shared(pairs: Sequence[LoRAPair], others: Iterable[Any]) -> set[Hashable]:
    """The keys of the pairs one of whose factors also serves in another product than s B A."""
    uses: dict[Hashable, list[tuple[LoRAPair | None, Hashable, range | None]]] = defaultdict(list)
    for pair in pairs:
        places = (_place(pair.A), _place(pair.B))
        product: Hashable = (*places, pair.A_rows, pair.B_rows, pair.scaling)
        for place, rows in zip(places, (pair.A_rows, pair.B_rows), strict=True):
            uses[place].append((pair, product, rows))
    for factor in others:
        uses[_place(factor)].append((None, None, None))
    shared: set[Hashable] = set()
    for of_factor in uses.values():
        for (one, product, rows), (other, other_product, other_rows) in combinations(of_factor, 2):
            if product != other_product and _overlap(rows, other_rows):
                shared |= {each.key for each in (one, other) if each is not None}
    return shared


def _place(factor: Any) -> Hashable:
    """Where a factor's values lie: peft ties an output layer to its embedding by parameters that share memory."""
    # A rank may hold nothing of a sharded parameter, and such ones lie at one place.
    if type(factor) is not nn.Parameter or isinstance(factor.data, DTensor) or factor.numel() == 0:
        return id(factor)
    return factor.data_ptr() or id(factor)


def _overlap(rows: range | None, other: range | None) -> bool:
    if rows is None or other is None:
        return True
    return rows.start < other.stop and other.start < rows.stop
