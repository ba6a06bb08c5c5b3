"""Find the LoRA pairs (A, B) of a model: in peft's layers, or in others by a finder.

Pairs are divided into trained ones, resting ones, and those that can't be perturbed.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from math import isfinite
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair, NoPairsError, PairSearch, trained_factors
from lightning_flatlora.pairs.peft_pairs import active_adapters, check_adapter, kind_of, lora_layers, search_layers
from lightning_flatlora.perturbed_read import as_ref
from lightning_flatlora.schedules import is_integer
from lightning_flatlora.sharding import matrix_shape

SCALING_IS_0 = "its scaling is 0, so no perturbation of B moves its weight"
IS_SHARED = "a factor is shared with another pair or scaling, so its gradient belongs to several products"


def find_pairs(model: nn.Module, adapter_name: str | None = None, *, finder: Finder | None = None) -> PairSearch:
    """Find every pair whose B is trained and whose update is exactly s B A; each parameter appears once.

    Args:
        model: a module that contains LoRA layers at any depth.
        adapter_name: the peft adapter to search; None takes each layer's active ones.
        finder: finds the pairs of layers that are not peft's, see :mod:`lightning_flatlora.pairs.finders`.

    Returns:
        The pairs, and the layers that were left out, with reasons.

    Raises:
        ValueError: no LoRA layer has an adapter of that name, or it is active in none (the message lists the others);
            the finder gave something that is not a pair; or both arguments were given.
        NoPairsError: no pair is left; the message lists the LoRA layers and module types seen.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> [(pair.name, pair.B.shape, pair.A.shape) for pair in find_pairs(model).pairs]
        [('base_model.model.0.lora_B.default.weight', torch.Size([3, 2]), torch.Size([2, 4]))]
    """
    search = search_pairs(model, adapter_name, finder)
    if not search.pairs:
        raise NoPairsError(nothing_found(model, adapter_name, finder, search))
    return search


def search_pairs(
    model: nn.Module, adapter_name: str | None, finder: Finder | None, *, must_be_active: bool = True
) -> PairSearch:
    """Search like :func:`find_pairs`, but accept a model without pairs.

    Args:
        model: see :func:`find_pairs`, also for the errors.
        adapter_name: may name an adapter that is activated later, if ``must_be_active`` is False.
        finder: for layers that are not peft's.
        must_be_active: whether an inactive ``adapter_name`` is refused.
    """
    if finder is not None and adapter_name is not None:
        raise ValueError("adapter_name applies to peft layers, finder to all others: give one of them")
    if finder is not None:
        pairs = pairs_from(finder, model)
        return _divided(pairs, {id(pair.B) for pair in pairs if pair.B.requires_grad}, {}, [], [])
    layers = lora_layers(model)
    check_adapter(layers, adapter_name, must_be_active)
    return _divided(*search_layers(model, layers, adapter_name))


def pairs_from(finder: Finder, model: nn.Module) -> list[LoRAPair]:
    """Return the pairs that a finder gives for a model.

    Raises:
        ValueError: one of its pairs can't be read as s B A.
    """
    pairs = list(finder(model))
    for pair in pairs:
        problem = _misfit(pair)
        if problem:
            raise ValueError(f"the finder's pair {pair.name} can't be perturbed: {problem}")
    return pairs


def _misfit(pair: LoRAPair) -> str | None:
    """Say why a pair can't be read as s B A; None if it can."""
    if not isfinite(pair.scaling):
        return f"scaling must be a finite number, got {pair.scaling!r}"
    if not pair.readers:
        return "no reader is given, so nothing would read B + E"
    if pair.A.requires_grad and not pair.A_readers:
        return "A is trained and no reader of it is given (A_readers)"
    shapes = []
    for factor, rows, readers in ((pair.A, pair.A_rows, pair.A_readers), (pair.B, pair.B_rows, pair.readers)):
        for each in readers:
            reader = as_ref(each)
            owner = f"{reader.name} of the reader {type(reader.module).__name__}"
            if reader.parameter is not factor:
                return f"{owner} is another parameter"
            if reader.rows != rows:
                return f"{owner} is read in the rows {reader.rows}, but the pair's are {rows}"
        if rows is not None and (rows.step != 1 or rows.start < 0 or not rows):
            return f"rows must be a range of consecutive rows, got {rows}"
        if rows is not None and factor.ndim > 1 and rows.stop > len(factor):
            return f"some of the rows {rows} don't exist: the parameter has {len(factor)}"
        length, columns = matrix_shape(factor.shape)
        shape = (length if rows is None else len(rows), columns)
        shapes.append(shape[::-1] if pair.is_transposed else shape)
    # Between passes FSDP1 leaves a flat part of each parameter, which does not tell its shape.
    if min(pair.A.ndim, pair.B.ndim) < 2:
        return None
    A, B = shapes
    if not is_integer(pair.experts, least=1) or A[0] % pair.experts:
        return f"experts must be an integer >= 1 that divides the {A[0]} rows of A, got {pair.experts!r}"
    got = f"A must be (r, m) and B (n, r), got {A} and {B}"
    if A[0] != B[1]:
        return got
    return f"{got}, which look transposed" if A[0] > pair.experts * max(A[1], B[0]) else None


def _divided(
    pairs: Sequence[LoRAPair], trained: set[int], left_out: dict[str, list[str]], others: list[Any], plain: list[Any]
) -> PairSearch:
    """Divide the pairs of a model; the arguments are those returned by :func:`search_layers`.

    Pairs with identical factors and scaling (a tied adapter) become one pair with the readers of all.
    """
    pairs = _tied_as_one(pairs)
    for name, count in Counter(pair.name for pair in pairs).items():
        if count > 1:  # checkpoints know a pair by its name
            raise ValueError(f"the finder gives {count} pairs the name {name!r}: give each a unique name")
    search, unperturbed = PairSearch([], []), set(plain)
    shared = _shared(pairs, others)
    for pair in pairs:
        is_trained = id(pair.B) in trained
        if pair not in shared:
            (search.pairs if is_trained and pair.scaling != 0 else search.resting).append(pair)
        # Pairs that are not trained anyway are not reported.
        if is_trained and (pair in shared or pair.scaling == 0):
            left_out.setdefault(IS_SHARED if pair in shared else SCALING_IS_0, []).append(pair.name)
            unperturbed.update((pair.A, pair.B))
    lines = [f"{reason} ({len(names)} in all, first {names[0]})" for reason, names in left_out.items()]
    left = sum(parameter.numel() for parameter in unperturbed if parameter.requires_grad)
    # An FSDP1 rank may hold nothing of any pair.
    size = max(1, left + sum(factor.numel() for factor in trained_factors(search.pairs)))
    return replace(search, left_out=lines, share_left_out=left / size)


def _tied_as_one(pairs: Sequence[LoRAPair]) -> list[LoRAPair]:
    """Return the pairs, merging those of one product into a pair with the readers of all its layers."""
    by_product: dict[Hashable, LoRAPair] = {}
    for pair in pairs:
        product = (id(pair.A), pair.A_rows, id(pair.B), pair.B_rows, pair.scaling)
        if product in by_product:
            first = by_product[product]
            readers, A_readers = [*first.readers, *pair.readers], [*first.A_readers, *pair.A_readers]
            pair = replace(first, readers=readers, A_readers=A_readers, layers=[*first.layers, *pair.layers])
        by_product[product] = pair
    return list(by_product.values())


def _shared(pairs: Sequence[LoRAPair], others: Iterable[Any]) -> set[LoRAPair]:
    """Find the pairs with a factor that is also used in a product other than s B A."""
    uses: dict[Hashable, list[tuple[LoRAPair | None, range | None]]] = defaultdict(list)
    for pair in pairs:
        uses[_place(pair.A)].append((pair, pair.A_rows))
        uses[_place(pair.B)].append((pair, pair.B_rows))
    for factor in others:
        uses[_place(factor)].append((None, None))
    shared: set[LoRAPair] = set()
    for of_factor in uses.values():
        for (one, rows), (other, other_rows) in combinations(of_factor, 2):
            # None means all rows of the parameter.
            overlap = not (rows and other_rows) or (rows.start < other_rows.stop and other_rows.start < rows.stop)
            if one is not other and overlap:
                shared.update(each for each in (one, other) if each is not None)
    return shared


def _place(factor: Any) -> Hashable:
    """Identify a factor's memory: peft ties an output layer to its embedding by parameters that share memory."""
    # A rank may hold nothing of some sharded parameters, all of which have one address.
    if type(factor) is not nn.Parameter or isinstance(factor.data, DTensor) or factor.numel() == 0:
        return id(factor)
    return factor.data_ptr() or id(factor)


def nothing_found(model: nn.Module, adapter_name: str | None, finder: Finder | None, search: PairSearch) -> str:
    """Say why a model has no pair to perturb, with the LoRA layers and module types seen."""
    kinds = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
    layers = lora_layers(model)
    lines = ["no LoRA pair to perturb: need a peft LoRA layer whose B is trained."]
    if finder is not None:
        lines = [f"no LoRA pair to perturb: {getattr(finder, '__name__', finder)} found none whose B is trained."]
        if search.resting:
            lines.append(f"{len(search.resting)} are not trained, such as {search.resting[0].name}: unfreeze their B.")
        elif not search.left_out:
            lines.append(f"The model holds {kinds}: does the finder know these layers?")
    elif layers:
        seen = ", ".join(sorted({kind_of(layer).__name__ for _, layer in layers}))
        lines.append(f"LoRA layers seen: {seen}; adapter {adapter_name or sorted(active_adapters(layers))}.")
        if not search.left_out:
            lines.append("Every B is frozen: disabled, is_trainable=False, or left to a BaseFinetuning callback?")
    else:
        lines.append(
            f"The model holds no LoRA layer of peft, only {kinds}. Wrap it with peft.get_peft_model, or, if it holds "
            "another library's LoRA, give a finder: finder=lightning_flatlora.pairs.finders.litgpt_pairs, "
            'torchtune_pairs, nemo_pairs, or PairsByName(a="lora_A", b="lora_B", scaling="scaling") with your names.'
        )
    lines += [f"Left out: {line}." for line in search.left_out]
    return " ".join(lines)
