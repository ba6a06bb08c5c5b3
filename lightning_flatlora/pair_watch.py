"""The pairs that a model trains, followed while it trains: freezing, adapters, scalings and layers may change."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_flatlora.lora_pair import Finder, LoRAPair, PairSearch, pairs_from, search_found
from lightning_flatlora.pairs import check_adapter, clean_name, factors_of, lora_layers, nothing_found, search_layers


class PairWatch:
    """Finds a model's pairs, and knows at every batch whether they must be searched for again.

    To find out costs a few reads of each LoRA layer (a fifth of a millisecond for 600 pairs). Only :meth:`walk` goes
    over the whole model, to find layers that were put in or replaced.

    Attributes:
        pairs: all that were found so far and are still in the model. Those that are frozen or whose scaling is 0 are
            included, since they may be trained again.
        resting: names of the others that could be perturbed, but are not trained now.
        is_stale: to be set where layers may have been put in or replaced; :meth:`changed` then begins with a walk.

    Args:
        model: a module that contains LoRA layers at any depth.
        adapter_name: the adapter of peft to look at; None takes each layer's active ones.
        finder: says what the pairs are where the layers are not peft's. Scalings that change are then seen by the next
            walk, and not at every batch.
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

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str | None = None,
        finder: Finder | None = None,
        *,
        must_be_active: bool = True,
    ) -> None:
        self._model = model
        self._adapter_name = adapter_name
        self._finder = finder
        self.pairs: list[LoRAPair] = []
        self.resting: list[str] = []
        self.is_stale = False
        self._seen: Any = None
        self._met: set[Hashable] = set()
        self._seen_scalings: list[Any] = []
        self.walk()
        check_adapter(self._layers, adapter_name, must_be_active=must_be_active)

    def walk(self) -> None:
        """Find the LoRA layers again."""
        self.is_stale = False
        self._found = pairs_from(self._finder, self._model) if self._finder is not None else []
        self._layers = lora_layers(self._model) if self._finder is None else []
        self._scaled: list[tuple[dict[str, float], str]] = []
        self._As: list[nn.Parameter] = []
        self._Bs: list[nn.Parameter] = []
        self._keys: list[Hashable] = []
        for pair in self._found:
            self._see({pair.name: pair.scaling}, pair.name, pair.A, pair.B, pair.key)
        for _, layer in self._layers:
            for adapter in layer.lora_B:
                A, B = factors_of(layer, adapter)
                # A weight that is computed from other parameters, as by pruning, has no gradient that may be read.
                if A is not None and B is not None and B.is_leaf:
                    self._see(layer.scaling, adapter, A, B, id(B))
        # By identity, since a B that was replaced may have the name, the shape and the flags of the old one.
        self._Bs_seen = [id(B) for B in self._Bs]
        # Looking up a submodule as an attribute takes too long for every batch, so the modules' own tables are kept.
        self._tables = [layer.lora_B._modules for _, layer in self._layers]

    def _see(self, scalings: dict[str, float], name: str, A: nn.Parameter, B: nn.Parameter, key: Hashable) -> None:
        """Note what decides about one pair; its scaling is an entry of a dictionary that the layer may change."""
        self._scaled.append((scalings, name))
        self._As.append(A)
        self._Bs.append(B)
        self._keys.append(key)

    def changed(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether anything that decides about the pairs has changed since the last search.

        Args:
            optimizers: those that may hold the factors.
        """
        if self.is_stale:
            self.walk()
        return bool(self._state(optimizers) != self._seen)

    def meets_others(self) -> bool:
        """Whether a B has a gradient whose pair no search has met, as of an adapter that a step itself activates."""
        for key, (_, adapter), B in zip(self._keys, self._scaled, self._Bs, strict=True):
            is_wanted = self._adapter_name in (None, adapter)
            if is_wanted and B.grad is not None and key not in self._met:
                return True
        return False

    def rescaled(self) -> bool:
        """Whether a scaling has changed since the last call, or since the last search if that was later."""
        now = self._scaling_marks()
        if now == self._seen_scalings:
            return False
        self._seen_scalings = now
        return True

    def scalings(self) -> dict[Hashable, float]:
        """The scaling of every pair of the model now, by the pair's key."""
        return {key: float(s) for key, s in zip(self._keys, self._scalings(), strict=True) if s is not None}

    def search(self, optimizers: Sequence[Optimizer], *, with_gradient: bool = False) -> PairSearch:
        """The pairs as they are now: first those that are trained, then known ones that are not trained now.

        Args:
            optimizers: those that may hold the factors.
            with_gradient: pairs whose B has a gradient count as trained too, see :meth:`meets_others`.
        """
        self.walk()
        self._seen, self._seen_scalings = self._state(optimizers), self._scaling_marks()
        if self._finder is None:
            search = search_layers(self._layers, self._adapter_name, with_gradient=with_gradient)
        else:
            search = search_found(self._found)
        trained = {pair.key for pair in search.pairs}
        scalings = self.scalings()
        resting = []
        for pair in self.pairs:
            scaling = scalings.get(pair.key)
            if pair.key not in trained and scaling is not None:
                # E is defined by a division by the scaling. Where that is 0, the last other value takes its place.
                resting.append(dataclasses.replace(pair, scaling=scaling or pair.scaling, is_off=scaling == 0))
        self.pairs = search.pairs + resting
        self._met |= {pair.key for pair in self.pairs}
        if with_gradient:  # what was left out is no news the next time
            self._met |= {key for key, B in zip(self._keys, self._Bs, strict=True) if B.grad is not None}
        known = {pair.name for pair in self.pairs}
        self.resting = [name for name in search.resting if name not in known]
        return PairSearch(self.pairs, search.left_out, self.resting)

    def merge_problems(self) -> list[str]:
        """Why the pairs can't be trained as peft's layers are now: merged, they compute with their base alone."""
        names = [clean_name(name) for name, layer in self._layers if layer.merged]
        if not names:
            return []
        return [f"the adapter is merged into its base, as in {names[0]}, and can't learn: call unmerge_adapter() first"]

    def refusal(self, search: PairSearch) -> str:
        """Why a search found nothing."""
        return nothing_found(self._model, self._finder, self._layers, self._adapter_name, search)

    def _scalings(self) -> list[Any]:
        return [scaling.get(adapter) for scaling, adapter in self._scaled]

    def _scaling_marks(self) -> list[Any]:
        """Equal as long as no scaling has changed."""
        # For compiled models peft keeps tensors and writes them in place, and their numbers would wait for the device.
        return [(s, s._version) if isinstance(s, Tensor) else s for s in self._scalings()]

    def _state(self, optimizers: Sequence[Optimizer]) -> Any:
        """Everything that decides about the pairs, in lists: one tuple for each pair would take twice as long."""
        held = [(id(optimizer), _group_sizes(optimizer)) for optimizer in optimizers]
        active = [layer.active_adapter for _, layer in self._layers]
        adapters = [len(table) for table in self._tables]
        trained = [p.requires_grad for p in self._Bs], [p.requires_grad for p in self._As]
        return held, active, adapters, trained, self._scaling_marks(), self._Bs_seen


def _group_sizes(optimizer: Optimizer) -> list[int]:
    # Enough to see parameters join and leave, and cheap enough for every batch.
    return [len(param_group["params"]) for param_group in optimizer.param_groups]
