"""Find the LoRA pairs (A, B) of a model: in peft's layers, or by a finder in others."""

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from lightning_flatlora.pairs.division import check_found, divided
from lightning_flatlora.pairs.lora_pair import Finder, NoPairsError, PairSearch, pairs_from
from lightning_flatlora.pairs.peft_pairs import active_adapters, check_adapter, kind_of, lora_layers, search_layers


def find_pairs(model: nn.Module, adapter_name: str | None = None, *, finder: Finder | None = None) -> PairSearch:
    """Find every pair whose B is trained and whose update is exactly s B A, each parameter once.

    Args:
        model: a module that contains LoRA layers at any depth.
        adapter_name: the adapter of peft to look at; None takes each layer's active ones.
        finder: says what the pairs are where the layers are not peft's, see :mod:`lightning_flatlora.pairs.finders`.

    Returns:
        The pairs, and what was left out and why.

    Raises:
        ValueError: no LoRA layer has an adapter of that name, or it is active in none; the message lists the others. Or
            the finder gave something that is not a pair, or both arguments were given.
        NoPairsError: no pair is left; the message lists the LoRA layers and module types that were seen.

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
    """Find what :func:`find_pairs` gives; it may be nothing.

    Args:
        model: see :func:`find_pairs`, as the other two.
        adapter_name: may be the name of an adapter that is activated later, if ``must_be_active`` is False.
        finder: for layers that are not peft's.
        must_be_active: whether a named adapter that is not active is refused.

    Raises:
        ValueError: as :func:`find_pairs`.
    """
    if finder is not None and adapter_name is not None:
        raise ValueError("adapter_name applies to peft layers, finder to all others: give one of them")
    if finder is not None:
        found = pairs_from(finder, model)
        check_found(found)
        return divided(found, lambda pair: pair.B.requires_grad)
    layers = lora_layers(model)
    check_adapter(layers, adapter_name, must_be_active)
    return search_layers(layers, adapter_name)


def _looks_like_lora(module: nn.Module) -> bool:
    """Whether a layer has LoRA's names but is not peft's, such as those of litgpt, torchtune, loralib and NeMo."""
    if isinstance(module, BaseTunerLayer | LoraLayer):
        return False
    held = (*module.named_parameters(recurse=False), *module.named_children())
    names = {name.lower() for name, _ in held}
    return {"lora_a", "lora_b"} <= names or {"linear_in", "linear_out"} <= names


def nothing_found(model: nn.Module, adapter_name: str | None, finder: Finder | None, search: PairSearch) -> str:
    """Say why a model has no pair to perturb, with the LoRA layers and module types that were seen."""
    if finder is not None:
        return _finder_found_nothing(model, finder, search)
    layers = lora_layers(model)
    lines = ["no LoRA pair to perturb: need a peft LoRA layer whose B is trained."]
    others = sorted({type(module).__name__ for module in model.modules() if _looks_like_lora(module)})
    tuners = sorted(_other_methods_of_peft(model))
    if not layers and others:
        lines += [
            f"The model holds layers that look like another library's LoRA, {', '.join(others)}; without a finder only "
            "peft's are found.",
            "Give one, such as finder=lightning_flatlora.pairs.finders.litgpt_pairs, torchtune_pairs, nemo_pairs, or "
            'PairsByName(a="lora_A", b="lora_B", scaling="scaling") with the names that the layers have.',
        ]
    elif not layers and tuners:
        lines.append(
            f"The model holds peft's {', '.join(tuners)}, and no LoRA layer: only LoRA's update is a product s B A."
        )
    elif not layers:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        lines += [f"The model holds no LoRA layer, only {', '.join(kinds)}.", "Wrap it with peft.get_peft_model."]
    else:
        kinds = sorted({kind_of(layer).__name__ for _, layer in layers})
        adapters = adapter_name or sorted(active_adapters(layers))
        lines.append(f"LoRA layers seen: {', '.join(kinds)}; adapter {adapters}.")
        lines += [f"Left out: {line}." for line in search.left_out]
        if not search.left_out:
            lines.append(
                "Every B is frozen: was the adapter loaded with is_trainable=False, disabled, or never activated? "
                "Where it is unfrozen later in the fit, let a BaseFinetuning callback do it"
            )
    return " ".join(lines)


def _other_methods_of_peft(model: nn.Module) -> set[str]:
    """The names of peft's methods in a model: of those that adapt layers their classes, of prompts their kinds."""
    found = set()
    for module in model.modules():
        if isinstance(module, BaseTuner):
            found.add(type(module).__name__)
        elif isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
            found.add(str(module.active_peft_config.peft_type.value))
    return found


def _finder_found_nothing(model: nn.Module, finder: Finder, search: PairSearch) -> str:
    """Why a finder gave no pair to perturb."""
    lines = [f"no LoRA pair to perturb: {getattr(finder, '__name__', finder)} found none whose B is trained."]
    lines += [f"Left out: {line}." for line in search.left_out]
    if search.resting:
        lines.append(f"{len(search.resting)} are not trained, {search.resting[0].name} among them: unfreeze their B.")
    if not search.left_out and not search.resting:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        lines.append(f"The model holds {', '.join(kinds)}: does the finder know these layers?")
    return " ".join(lines)
