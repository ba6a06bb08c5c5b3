"""Terms that a base layer adds to its output for a while, such as noise on its weight, under a compiler too."""

import copyreg
from functools import cache
from typing import Any, Protocol

from torch import Tensor


class OutputTerm(Protocol):
    """A term that a base layer can add to its output."""

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output for an input, with the term."""


class _AddsTerms:
    """Mixin before a base layer's own class while it adds terms to its output.

    A compiled network has one graph for each class of a module, and makes one where it meets a new class. It
    would ignore a hook added after the first call, and would keep for ever what an earlier hook refers to.
    """

    _terms: list[OutputTerm]
    _plain_class: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        for term in self._terms:
            output = term.added(x, output)
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy of the model adds nothing."""
        state = {key: value for key, value in self.__dict__.items() if key != "_terms"}
        return copyreg._reconstructor, (self._plain_class, object, None), state  # type: ignore[attr-defined]


@cache
def _adding_class(plain: Any) -> Any:
    return type(f"Adding{plain.__name__}", (_AddsTerms, plain), {"_plain_class": plain})


def add_term(module: Any, term: OutputTerm) -> None:
    """Let a base layer add a term to its output, until :func:`remove_term`."""
    if not isinstance(module, _AddsTerms):
        module.__dict__["_terms"] = []
        plain: Any = type(module)
        module.__class__ = _adding_class(plain)
    module._terms.append(term)


def remove_term(module: Any, term: OutputTerm) -> None:
    """Let a base layer no longer add this term."""
    module._terms.remove(term)
    if not module._terms:
        module.__class__ = module._plain_class
        del module.__dict__["_terms"]
