"""The perturbation E of every pair of a model: computed from gradients, averaged over steps, and read by the layers."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_flatlora import perturbed_read
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.pairs.lora_pair import LoRAPair, readers_of
from lightning_flatlora.perturbation import pair_stack
from lightning_flatlora.perturbation.pair_stack import FreshPerturbation, PairStack, PairState
from lightning_flatlora.perturbed_read import AnyRef
from lightning_flatlora.schedules import is_size
from lightning_flatlora.sharding import Sharding


class Perturbation:
    """The perturbations E (n, r) of all pairs, kept in float32 (float64 if B is), and read by the layers.

    E starts at zero. It is set by :meth:`assign` (FMLoRA) or moved by :meth:`average` (EFMLoRA), and acts in the
    forward pass between :meth:`on` and :meth:`off`, or inside :meth:`applied`. Only :meth:`state_dict` waits for the
    device.

    A pair whose B is frozen reads the clean B and keeps its E until it is trained again. A product whose gradient is
    missing or zero in a step also keeps its E, such as an expert's to which no token was routed.

    Attributes:
        may_be_nonzero: whether the average may differ from zero, as far as the host knows.

    Args:
        pairs: from :func:`~lightning_flatlora.pairs.find_pairs`.
        estimator: "average" (Eq. 12) or "projected" (G P_A); pairs whose A has no gradient use the latter.
        norm_scope: "global", one ball of radius rho over all pairs, or "layer", one per pair.
        sharding: how the ranks share the factors; None if each holds them whole, or as FSDP2's DTensors.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora.pairs import find_pairs
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> perturbation = Perturbation(find_pairs(model).pairs)
        >>> perturbation.install()
        >>> model(torch.ones(5, 4)).sum().backward()
        >>> perturbation.assign(perturbation.ascend(rho=0.05, at_perturbed=False))
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
        sharding: Sharding | None = None,
    ) -> None:
        for name, value, kind in (("estimator", estimator, Estimator), ("norm_scope", norm_scope, NormScope)):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be {' or '.join(map(repr, get_args(kind)))}, got {value!r}")
        self.norm_scope: NormScope = norm_scope
        self._estimator: Estimator = estimator
        self.may_be_nonzero = False
        self._switch = perturbed_read.Switch()
        self._is_on = self._is_applied = False
        # The readers' E while the switch is on; None while they are not installed.
        self._shown: list[tuple[AnyRef, Tensor]] | None = None
        # States from a checkpoint, by name, of pairs that the model does not train yet.
        self._waiting: dict[str, PairState] = {}
        self.pairs: list[LoRAPair] = []
        self._stacks: list[PairStack] = []
        self.take_pairs(pairs, sharding)

    def _states(self) -> Iterator[tuple[LoRAPair, PairState]]:
        """Yield every pair with its state."""
        for stack in self._stacks:
            yield from stack.states()

    def take_pairs(self, pairs: list[LoRAPair], sharding: Sharding | None = None) -> None:
        """Continue with the model's current pairs: those that stay keep their E, new ones start at zero.

        If a pair's scaling s has changed, E is rescaled so that s E, and with it the perturbation of the full weight,
        does not change. The layers read the clean B until the next :meth:`on`.

        Args:
            pairs: from another search of the same model.
            sharding: how the ranks share their factors; None if each holds them whole, or as FSDP2's DTensors.

        Raises:
            ValueError: a checkpoint's state that waited for a pair has another shape.
        """
        was_installed = self.is_installed
        self.uninstall()
        # By the identity of B, since names change when a module is wrapped.
        kept = {pair.key: state for pair, state in self._states()}
        states = self._waiting | {pair.name: kept[pair.key] for pair in pairs if pair.key in kept}
        self.pairs, self._sharding = pairs, sharding or Sharding()
        self._stacks = pair_stack.stacked(pairs, self._estimator, self._sharding)
        self._continue_from(states, [])
        for pair, state in self._states():
            if state.scaling != pair.scaling:
                state.E.mul_(float(state.scaling) / pair.scaling)
                state.scaling.fill_(pair.scaling)
        if was_installed:
            self.install()

    def _continue_from(self, states: dict[str, PairState], problems: list[str]) -> None:
        """Give pairs their states; states of absent pairs wait for them.

        Raises:
            ValueError: there are problems, or an E has another shape; then no pair has changed.
        """
        for pair, now in self._states():
            here, there = tuple(now.E.shape), tuple(states.get(pair.name, now).E.shape)
            if here != there:
                problems.append(f"{pair.name} has shape {here}, in the checkpoint {there}")
        if problems:
            # Only the first ones, since a model may have hundreds.
            raise ValueError(f"the checkpoint's perturbation is of other pairs: {'; '.join(problems[:3])}")
        for pair, now in self._states():
            for mine, kept in zip(now, states.pop(pair.name, now), strict=True):
                mine.copy_(kept)
        self._waiting = states

    @property
    def is_installed(self) -> bool:
        """Whether the readers can read B + E."""
        return self._shown is not None

    def install(self) -> None:
        """Enable every reader to read B + E; until :meth:`on` they read B."""
        if not self.is_installed:
            self._show(self._slices([stack.E for stack in self._stacks]))

    def uninstall(self) -> None:
        """Give every reader its own class back; E stays, for :meth:`state_dict`."""
        self.off()
        self._show(None)

    def on(self) -> None:
        """Let the layers read B + E, with the kept E and its later updates, wherever autograd records."""
        if not self.is_installed:  # E would be silently ignored
            raise RuntimeError("the layers can't read B + E: call install() first")
        self._is_on = self._switch.is_on = True
        self._switch.only_with_grad = True

    def off(self) -> None:
        """Let the layers read the clean B, except inside :meth:`applied`."""
        self._is_on, self._switch.is_on = False, self._is_applied

    @property
    def is_on(self) -> bool:
        """Whether the layers read B + E now."""
        return self._switch.is_on

    @contextmanager
    def applied(self, perturbations: list[Tensor] | None = None, *, only_with_grad: bool = False) -> Iterator[None]:
        """Let the layers read B + E inside; afterwards, even after an error, restore the former state.

        Args:
            perturbations: E to read, the ``stacks`` of a :class:`FreshPerturbation`; None reads the kept one.
            only_with_grad: whether what runs under ``no_grad`` reads the clean B, as in a training pass.
        """
        before, was_applied, was_only_with_grad = self._shown, self._is_applied, self._switch.only_with_grad
        inside = self._slices(perturbations or [stack.E for stack in self._stacks])
        try:
            self._show(inside)
            self._is_applied = self._switch.is_on = True
            self._switch.only_with_grad = only_with_grad
            yield
        finally:
            # Unless uninstall() was called inside.
            if self._shown is inside:
                self._show(before)
            self._is_applied, self._switch.is_on = was_applied, was_applied or self._is_on
            self._switch.only_with_grad = was_only_with_grad

    def _slices(self, perturbations: list[Tensor]) -> list[tuple[AnyRef, Tensor]]:
        """Yield every reader with its slice of stacked perturbations."""
        slices: list[tuple[AnyRef, Tensor]] = []
        for stack, stacked_E in zip(self._stacks, perturbations, strict=True):
            for pair, E in zip(stack.pairs, stacked_E.unbind(), strict=True):
                # In B's shape, which for a convolution has a kernel's dimensions.
                view = E.view(len(E), *self._sharding.shape(pair.B)[1:])
                slices += [(reader, self._sharding.as_read(view, pair.B)) for reader in pair.readers]
        return slices

    def _show(self, slices: list[tuple[AnyRef, Tensor]] | None) -> None:
        """Let the readers add these to their parameters while the switch is on; None makes them plain again."""
        self._shown = slices
        for reader, E in slices or ():
            perturbed_read.perturb(reader, E, self._switch, self._sharding.only_views)
        if slices is None:
            for reader in readers_of(self.pairs):
                perturbed_read.release(reader, self._switch)

    def note_reads(self, was_perturbed: bool) -> None:
        """Take all layers to have been read perturbed by the last pass, or not at all, as when a step begins."""
        for reader, _ in self._shown or ():
            reading: Any = perturbed_read.reading_of(reader)
            reading.was_perturbed, reading.was_clean = was_perturbed, False

    def ascend(
        self, rho: float | Tensor, *, at_perturbed: bool, also_finite: Iterable[nn.Parameter] = ()
    ) -> FreshPerturbation:
        """Compute E from the pairs' current gradients (Eqs. 10-15); a missing gradient counts as zero.

        Args:
            rho: radius of the ball.
            at_perturbed: whether the gradients were taken at B + E (EFMLoRA, Algorithm 2) or at B (FMLoRA).
            also_finite: parameters whose gradients also decide ``finite``, such as those that a loss scaler watches.

        Raises:
            ValueError: rho is a number that can't be a radius.
        """
        if not isinstance(rho, Tensor) and not is_size(rho):
            raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")
        # A manual training_step runs inside autocast, which would compute the products in half precision.
        with torch.no_grad(), torch.autocast(self.pairs[0].B.device.type, enabled=False):
            return pair_stack.fresh_perturbation(self._stacks, self.norm_scope, rho, at_perturbed, list(also_finite))

    def assign(self, fresh: FreshPerturbation) -> None:
        """Set E := fresh (Algorithm 1)."""
        for stack, fresh_E in zip(self._stacks, fresh.stacks, strict=True):
            stack.E.copy_(fresh_E)

    def average(self, fresh: FreshPerturbation, beta: float) -> None:
        """Set E to (1 - beta) E + beta fresh (Eq. 18); the first is taken whole, and one that is not finite is ignored.

        Args:
            fresh: from :meth:`ascend`.
            beta: weight of the fresh one, in (0, 1].

        Raises:
            ValueError: beta is out of range.
        """
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1], got {beta!r}")
        for stack, fresh_E, with_gradient in zip(self._stacks, fresh.stacks, fresh.with_gradient, strict=True):
            stack.average(fresh_E, with_gradient, fresh.finite, beta)
        self.may_be_nonzero |= not fresh.is_zero

    @property
    def has_gradient(self) -> bool:
        """Whether any pair has a gradient, known to the host."""
        return any(self._sharding.have_gradients([pair.B for pair in self.pairs]))

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as full CPU tensors, keyed by the clean name of each B."""
        states = self._waiting | {pair.name: state for pair, state in self._states()}
        return {
            "E": {name: state.E.detach().cpu().clone() for name, state in states.items()},
            "averaged": {name: state.has_average.squeeze().tolist() for name, state in states.items()},
            "scalings": {name: float(state.scaling) for name, state in states.items()},
        }

    def load_state_dict(self, state: dict[str, Any], may_come: Collection[str] = ()) -> None:
        """Restore a :meth:`state_dict`.

        Args:
            state: from this or another process.
            may_come: names of pairs that the model has but does not train yet; their state waits for them.

        Raises:
            ValueError: the state belongs to other pairs, and the message says which are missing, new or of another
                shape; or it is not finite.
        """
        saved = {}
        for name, E in state["E"].items():
            scaling = torch.tensor(state["scalings"][name], dtype=torch.float64)
            if not E.isfinite().all():
                raise ValueError(f"the checkpoint is damaged: the perturbation of {name} is not finite")
            saved[name] = PairState(E, torch.as_tensor(state["averaged"][name]), scaling)
        names = [pair.name for pair in self.pairs]
        problems = [f"{name} is not in the checkpoint" for name in names if name not in saved]
        for name in sorted(set(saved).difference(names, may_come)):
            problems.append(f"{name} is in the checkpoint but not in the model")
        self._continue_from(saved, problems)
        self.may_be_nonzero = any(bool(E.any()) for E in state["E"].values())
