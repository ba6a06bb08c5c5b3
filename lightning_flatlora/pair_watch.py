"""The pairs that a model trains, followed while it trains: freezing, adapters, scalings and new layers may change."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_flatlora.pairs import (
    LoRAPair,
    PairSearch,
    check_adapter,
    factors_of,
    lora_layers,
    nothing_found,
    search_layers,
)


class PairWatch:
    """Finds a model's pairs, and tells at every batch whether they have to be searched for again.

    To ask costs a few reads of each LoRA layer (a fifth of a millisecond for 600 pairs). Only :meth:`walk` goes over
    the whole model, for layers that were put in or replaced.

    Attributes:
        pairs: all that were found so far and are still in the model, also those that are frozen or whose scaling is 0:
            they may come back.
        resting: names of the others that could be perturbed, but are not trained now.
        is_stale: set it where layers may have been put in or replaced; the next question then begins with a walk.

    Args:
        model: a module that contains peft LoRA layers at any depth.
        adapter_name: the adapter to look at; None takes each layer's active ones.
        must_be_active: whether a named adapter that is not active yet is refused.

    Raises:
        ValueError: no LoRA layer has an adapter of that name, or it must be active and is not.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> watch = PairWatch(model)
        >>> len(watch.search([]).pairs), watch.changed([])
        (1, False)
        >>> model.base_model.model[0].set_scale("default", 10)
        >>> watch.changed([]), watch.search([]).pairs[0].scaling
        (True, 40.0)
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None, *, must_be_active: bool = True) -> None:
        self._model = model
        self._adapter_name = adapter_name
        self.pairs: list[LoRAPair] = []
        self.resting: list[str] = []
        self.is_stale = False
        self._seen: Any = None
        self._seen_scalings: list[Any] = []
        self.walk()
        check_adapter(self._layers, adapter_name, must_be_active=must_be_active)

    def walk(self) -> None:
        """Look for the LoRA layers anew."""
        self.is_stale = False
        self._layers = lora_layers(self._model)
        self._scaled: list[tuple[dict[str, float], str]] = []
        self._As: list[nn.Parameter] = []
        self._Bs: list[nn.Parameter] = []
        for _, layer in self._layers:
            for adapter in layer.lora_B:
                A, B = factors_of(layer, adapter)
                if A is not None and B is not None:
                    self._scaled.append((layer.scaling, adapter))
                    self._As.append(A)
                    self._Bs.append(B)
        self._Bs_seen = [id(B) for B in self._Bs]
        # Asking a module for a submodule takes too long for every batch: its own table of them is looked at instead.
        self._tables = [layer.lora_B._modules for _, layer in self._layers]

    def changed(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether anything that decides about the pairs is other than at the last search.

        Args:
            optimizers: those that may hold the factors.
        """
        if self.is_stale:
            self.walk()
        return bool(self._state(optimizers) != self._seen)

    def rescaled(self) -> bool:
        """Whether a scaling is other than when this was last asked, or at the last search if that was later."""
        now = self._scalings()
        if now == self._seen_scalings:
            return False
        self._seen_scalings = now
        return True

    def scalings(self) -> dict[int, float]:
        """The scaling of every pair of the model now, by the identity of B."""
        return {id(B): float(s) for B, s in zip(self._Bs, self._scalings(), strict=True) if s is not None}

    def search(self, optimizers: Sequence[Optimizer]) -> PairSearch:
        """The pairs as they are now: those known before that rest come after those that are trained."""
        self.walk()
        self._seen, self._seen_scalings = self._state(optimizers), self._scalings()
        search = search_layers(self._layers, self._adapter_name)
        trained = {id(pair.B) for pair in search.pairs}
        scalings = self.scalings()
        resting = []
        for pair in self.pairs:
            scaling = scalings.get(id(pair.B))
            if id(pair.B) not in trained and scaling is not None:
                # By a scaling of 0 nothing can be divided: the last other one says what E stands for.
                resting.append(dataclasses.replace(pair, scaling=scaling or pair.scaling, is_off=scaling == 0))
        self.pairs = search.pairs + resting
        known = {pair.name for pair in self.pairs}
        self.resting = [name for name in search.resting if name not in known]
        return PairSearch(self.pairs, search.left_out, self.resting)

    def refusal(self, search: PairSearch) -> str:
        """Why a search that has found nothing did so."""
        return nothing_found(self._model, self._layers, self._adapter_name, search.left_out)

    def _scalings(self) -> list[Any]:
        return [scaling.get(adapter) for scaling, adapter in self._scaled]

    def _state(self, optimizers: Sequence[Optimizer]) -> Any:
        """All that decides about the pairs: lists rather than one tuple a pair, which would take twice as long."""
        held = [(id(each), [len(group["params"]) for group in each.param_groups]) for each in optimizers]
        active = [layer.active_adapter for _, layer in self._layers]
        adapters = [len(table) for table in self._tables]
        trained = [p.requires_grad for p in self._Bs], [p.requires_grad for p in self._As]
        return held, active, adapters, trained, self._scalings(), self._Bs_seen
