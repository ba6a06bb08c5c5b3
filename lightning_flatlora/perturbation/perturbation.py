"""The perturbation E of every pair of a model: from gradients, averaged over steps, and read through by the layers."""

import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_flatlora import perturbed_read
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.pairs.lora_pair import LoRAPair, readers_of
from lightning_flatlora.perturbation.pair_stack import FreshPerturbation, PairStack, fresh_perturbation, stackable
from lightning_flatlora.perturbation.pair_state import PairState, other_shape, problems_text, state_problems
from lightning_flatlora.schedules import is_size
from lightning_flatlora.sharding import Sharding


class Perturbation:
    """The perturbations E (n, r) of all pairs, kept in float32 (float64 where B is), and what the layers read.

    E starts at zero. It is set by :meth:`assign` (FMLoRA) or moved by :meth:`average` (EFMLoRA), and enters the forward
    pass between :meth:`on` and :meth:`off`, or inside :meth:`applied`. Only :meth:`state_dict` waits for the device.

    A pair learns while its B is trained. One whose B is frozen reads the clean B and keeps its E until it is trained
    again. One that has no gradient in a step, such as an expert that no sample was routed to, keeps its E as well.

    Attributes:
        pairs: the pairs that are perturbed.
        norm_scope: "global" or "layer".
        is_installed: whether the readers are able to read B + E.
        may_be_nonzero: whether the average may be other than zero, as far as the host knows.

    Args:
        pairs: from :func:`~lightning_flatlora.pairs.find_pairs`.
        estimator: "average" (Eq. 12) or "projected" (G P_A); pairs whose A has no gradient take the latter.
        norm_scope: "global", one ball of radius rho over all pairs, or "layer", one for each.
        sharding: how the ranks share the factors; None where each holds them whole, or as DTensors.

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
        sharding: Sharding | None = None,
    ) -> None:
        _check_choice("estimator", estimator, get_args(Estimator))
        _check_choice("norm_scope", norm_scope, get_args(NormScope))
        self.pairs = pairs
        self.norm_scope: NormScope = norm_scope
        self._estimator: Estimator = estimator
        self._sharding = sharding or Sharding()
        self._stacks = self._stacked(pairs)
        self.is_installed = self.may_be_nonzero = False
        self._switch = perturbed_read.Switch()
        # By name, from a checkpoint: the states of pairs that the model does not train yet.
        self._waiting: dict[str, PairState] = {}

    def _stacked(self, pairs: list[LoRAPair]) -> list[PairStack]:
        if pairs and pairs[0].B.device.type == "cpu":
            # 16 MB, given back untouched. Until a block of some size has been, glibc returns the stacks' memory to the
            # system in each step, and faults every page in again: a quarter of E's time with small layers.
            torch.empty(2**24, dtype=torch.uint8)
        return [PairStack(group, self._estimator, self._sharding) for group in stackable(pairs, self._sharding)]

    def _places(self) -> Iterator[tuple[PairStack, int, LoRAPair]]:
        """Every pair, with its stack and its place in that."""
        for stack in self._stacks:
            for i, pair in enumerate(stack.pairs):
                yield stack, i, pair

    def follow(self, pairs: list[LoRAPair], sharding: Sharding | None = None) -> None:
        """Continue with the pairs that the model has now: those that stay keep their E, new ones start at zero.

        If a pair's scaling s has changed, s E stays what it was, and with it the perturbation of the full weight. The
        layers read the clean B until the next :meth:`on`.

        Args:
            pairs: from another search of the same model.
            sharding: how the ranks share their factors; None where each holds them whole, or as DTensors.
        """
        was_installed = self.is_installed
        self.uninstall()
        # By the identity of B: names change when a module is wrapped.
        before = {pair.key: stack.state(i) for stack, i, pair in self._places()}
        self.pairs, self._sharding = pairs, sharding or Sharding()
        self._stacks = self._stacked(pairs)
        reshaped = []
        for stack, i, pair in self._places():
            if pair.key in before:
                stack.put(i, before[pair.key])
                stack.rescale(i)
                continue
            saved = self._waiting.pop(pair.name, None)
            if saved is not None and saved.E.shape != stack.E[i].shape:
                reshaped.append(other_shape(pair.name, stack.E[i].shape, saved))
            elif saved is not None:
                stack.put(i, saved)
                stack.rescale(i)
        if reshaped:
            text = f"a perturbation starts anew because its shape changed: {problems_text(reshaped)}"
            warnings.warn(text, stacklevel=2)
        if was_installed:
            self.install()

    def install(self) -> None:
        """Make every reader able to read B + E; until :meth:`on` they read B."""
        if not self.is_installed:
            readers = readers_of(self.pairs)
            for reader in readers:
                perturbed_read.install(reader, self._sharding.only_views)
            # Connected from the start, so that compiled layers have one graph for the clean weight. Not if the layers
            # read another perturbation now.
            if all(perturbed_read.shown(reader) is None for reader in readers):
                self._connect_all()
        self.is_installed = True

    def uninstall(self) -> None:
        """Give every reader its own class back; E stays, for :meth:`state_dict`."""
        if self.is_installed:
            self.off()
            # Readers that somebody else keeps installed still listen to the old switch, which is off.
            self._switch = perturbed_read.Switch()
            for reader in readers_of(self.pairs):
                perturbed_read.uninstall(reader)
        self.is_installed = False

    def on(self) -> None:
        """Let the layers read B + E, with the kept E, whose updates they follow."""
        if not self._switch.is_connected:
            self._connect_all()
        self._switch.is_on = True

    def off(self) -> None:
        """Let the layers read the clean B."""
        self._switch.is_on = False

    @property
    def is_on(self) -> bool:
        """Whether the layers read B + E now."""
        return self._switch.is_on

    @contextmanager
    def applied(self, perturbations: list[Tensor] | None = None) -> Iterator[None]:
        """The layers read B + E inside; after it, whatever happens, they read what they read before.

        Args:
            perturbations: E to read, the ``stacks`` of a :class:`FreshPerturbation`; None reads the kept one, and
                follows its updates.
        """
        if perturbations is None:
            perturbations = [stack.E for stack in self._stacks]
        with perturbed_read.restored(readers_of(self.pairs)):
            self._connect(perturbations, perturbed_read.Switch(is_on=True))
            yield

    def _connect_all(self) -> None:
        """Let every reader listen to the own switch."""
        self._connect([stack.E for stack in self._stacks], self._switch)
        self._switch.is_connected = True

    def _connect(self, perturbations: list[Tensor], switch: perturbed_read.Switch) -> None:
        """Give every reader its slice of the stacked perturbations, to add while a switch is on."""
        for stack, stacked_E in zip(self._stacks, perturbations, strict=True):
            for pair, E in zip(stack.pairs, stacked_E.unbind(), strict=True):
                # Shaped as B is, which of a convolution has a kernel's dimensions.
                view = E.view(len(E), *self._sharding.shape(pair.B)[1:])
                for reader in pair.readers:
                    perturbed_read.perturb(reader, view, switch)

    def ascend(
        self, rho: float | Tensor, *, at_perturbed: bool, also_finite: Iterable[nn.Parameter] = ()
    ) -> FreshPerturbation:
        """E of the gradients that the pairs hold now (Eqs. 10-15); a missing gradient counts as zero.

        Args:
            rho: radius of the ball.
            at_perturbed: whether the gradients were taken at B + E (EFMLoRA, Algorithm 2) or at B (FMLoRA).
            also_finite: parameters whose gradients decide ``finite`` too, such as those that a loss scaler watches.

        Returns:
            E, equal on every rank if the gradients are.

        Raises:
            ValueError: rho is a number that can't be a radius.
        """
        if not isinstance(rho, Tensor) and not is_size(rho):
            raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")
        # A manual training_step runs inside autocast, which would take the products in half precision.
        with torch.no_grad(), torch.autocast(self.pairs[0].B.device.type, enabled=False):
            return self._ascend(rho, at_perturbed, also_finite)

    def _ascend(
        self, rho: float | Tensor, at_perturbed: bool, also_finite: Iterable[nn.Parameter]
    ) -> FreshPerturbation:
        return fresh_perturbation(self._stacks, self.norm_scope, rho, at_perturbed, also_finite, self._sharding)

    def assign(self, fresh: FreshPerturbation) -> None:
        """Set E := fresh (Algorithm 1)."""
        for stack, fresh_E in zip(self._stacks, fresh.stacks, strict=True):
            stack.E.copy_(fresh_E)

    def average(self, fresh: FreshPerturbation, beta: float) -> None:
        """E := (1 - beta) E + beta fresh (Eq. 18); the first one is taken whole, one not finite leaves E as it is.

        Args:
            fresh: from :meth:`ascend`.
            beta: weight of the fresh one, in (0, 1].

        Raises:
            ValueError: beta is out of range.
        """
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1], got {beta!r}")
        for stack, fresh_E in zip(self._stacks, fresh.stacks, strict=True):
            stack.average(fresh_E, fresh.finite, beta)
        self.may_be_nonzero |= not fresh.is_zero

    @property
    def learns(self) -> bool:
        """Whether any pair's B is trained now."""
        return any(pair.B.requires_grad for pair in self.pairs)

    @property
    def has_gradient(self) -> bool:
        """Whether any pair has a gradient at all, known to the host."""
        return self._sharding.has_gradient(pair.B for pair in self.pairs)

    def all_finite(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Whether every gradient is finite on every rank, as a boolean on the device, shape ()."""
        return self._sharding.all_finite(parameters, self.pairs[0].B.device)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as full CPU tensors, keyed by the clean name of each B."""
        saved = dict(self._waiting)
        for stack in self._stacks:
            has_average = stack.has_average.tolist()  # one wait for a stack, not one for each pair
            for i, (pair, has) in enumerate(zip(stack.pairs, has_average, strict=True)):
                E = stack.E[i].detach().cpu().clone()
                saved[pair.name] = stack.state(i)._replace(E=E, has_average=has)
        return {
            "E": {name: each.E for name, each in saved.items()},
            "averaged": {name: each.has_average for name, each in saved.items()},
            "scalings": {name: each.scaling for name, each in saved.items()},
        }

    def load_state_dict(self, state: dict[str, Any], may_come: Collection[str] = ()) -> None:
        """Take a :meth:`state_dict` over.

        Args:
            state: of this or another process.
            may_come: names of pairs that the model has and does not train yet; their state waits for :meth:`follow`.

        Raises:
            ValueError: the state belongs to other pairs; the message says which are missing, new or of another shape.
        """
        saved = {}
        for name, E in state["E"].items():
            saved[name] = PairState(E, state["averaged"][name], state["scalings"][name])
        expected = {pair.name: stack.E[i].shape for stack, i, pair in self._places()}
        problems = state_problems(saved, expected, may_come)
        if problems:
            raise ValueError(f"the checkpoint's perturbation is of other pairs: {problems_text(problems)}")
        self.may_be_nonzero = any(bool(each.E.any()) for each in saved.values())
        for stack, i, pair in self._places():
            if pair.name in saved:
                stack.put(i, saved.pop(pair.name))
        self._waiting = saved


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
