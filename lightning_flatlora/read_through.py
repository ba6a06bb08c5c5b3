"""Let a LoRA layer read B + E while the parameter B stays as it is.

A ``lora_B`` module is given a subclass of its own class whose ``weight`` returns the perturbed value while a
perturbation is set. Parameters, names and state dicts are untouched, so whoever looks at the stored weights, at any
moment, sees the clean ones. (A ``forward`` override would be a silent no-op wherever peft reads ``lora_B.weight``
itself: attention that merges, DoRA convolutions.)
"""

import copyreg
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_OWN = ("_perturbation", "_switch", "_installs", "_only_views")


class Switch:
    """One flag for all readers of one owner, so that it need not walk over them twice in every step.

    Attributes:
        is_on: whether the readers that listen to it add their perturbation.
        is_connected: for its owner, who sets it after connecting the readers; false again as soon as one of them was
            given to somebody else.
    """

    def __init__(self, is_on: bool = False) -> None:
        self.is_on = is_on
        self.is_connected = False


_ALWAYS_ON = Switch(is_on=True)


class _ReadsPerturbed:
    """Mixin before a module's own class: ``weight`` is B, or B + E while E is set and switched on."""

    _parameters: dict[str, nn.Parameter | None]
    _plain_class: Any
    _perturbation: Tensor | None
    _switch: Switch
    _installs: int
    _only_views: bool

    @property
    def weight(self) -> Tensor | None:
        # FSDP1 takes the parameter away in forward and sets a view of the gathered values in its place.
        weight: Tensor | None = self.__dict__.get("weight")
        if weight is None:
            if "weight" not in self._parameters:
                raise AttributeError("weight")
            weight = self._parameters["weight"]
        perturbation = self._perturbation
        if weight is None or perturbation is None or not self._switch.is_on:
            return weight
        if isinstance(weight, DTensor) or (self._only_views and isinstance(weight, nn.Parameter)):
            return weight  # FSDP2 or FSDP1 outside of forward
        if isinstance(weight, nn.Parameter) and not weight.requires_grad:
            return weight  # frozen, maybe for one pass alone, as toggle_optimizer does: it is not what is being learnt
        perturbed: Tensor = weight + perturbation
        return perturbed if perturbed.dtype == weight.dtype else perturbed.to(weight.dtype)

    @weight.setter
    def weight(self, weight: Tensor | None) -> None:
        self.__dict__["weight"] = weight

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles are of the plain class: an average or a saved module never holds a perturbed reader."""
        state = {key: value for key, value in self.__dict__.items() if key not in _OWN}
        return copyreg._reconstructor, (self._plain_class, object, None), state  # type: ignore[attr-defined]


@cache
def _reading_class(plain: Any) -> Any:
    return type(f"Perturbed{plain.__name__}", (_ReadsPerturbed, plain), {"_plain_class": plain})


def install(module: nn.Module, only_views: bool = False) -> None:
    """Make a module able to read a perturbed weight; it reads the clean one until :func:`perturb`.

    Args:
        module: has a parameter called weight.
        only_views: never perturb the parameter itself, only a tensor that has been put in its place: FSDP1 does so in
            forward, and takes what it reads at other times for the parameter's new value.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> install(layer); perturb(layer, torch.ones(2, 2))
        >>> bool((layer.weight == layer.state_dict()["weight"] + 1).all())
        True
        >>> uninstall(layer); type(layer).__name__
        'Linear'
    """
    if not isinstance(module, _ReadsPerturbed):
        plain: Any = type(module)
        module.__dict__.update(
            {"_perturbation": None, "_switch": _ALWAYS_ON, "_installs": 0, "_only_views": only_views}
        )
        module.__class__ = _reading_class(plain)
    module.__dict__["_installs"] += 1


def uninstall(module: nn.Module) -> None:
    """Take one :func:`install` back; after the last one the module has its own class again."""
    if isinstance(module, _ReadsPerturbed):
        module.__dict__["_installs"] -= 1
        if module._installs == 0:
            perturb(module, None)
            module.__class__ = module._plain_class
            for name in _OWN:
                del module.__dict__[name]


def perturb(module: nn.Module, perturbation: Tensor | None, switch: Switch = _ALWAYS_ON) -> None:
    """Set what an installed module adds to its weight.

    Args:
        module: a module after :func:`install`.
        perturbation: E, of the weight's shape, any floating dtype (the sum is taken in the wider of the two and
            rounded once); None for the clean weight.
        switch: adds E only while this is on; without one, always.

    Raises:
        RuntimeError: the module is not installed, so that E would be ignored in silence.
    """
    if not isinstance(module, _ReadsPerturbed):
        if perturbation is None:
            return
        raise RuntimeError(f"{type(module).__name__} can't read a perturbed weight: call install() first")
    if module._switch is not switch:
        module._switch.is_connected = False
    module.__dict__["_perturbation"] = perturbation
    module.__dict__["_switch"] = switch


def shown(module: nn.Module) -> Tensor | None:
    """What a module adds to its weight now; None for the clean weight, and for one that is not installed."""
    if isinstance(module, _ReadsPerturbed) and module._switch.is_on:
        return module._perturbation
    return None


@contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """After it, whatever happens, the modules add to their weights what they added before, switched as before."""
    installed = [module for module in modules if isinstance(module, _ReadsPerturbed)]
    before = [(module, module._perturbation, module._switch) for module in installed]
    switches = {switch: switch.is_on for _, _, switch in before}
    try:
        yield
    finally:
        for module, perturbation, switch in before:
            perturb(module, perturbation, switch)
        for switch, was_on in switches.items():
            switch.is_on = was_on


def is_installed(model: nn.Module) -> bool:
    """Whether any module of a model still has a reading class."""
    return any(isinstance(module, _ReadsPerturbed) for module in model.modules())
