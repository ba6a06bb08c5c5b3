"""Terms that a base layer adds to its output for a while, such as noise on its weight, under a compiler too."""

import copyreg
from abc import ABC, abstractmethod
from functools import cache
from typing import Any

from torch import Tensor


class OutputTerm(ABC):
    """A term that a base layer adds to its output while the term is on.

    Args:
        base: the layer.
        layer: the layer of peft around the base, if it is one.
    """

    def __init__(self, base: Any, layer: Any) -> None:
        self._base, self._layer = base, layer
        self._is_on = False

    @abstractmethod
    def term(self, x: Tensor) -> Tensor:
        """Compute the term for an input in the dtype of the layer's output."""

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output for an input, with the term."""
        # With disabled adapters only the base is wanted, as for a reference model's logits.
        if self._layer is not None and self._layer.disable_adapters:
            return output
        return output + self.term(x.to(output.dtype))

    def on(self) -> None:
        """Let the base add the term until :meth:`off`."""
        if self._is_on:
            return
        if not isinstance(self._base, _AddsTerms):
            self._base.__dict__["_terms"] = []
            plain: Any = type(self._base)
            self._base.__class__ = _adding_class(plain)
        self._base._terms.append(self)
        self._is_on = True

    def off(self) -> None:
        """Let the base no longer add the term."""
        if not self._is_on:
            return
        self._base._terms.remove(self)
        if not self._base._terms:
            self._base.__class__ = self._base._plain_class
            del self._base.__dict__["_terms"]
        self._is_on = False


class _AddsTerms:
    """Mixin before a base layer's own class while it adds terms to its output.

    A compiled network has one graph for each class of a module, and makes one when it meets a new class. It
    would ignore a hook added after the first call, and would keep forever what an earlier hook refers to.
    """

    _terms: list[OutputTerm]
    _plain_class: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        for term in self._terms:
            output = term.added(x, output)
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Give a copy of the model that adds nothing."""
        state = {key: value for key, value in self.__dict__.items() if key != "_terms"}
        return copyreg._reconstructor, (self._plain_class, object, None), state  # type: ignore[attr-defined]


@cache
def _adding_class(plain: Any) -> Any:
    return type(f"Adding{plain.__name__}", (_AddsTerms, plain), {"_plain_class": plain})
