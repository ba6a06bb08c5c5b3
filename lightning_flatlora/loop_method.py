"""The base of EFMLoRA and FMLoRA for any training loop: a method that is driven by the hooks of an optimizer."""

import math
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_flatlora.callbacks.methods_of_fit import assign_pairs
from lightning_flatlora.callbacks.patches import put_on_instance
from lightning_flatlora.forward_gate import ForwardGate
from lightning_flatlora.methods.b_perturbation import BPerturbationStep
from lightning_flatlora.methods.checks import integer_problems, optimizer_problems, refuse, say_start
from lightning_flatlora.pairs import find_pairs, merge_problems
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import RhoSchedule
from lightning_flatlora.sharding import is_sharded, reshard
from lightning_flatlora.wrappers import innermost, parameters_of, unwrapped, wrapping_problems

STATE_KEY = "lightning_flatlora"
"""Under which an optimizer's state dict carries the states of the methods."""

_RUNNING: "WeakSet[LoopMethod]" = WeakSet()


class LoopMethod:
    """A method for the pairs of one optimizer, whose hooks say when a step comes and carry the method's state.

    Attributes:
        kind: of the step method.
        method: the step of the method, with its settings and state.
        search: the pairs of the model, and what was left out.

    The arguments are those of :class:`lightning_flatlora.loops.EFMLoRA`.
    """

    kind: ClassVar[type[BPerturbationStep]]

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rho: float | RhoSchedule | None = None,
        *,
        total_steps: int | None = None,
        **settings: Any,
    ) -> None:
        self.method = method = self.kind(rho, **settings)
        inner = innermost(optimizer)
        refuse(method, _problems(model, optimizer, inner, method, total_steps))
        self._model = model
        self._optimizer = method.optimizer = inner
        self._gate = ForwardGate()
        self._hooks = ExitStack()
        self._is_stepping = False
        method.horizon = math.inf if total_steps is None else total_steps
        # A loop does not say whether it has a scaler, which skips the step within a fused optimizer.
        method.is_skipped_on_overflow = True
        self.look_again()
        say_start(method, method.pairs, self.search.left_out)
        self._close_others()
        self._install()
        for handle in (
            # Not traced with a compiled step, which would be compiled again for each count of steps.
            inner.register_step_pre_hook(torch.compiler.disable(self._before_step)),  # type: ignore[no-untyped-call]
            inner.register_step_post_hook(self._after_step),
            inner.register_state_dict_post_hook(self._add_state),
        ):
            self._hooks.callback(handle.remove)
        self._hooks.callback(self._before_loading())
        _RUNNING.add(self)
        # The layers of an object that nobody has closed must not read its last Ê when the optimizer is gone.
        for installed in (self.perturbation, self._gate):
            weakref.finalize(self, installed.uninstall).atexit = False

    def _close_others(self) -> None:
        """Close objects on the same B, as those of an interrupted notebook cell; refuse one of the same state."""
        own = {id(pair.B) for pair in self.method.pairs}
        for other in list(_RUNNING):
            if own & {id(pair.B) for pair in other.method.pairs}:
                other.close()
            elif other._optimizer is self._optimizer and other._name == self._name:
                refuse(self.method, [f"the optimizer has another {self._name}: close() that, or make two optimizers"])

    def look_again(self) -> None:
        """Search the model for pairs again, after adapters or scalings have changed; those that stay keep their Ê.

        Raises:
            NoPairsError: the model holds no pair that is trained.
            MisconfigurationException: the optimizer holds none, or an adapter is merged.
        """
        method, module = self.method, unwrapped(self._model)
        # As after an evaluation.
        reshard(module)
        search = find_pairs(module, method.adapter_name, finder=method.finder)
        assignment = assign_pairs(search, [self._optimizer])
        problems = merge_problems(module)
        if not assignment.pairs[0]:
            problems.append(
                f"trainable LoRA factors, such as {search.pairs[0].name}, are not in the optimizer: give them to it, "
                "or give the optimizer that holds them"
            )
        refuse(method, problems)
        self._gate.uninstall()
        self.search = search
        method.follow(assignment.pairs[0], module, self._model)
        self._device = method.pairs[0].B.device
        refuse(method, method.pair_problems())
        if self in _RUNNING:
            self._install()

    def _install(self) -> None:
        self.method.install()
        # The loop itself says when the second of two passes runs.
        if not self.method.takes_two_passes:
            self._gate.install(self.perturbation)

    def close(self) -> None:
        """Leave no trace on the model's layers and the optimizer; the state stays. Calling it again does nothing."""
        self._gate.uninstall()
        self.method.close()
        self._hooks.close()
        _RUNNING.discard(self)

    def _check_open(self) -> None:
        if self not in _RUNNING:
            title = self.method.title
            raise RuntimeError(f"close(), or a newer object, has ended this {title}: make a new one for another run")

    @property
    def step(self) -> int:
        """Optimizer steps taken so far; those that a ``GradScaler`` skips are not seen."""
        return self.method.step

    @property
    def perturbation(self) -> Perturbation:
        """The perturbation of the pairs' B."""
        return self.method.perturbation

    @property
    def current_rho(self) -> float:
        """The radius of the coming optimizer step."""
        return self.method.current_rho

    # -- the optimizer's step

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Use the gradients of the coming step; a closure gives them within it."""
        if self._only_makes_state():
            self._is_stepping = True
            return None
        closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._use_gradients()
            return None

        def then_use_gradients() -> Any:
            loss = closure()
            self._use_gradients()
            return loss

        if len(args) > 1:
            return (args[0], then_use_gradients, *args[2:]), kwargs
        return args, {**kwargs, "closure": then_use_gradients}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._is_stepping = False

    def _only_makes_state(self) -> bool:
        """Say whether this is the step with a rate of 0 and zero gradients by which PyTorch prepares loading a state.

        ``torch.distributed.checkpoint`` takes it before it loads, or shows, the state of an optimizer that has none.
        """
        if self._optimizer.state or any(group.get("lr") != 0 for group in self._optimizer.param_groups):
            return False
        # This waits for the device, but few steps come so far: a warm-up has its rate of 0 once.
        gradients = [p.grad for p in parameters_of(self._optimizer) if p.grad is not None]
        return bool(gradients) and not any(bool((gradient != 0).any()) for gradient in gradients)

    def _use_gradients(self) -> None:
        self._check_parameters()
        self.method.before_step()
        # Not before, since PyTorch calls no hook after a step that is refused.
        self._is_stepping = True

    def _check_parameters(self) -> None:
        """Refuse a model whose parameters were replaced since, and follow one that has moved to another device."""
        held = {id(parameter) for parameter in parameters_of(self._optimizer)}
        pairs = self.method.pairs
        replaced = [pair for pair in pairs if pair.current_B is not pair.B and isinstance(pair.current_B, DTensor)]
        if replaced or not any(id(pair.B) in held for pair in pairs):
            raise RuntimeError(
                f"the optimizer holds none of the parameters that {self.method.title} knows: make it after the model "
                "is sharded, or call look_again()"
            )
        if pairs[0].B.device != self._device:
            self.look_again()

    def _refuse_other(self, optimizer: Optimizer) -> None:
        """Refuse a step of another optimizer that holds the pairs: it would train plain LoRA, or read an old Ê.

        Raises:
            RuntimeError: before that step.
        """
        # Some optimizers step another one within.
        if optimizer is self._optimizer or self._is_stepping:
            return
        held = {id(parameter) for parameter in parameters_of(optimizer)}
        if any(id(pair.current_B) in held for pair in self.method.pairs):
            raise RuntimeError(
                f"{type(optimizer).__name__} was about to step LoRA factors of which {self.method.title} knows another "
                f"optimizer: make {self.method.title} with the model and the optimizer as they are trained, after "
                "fully_shard, or close() it to go on without"
            )

    # -- the state

    @property
    def _name(self) -> str:
        adapter_name = self.method.adapter_name
        return self.method.title if adapter_name is None else f"{self.method.title}[{adapter_name}]"

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict.setdefault(STATE_KEY, {})[self._name] = self.state_dict()

    def _before_loading(self) -> Any:
        """Take each state that the optimizer is to load; return a function that ends that."""
        # Not by a hook of PyTorch's, which the optimizers of bitsandbytes, among others, don't call.
        own = self._optimizer.load_state_dict

        def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            # What somebody has put over this method still calls it after the end.
            if self in _RUNNING:
                self._take_state(state_dict)
            return own(state_dict, *args, **kwargs)

        return put_on_instance(self._optimizer, "load_state_dict", load_state_dict)

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        states = state_dict.get(STATE_KEY, {})
        if self._name in states:
            self.load_state_dict(states[self._name])
        elif state_dict["state"]:
            rank_zero_warn(
                f"the optimizer's state has none of {self._name}, as after a run without it or in a distributed "
                "checkpoint: its perturbation and its count of steps start here, unless you call load_state_dict()"
            )

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs, as CPU tensors and numbers; only a distributed checkpoint lacks it."""
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict`, or that of the callback of this name, returned.

        Raises:
            MisconfigurationException: the state belongs to other pairs or settings.
        """
        if "optimizers" in state:
            problem = f"the state is of {len(state['optimizers'])} optimizers, and a loop's object follows one"
            refuse(self.method, [problem])
        self.method.load_state_dict(state, self.search.names)


def _problems(
    model: nn.Module, optimizer: Optimizer, inner: Any, method: BPerturbationStep, total_steps: int | None
) -> list[str]:
    """List what can't work, as far as it is known before the search for pairs."""
    problems = [] if total_steps is None else integer_problems("total_steps", total_steps, 1)
    if not isinstance(model, nn.Module) or "_optimizer_step_pre_hooks" not in getattr(inner, "__dict__", {}):
        given = f"{type(model).__name__} and {type(optimizer).__name__}"
        return [*problems, f"the first two arguments must be a model and its torch.optim.Optimizer, got {given}"]
    problems += wrapping_problems(model, [f"{method.title}'s first pass"] if method.takes_two_passes else [])
    problems += optimizer_problems([inner])
    if not method.sync_ascent and is_sharded(model):
        problems.append("sync_ascent=False needs each rank's own gradient, which FSDP does not keep")
    if method.lacks_horizon and total_steps is None:
        problems.append(f"{method.argument} spreads over the run, whose length a loop does not say: set total_steps")
    return problems


def _refuse_others(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for method in [] if torch.compiler.is_compiling() else list(_RUNNING):
        method._refuse_other(optimizer)


# Not one for each object, which it would keep alive.
register_optimizer_step_pre_hook(_refuse_others)
