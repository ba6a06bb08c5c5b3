"""The perturbation E of every pair of a model: from gradients, averaged over steps, and read through by the layers."""

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_flatlora import read_through
from lightning_flatlora.distributed import Layout, matrix_shape
from lightning_flatlora.functional import (
    Ascent,
    Estimator,
    NormScope,
    ascent_average,
    ascent_projected,
    perturbation_scale,
)
from lightning_flatlora.pairs import LoRAPair

_LARGEST_STACK = 2**21
"""Elements of a stacked factor in one computation (8 MB of float32): bounds the temporaries of a large model.

Four times as many on an accelerator, where the launch of a kernel costs more than a large allocation does.
"""


_LONGEST_REST = 100
"""Optimizer steps in a row without a gradient after which a pair's E is forgotten.

Experts, dropped layers and tasks that take turns miss some steps and come back: their E has to last until then. A layer
that is out of use for good must not be read perturbed for ever.
"""


class FreshPerturbation(NamedTuple):
    """E as one gradient gives it.

    Attributes:
        stacks: one (L, n, r) tensor for each group of equal layers; zeros where ``finite`` is false.
        finite: whether every gradient was finite, a boolean on the device, shape ().
        is_zero: rho was the number 0, so E is known to be zero without asking the device.
    """

    stacks: list[Tensor]
    finite: Tensor
    is_zero: bool


class Perturbation:
    """The perturbations E (n, r) of all pairs, kept in float32 (float64 where B is), and what the layers read.

    E starts at zero. It is set by :meth:`assign` (FMLoRA) or moved by :meth:`average` (EFMLoRA), and enters the forward
    pass between :meth:`on` and :meth:`off`, or inside :meth:`applied`. Nothing here waits for the device but
    :meth:`state_dict`.

    A pair learns while its B is trained. One whose B is frozen reads the clean B and keeps its E until it is trained
    again. One that has no gradient in a step keeps its E as well, and starts anew after 100 such steps in a row: see
    :meth:`forget_missing`.

    Attributes:
        started: whether the average may be other than zero; while rho has always been 0 nothing needs to read it, and
            the run is the base run bit for bit.

    Args:
        pairs: from :func:`~lightning_flatlora.pairs.find_pairs`.
        estimator: "average" (Eq. 12) or "projected" (G P_A); pairs with a frozen A always take the latter.
        norm_scope: "global", one ball of radius rho over all pairs, or "layer", one for each.
        layout: how the ranks share the factors; None where each holds them whole, or as DTensors.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora.pairs import find_pairs
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> perturbation = Perturbation(find_pairs(model).pairs)
        >>> perturbation.install()
        >>> model(torch.ones(5, 4)).sum().backward()
        >>> perturbation.assign(perturbation.ascend(rho=0.5, at_perturbed=False))
        >>> with perturbation.applied():
        ...     perturbed = model(torch.ones(5, 4)).sum()
        >>> bool(perturbed > model(torch.ones(5, 4)).sum())
        True
        >>> perturbation.uninstall()
    """

    def __init__(
        self,
        pairs: list[LoRAPair],
        estimator: Estimator = "average",
        norm_scope: NormScope = "global",
        layout: Layout | None = None,
    ) -> None:
        for name, value, allowed in (
            ("estimator", estimator, get_args(Estimator)),
            ("norm_scope", norm_scope, get_args(NormScope)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
        if not pairs:
            raise ValueError("pairs must hold at least one LoRAPair: see find_pairs")
        self.pairs = pairs
        self.norm_scope: NormScope = norm_scope
        self.started = False
        self._estimator: Estimator = estimator
        self._layout = layout or Layout()
        self._groups = self._grouped(pairs)
        self._installed = False
        self._switch = read_through.Switch()
        self._forgotten = {id(pair.B) for pair in pairs}
        self._missed: dict[int, int] = {}  # steps in a row without a gradient, by the identity of B
        self._expected: dict[str, _Saved] = {}

    def _grouped(self, pairs: list[LoRAPair]) -> list["_Group"]:
        return [_Group(group, self._estimator, self._layout) for group in _alike(pairs, self._layout)]

    @property
    def _device(self) -> torch.device:
        return self._groups[0].E.device

    def follow(self, pairs: list[LoRAPair], layout: Layout | None = None) -> None:
        """Go on with the pairs that the model has now: E of those that stay is kept, of new ones it is zero.

        Where a pair's scaling s has changed, s E stays what it was, and with it the perturbation of the full weight.
        The layers read the clean B until the next :meth:`on`.

        Args:
            pairs: at least one, from another search of the same model.
            layout: how the ranks share their factors; None where each holds them whole, or as DTensors.
        """
        installed = self._installed
        self.uninstall()
        before = {id(pair.B): (pair, E, averaged) for group in self._groups for pair, E, averaged in group.rows()}
        self.pairs, self._layout = pairs, layout or Layout()
        self._groups = self._grouped(pairs)
        forgotten, missed = set(), {}
        reshaped = []
        for group in self._groups:
            for pair, E, averaged in group.rows():
                key = id(pair.B)
                if key in before:
                    old, old_E, old_averaged = before[key]
                    E.copy_(old_E).mul_(old.scaling / pair.scaling)
                    averaged.copy_(old_averaged)
                    if key in self._forgotten:
                        forgotten.add(key)
                    if key in self._missed:
                        missed[key] = self._missed[key]
                    continue
                saved = self._expected.pop(pair.name, None)
                if saved is not None and saved.E.shape != E.shape:
                    reshaped.append(f"{pair.name} has shape {tuple(E.shape)}, in the checkpoint {tuple(saved.E.shape)}")
                    saved = None
                if saved is None or not saved.averaged:
                    forgotten.add(key)
                if saved is not None:
                    E.copy_(saved.E)
                    averaged.fill_(saved.averaged)
                    missed |= {key: saved.missed} if saved.missed else {}
        self._forgotten, self._missed = forgotten, missed
        if reshaped:
            more = f" (and {len(reshaped) - 1} more)" if len(reshaped) > 1 else ""
            warnings.warn(f"a perturbation starts anew, as it is of another shape: {reshaped[0]}{more}", stacklevel=2)
        if installed:
            self.install()

    def rescale(self, scalings: Mapping[int, float]) -> None:
        """Take over scalings that have changed, and nothing else: s E stays what it was, as in :meth:`follow`.

        Args:
            scalings: s by the identity of B; a pair whose s is missing is left as it is, and one whose s is 0 rests.
        """
        for group in self._groups:
            for i, (pair, E) in enumerate(group):
                scaling = scalings.get(id(pair.B))
                if scaling is not None and pair.is_off != (scaling == 0):
                    pair = group.pairs[i] = dataclasses.replace(pair, is_off=scaling == 0)
                if scaling and scaling != pair.scaling:
                    E.mul_(pair.scaling / scaling)
                    group.scaling[i].fill_(scaling)
                    group.pairs[i] = dataclasses.replace(pair, scaling=scaling)
        self.pairs = [pair for group in self._groups for pair in group.pairs]

    def install(self) -> None:
        """Make every reader able to read B + E; until :meth:`on` they read B."""
        if not self._installed:
            for pair in self.pairs:
                for reader in pair.readers:
                    read_through.install(reader, self._layout.only_views)
        self._installed = True

    def uninstall(self) -> None:
        """Give every reader its own class back; E stays, for :meth:`state_dict`."""
        if self._installed:
            self.off()
            self._switch = read_through.Switch()  # readers that somebody else keeps installed listen to the old one
            for pair in self.pairs:
                for reader in pair.readers:
                    read_through.uninstall(reader)
        self._installed = False

    def on(self) -> None:
        """Let the layers read B + E, with the kept E, whose updates they follow."""
        if not self._switch.is_connected:
            self._connect([group.E for group in self._groups], self._switch)
            self._switch.is_connected = True
        self._switch.is_on = True

    def off(self) -> None:
        """Let the layers read the clean B."""
        self._switch.is_on = False

    @contextmanager
    def applied(self, stacks: list[Tensor] | None = None) -> Iterator[None]:
        """The layers read B + E inside; after it, whatever happens, they read what they read before.

        Args:
            stacks: E to read, as in :class:`FreshPerturbation`; None reads the kept one, and follows its updates.
        """
        with read_through.restored(reader for pair in self.pairs for reader in pair.readers):
            self._connect(stacks or [group.E for group in self._groups], read_through.Switch(is_on=True))
            yield

    def _connect(self, stacks: list[Tensor], switch: read_through.Switch) -> None:
        """Give every reader its slice of the stacks, to add while a switch is on."""
        for group, stack in zip(self._groups, stacks, strict=True):
            for pair, E in zip(group.pairs, stack.unbind(), strict=True):
                view = E.view(self._layout.shape(pair.B))
                for reader in pair.readers:
                    read_through.perturb(reader, view, switch)

    def ascend(
        self, rho: float | Tensor, *, at_perturbed: bool, also_finite: Iterable[nn.Parameter] = ()
    ) -> FreshPerturbation:
        """E of the gradients that the pairs hold now (Eqs. 10-15); a missing gradient counts as zero.

        Args:
            rho: radius of the ball.
            at_perturbed: whether the gradients were taken at B + E (EFMLoRA, Algorithm 2) or at B (FMLoRA).
            also_finite: parameters whose gradients decide ``finite`` too, as those that a loss scaler watches.

        Returns:
            E, on every rank the same where the gradients are.
        """
        # A manual training_step runs inside autocast.
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return self._ascend(rho, at_perturbed, also_finite)

    def _ascend(
        self, rho: float | Tensor, at_perturbed: bool, also_finite: Iterable[nn.Parameter]
    ) -> FreshPerturbation:
        ascents = [group.ascent(at_perturbed) for group in self._groups]
        norms = [ascent.squared_norm for ascent in ascents]
        finite = self._finite(norms, also_finite)
        if self.norm_scope == "global":
            total = torch.stack([norm.sum().to(norms[0].device, norms[0].dtype) for norm in norms]).sum()
            norms = [total.to(norm.device, norm.dtype).expand_as(norm) for norm in norms]
        stacks = []
        for ascent, norm in zip(ascents, norms, strict=True):
            scale = perturbation_scale(norm, rho)[:, None, None]
            stacks.append(ascent.direction.mul_(scale).masked_fill_(~finite.to(norm.device), 0.0))
        return FreshPerturbation(stacks, finite, not isinstance(rho, Tensor) and rho == 0)

    def assign(self, fresh: FreshPerturbation) -> None:
        """E := fresh (Algorithm 1)."""
        for group, stack in zip(self._groups, fresh.stacks, strict=True):
            group.E.copy_(stack)

    def average(self, fresh: FreshPerturbation, beta: float) -> None:
        """E := (1 - beta) E + beta fresh (Eq. 18); the first one is taken whole, one not finite leaves E as it is.

        Args:
            fresh: from :meth:`ascend`.
            beta: weight of the fresh one, in (0, 1].
        """
        for group, stack in zip(self._groups, fresh.stacks, strict=True):
            finite, here = fresh.finite.to(stack.device), group.here
            weight = torch.full((len(stack),), beta, dtype=stack.dtype, device=stack.device)
            weight = torch.where(group.averaged, weight, 1.0) * finite
            taken = finite
            if here is not None:  # what has no gradient now keeps its E
                weight, taken = weight * here, here & finite
            group.E.lerp_(stack, weight[:, None, None])
            group.averaged |= taken
        if not fresh.is_zero:
            self.started = True
            if self._forgotten:
                self._forgotten -= {id(pair.B) for group in self._groups for pair in group.pairs_here}

    def forget_missing(self) -> None:
        """Count the steps that each pair misses; after 100 in a row, E := 0, and its next E is taken whole again.

        To be called once for each optimizer step, while the gradients are there. A pair without one rests: it may be an
        expert that no sample went to, a layer that was dropped, or of a task whose turn it is not. After 100 steps its
        layer is taken to be out of use, or its adapter to be switched off. Frozen pairs are not counted, as their
        layers read the clean B, nor are those whose scaling is 0. All this is known to the host; under FSDP1, where it
        is not, a missing gradient counts as zero and the average fades.
        """
        for group in self._groups:
            here = self._layout.have_gradients([pair.B for pair in group.pairs])
            if all(here) and not self._missed:
                continue
            for i, (pair, has) in enumerate(zip(group.pairs, here, strict=True)):
                key = id(pair.B)
                if has:
                    self._missed.pop(key, None)
                    continue
                is_read = pair.B.requires_grad or self._layout.splits(pair.B)  # sharded, a frozen B is read as before
                if pair.is_off or not is_read or key in self._forgotten:
                    continue
                self._missed[key] = self._missed.get(key, 0) + 1
                if self._missed[key] >= _LONGEST_REST:
                    group.E[i].zero_()
                    group.averaged[i].zero_()
                    self._forgotten.add(key)
                    del self._missed[key]
        self.started &= len(self._forgotten) < len(self.pairs)

    @property
    def learns(self) -> bool:
        """Whether any pair's B is trained now."""
        return any(pair.B.requires_grad for pair in self.pairs)

    @property
    def has_gradient(self) -> bool:
        """Whether any pair has a gradient at all, known to the host."""
        return self._layout.has_gradient(pair.B for pair in self.pairs)

    def all_finite(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Whether every gradient is finite on every rank, as a boolean on the device, shape ()."""
        return self._layout.all_finite(parameters, self._device)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as full CPU tensors, keyed by the clean name of each B."""
        E = {name: saved.E for name, saved in self._expected.items()}
        averaged = {name: saved.averaged for name, saved in self._expected.items()}
        missed = {name: saved.missed for name, saved in self._expected.items() if saved.missed}
        for group in self._groups:
            E |= {pair.name: row.detach().cpu().clone() for pair, row in group}
            averaged |= dict(zip((pair.name for pair in group.pairs), group.averaged.tolist(), strict=True))
        missed |= {pair.name: self._missed[id(pair.B)] for pair in self.pairs if id(pair.B) in self._missed}
        return {"started": self.started, "averaged": averaged, "missed": missed, "E": E}

    def load_state_dict(
        self, state: dict[str, Any], may_come: Collection[str] = (), *, may_be_new: bool = False
    ) -> None:
        """Take a :meth:`state_dict` over.

        Args:
            state: also one of an older version, where ``averaged`` is one boolean for all pairs, and ``missed`` is
                not there: the steps without a gradient are then counted from 0.
            may_come: names of pairs that the model has and does not train yet; theirs waits for :meth:`follow`.
            may_be_new: whether pairs that the state does not know keep what they have.

        Raises:
            ValueError: the state is of other pairs; the message says which are missing, new or of another shape.
        """
        saved, own = state["E"], {pair.name: (pair, E, a) for group in self._groups for pair, E, a in group.rows()}
        problems = [f"{name} is not in the checkpoint" for name in own if name not in saved and not may_be_new]
        problems += [
            f"{name} is in the checkpoint but not in the model"
            for name in saved
            if name not in own and name not in may_come
        ]
        problems += [
            f"{name} has shape {tuple(E.shape)}, in the checkpoint {tuple(saved[name].shape)}"
            for name, (_, E, _) in own.items()
            if name in saved and saved[name].shape != E.shape
        ]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise ValueError("the checkpoint's perturbation is of other pairs: " + "; ".join(problems[:3]) + more)
        averaged = state["averaged"]
        if not isinstance(averaged, dict):
            averaged = dict.fromkeys(saved, bool(averaged))
        missed = state.get("missed", {})
        known = {name: own[name] for name in own if name in saved}
        for name, (_, E, own_averaged) in known.items():
            E.copy_(saved[name])
            own_averaged.fill_(averaged[name])
        self.started |= bool(state["started"])
        self._expected = {
            name: _Saved(saved[name], averaged[name], missed.get(name, 0)) for name in saved if name not in own
        }
        self._missed = {id(pair.B): missed[name] for name, (pair, _, _) in own.items() if name in missed}
        self._forgotten = {id(pair.B) for name, (pair, _, _) in own.items() if not averaged.get(name, False)}

    def _finite(self, norms: list[Tensor], also_finite: Iterable[nn.Parameter]) -> Tensor:
        """Whether all gradients of the pairs and of ``also_finite`` are finite, shape ().

        The norms tell for the pairs: every entry of a gradient enters them, but of A's where it is only projected.
        """
        unseen = [pair.A for group in self._groups if group.projected for pair in group.pairs]
        rest = self.all_finite([*unseen, *also_finite])
        total = torch.stack([norm.sum().to(self._device, torch.float32) for norm in norms]).sum()
        return rest & torch.isfinite(total)


class _Saved(NamedTuple):
    """What a checkpoint holds of a pair that the model does not train yet."""

    E: Tensor
    averaged: bool
    missed: int


class _Group:
    """Pairs of one shape, dtype and device, whose algebra is one batched call.

    Attributes:
        E: their perturbations, shape (L, n, r).
        averaged: whether the average of each has begun, booleans, shape (L,).
        here: whose B had a gradient in the last ascent, booleans, shape (L,); None where all had. Where a scaling is 0,
            no gradient of B says anything.
    """

    def __init__(self, pairs: list[LoRAPair], estimator: Estimator, layout: Layout) -> None:
        B = pairs[0].B
        self.pairs = pairs
        self._layout = layout
        self.projected = estimator == "projected" or not pairs[0].learns_A
        self.dtype = torch.promote_types(B.dtype, torch.float32)
        self.scaling = torch.tensor([pair.scaling for pair in pairs], dtype=self.dtype, device=B.device)
        self.E = torch.zeros(len(pairs), *matrix_shape(layout.shape(B)), dtype=self.dtype, device=B.device)
        self.averaged = torch.zeros(len(pairs), dtype=torch.bool, device=B.device)
        self.here: Tensor | None = None
        self._rows_here = [True] * len(pairs)

    def __iter__(self) -> Iterator[tuple[LoRAPair, Tensor]]:
        return iter(zip(self.pairs, self.E, strict=True))

    def rows(self) -> Iterator[tuple[LoRAPair, Tensor, Tensor]]:
        """Each pair, its E, and whether its average has begun."""
        return iter(zip(self.pairs, self.E, self.averaged, strict=True))

    @property
    def pairs_here(self) -> list[LoRAPair]:
        """The pairs whose B had a gradient in the last ascent."""
        return [pair for pair, has in zip(self.pairs, self._rows_here, strict=True) if has]

    def _look_who_is_here(self) -> None:
        """Note whose B has a gradient; the mask is filled on the device, where it has changed: nothing is copied."""
        have = self._layout.have_gradients([pair.B for pair in self.pairs])
        rows = [has and not pair.is_off for pair, has in zip(self.pairs, have, strict=True)]
        if rows != self._rows_here:
            self._rows_here = rows
            mask = torch.ones_like(self.averaged)
            for row, has in zip(mask, rows, strict=True):
                if not has:
                    row.zero_()
            self.here = None if all(rows) else mask

    def ascent(self, at_perturbed: bool) -> Ascent:
        """The batched ascent of the group's layers, from the gradients they hold."""
        self._look_who_is_here()
        A = self._stack([pair.A for pair in self.pairs])
        grad_B = self._stack([pair.B for pair in self.pairs], gradients=True)
        if self.here is not None:  # a window in which a scaling became 0 still has a gradient from before
            grad_B.masked_fill_(~self.here[:, None, None], 0.0)
        if self.projected:
            return ascent_projected(A, grad_B, self.scaling)
        B = self._stack([pair.B for pair in self.pairs])
        if at_perturbed:
            B = B.add_(self.E).to(self.pairs[0].B.dtype).to(self.dtype)  # rounded as the layer reads it
        grad_A = self._stack([pair.A for pair in self.pairs], gradients=True)
        if self.here is not None:  # a trained A beside a frozen B would enter the norm of what B can't have
            grad_A.masked_fill_(~self.here[:, None, None], 0.0)
        return ascent_average(A, B, grad_A, grad_B, self.scaling)

    def _stack(self, parameters: list[nn.Parameter], gradients: bool = False) -> Tensor:
        """Factors or their gradients as (L, rows, columns), in the wide dtype."""
        return self._layout.stack(parameters, gradients=gradients).to(self.dtype)


def _alike(pairs: Iterable[LoRAPair], layout: Layout) -> list[list[LoRAPair]]:
    """Pairs that stack: same shapes, dtypes, device and trained factors; large groups in several parts."""
    groups: dict[Any, list[LoRAPair]] = defaultdict(list)
    for pair in pairs:
        A, B = pair.A, pair.B
        key = (layout.shape(A), layout.shape(B), A.dtype, B.dtype, B.device, pair.learns_A)
        groups[key].append(pair)
    parts = []
    for (A_shape, B_shape, *_), group in groups.items():
        largest = _LARGEST_STACK if group[0].B.device.type == "cpu" else 4 * _LARGEST_STACK
        size = max(1, largest // max(A_shape.numel(), B_shape.numel()))
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return parts
