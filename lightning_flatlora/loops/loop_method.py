"""The base of EFMLoRA and FMLoRA for any training loop: a method driven by the hooks of an optimizer."""

import math
import weakref
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_flatlora import wrappers
from lightning_flatlora.loops.deepspeed_engine import before_steps, in_checkpoints
from lightning_flatlora.loops.forward_gate import ForwardGates, ReceivedGradients
from lightning_flatlora.methods import checks, optimizers
from lightning_flatlora.methods.assignment import assign_pairs
from lightning_flatlora.methods.b_perturbation import BPerturbationStep
from lightning_flatlora.methods.checks import refuse
from lightning_flatlora.methods.step_method import TwoPassStep
from lightning_flatlora.pairs import find_pairs
from lightning_flatlora.pairs.lora_pair import LoRAPair, readers_of, trained_factors
from lightning_flatlora.pairs.peft_pairs import merge_problems
from lightning_flatlora.patching import put_on_instance
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.perturbed_read import clean, reading_of
from lightning_flatlora.rank_zero import rank_zero_info, rank_zero_warn
from lightning_flatlora.schedules import RhoSchedule
from lightning_flatlora.sharding import ZeroShards, is_sharded, is_zeros, reshard, world_size
from lightning_flatlora.wrappers import engine_of, is_deepspeeds, unwrapped

STATE_KEY = "lightning_flatlora"
"""The key of the methods' states in an optimizer's state dict."""

_RUNNING: "WeakSet[LoopMethod]" = WeakSet()


class LoopMethod:
    """A method for the pairs of one optimizer, whose hooks announce steps and whose state dict carries its state.

    Attributes:
        kind: class of the step method.
        method: the step method, with its settings and state.
        search: the model's pairs, and the layers that were left out.

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
        inner, outer = optimizers.innermost(optimizer), optimizers.stepped(optimizer)
        refuse(method, _loop_problems(model, optimizer, method, total_steps))
        # The inner one carries the state. A wrapper, such as Lookahead, may change gradients before the inner one
        # steps.
        self._model, self._optimizer = model, inner
        method.optimizer = inner
        self._gates = ForwardGates()
        self._hooks = ExitStack()
        self._received = ReceivedGradients()
        self._steps_within = 0
        # The warning waits until the count is first used, since load_state_dict() may still come. Adagrad has a state
        # from the start, and counts steps in it.
        self._lacks_state = _has_stepped(model, inner)
        method.horizon = math.inf if total_steps is None else total_steps
        method.loss_scaler = torch.amp.GradScaler(enabled=False)  # a loop does not say whether it has one
        self.look_again()
        checks.say_start(method, method.pairs, self.search, self._orphans)
        self._close_others()
        self._install()
        if is_deepspeeds(inner):
            self._hooks.callback(before_steps(inner, self._use_gradients))
            engine = engine_of(model)
            if engine is not None:
                add_state = partial(self._add_state, inner)
                self._hooks.callback(in_checkpoints(engine, add_state, self._take_state))
        else:
            for handle in (
                # Not traced into a compiled step, which would be compiled again for each step count.
                outer.register_step_pre_hook(torch.compiler.disable(self._before_step)),  # type: ignore[no-untyped-call]
                outer.register_step_post_hook(self._after_step),
                inner.register_state_dict_post_hook(self._add_state),
            ):
                self._hooks.callback(handle.remove)
            self._hooks.callback(self._before_loading())
        _RUNNING.add(self)
        # If nobody has closed this object, its layers must not read its last Ê once the optimizer is gone.
        for leave in (self.perturbation.uninstall, self._gates.uninstall, self._received.unwatch):
            weakref.finalize(self, leave).atexit = False

    def _close_others(self) -> None:
        """Close other objects on these B, such as an interrupted notebook cell's; refuse one with this state's name."""
        own = {id(pair.B) for pair in self.method.pairs}
        for other in list(_RUNNING):
            if own & {id(pair.B) for pair in other.method.pairs}:
                rank_zero_info(f"{self.method.title}: closed an earlier {other.method.title} on the same LoRA pairs")
                other.close()
            elif other._optimizer is self._optimizer and other._name == self._name:
                refuse(self.method, [f"the optimizer has another {self._name}: close() that, or make two optimizers"])

    def look_again(self) -> None:
        """Search the model for pairs again, after it or the optimizer has changed; pairs that stay keep their Ê.

        Call it after adapters, scalings, the optimizer's parameters or the model's device have changed.

        Raises:
            NoPairsError: the model has no trained pair.
            MisconfigurationException: the optimizer has none, or an adapter is merged.
        """
        method, module = self.method, unwrapped(self._model)
        # As after an evaluation.
        reshard(module)
        # During a pass the layers show perturbed tensors in place of their parameters.
        with clean(readers_of(method.pairs)):
            search = find_pairs(module, method.adapter_name, finder=method.finder)
        assignment = assign_pairs(search, [self._optimizer], [method.pairs])
        problems = merge_problems(module)
        if not assignment.pairs[0]:
            absent = set(trained_factors(search.pairs)).difference(optimizers.parameters_of(self._optimizer))
            names = [name for name, each in module.named_parameters() if each in absent] + [search.pairs[0].name]
            problems.append(f"trainable LoRA factors, such as {names[0]}, are not in the optimizer: add them to it")
        refuse(method, problems)
        self._gates.uninstall()
        self._received.unwatch()
        self.search = search
        self._orphans = assignment.orphans
        method.take_pairs(assignment.pairs[0], module, self._model)
        if self not in _RUNNING:
            refuse(method, method.pair_problems())
            return
        self._install()
        method.warn(*(f"{each}. Until then the first group's is followed" for each in method.pair_problems()))

    def _install(self) -> None:
        self.method.install()
        self._received.watch(self.method.pairs)
        # For two passes, the loop itself says when the second one runs.
        if not isinstance(self.method, TwoPassStep):
            self._gates.install(self.perturbation)

    def close(self) -> None:
        """Leave no trace on the model's layers and the optimizer, but keep the state. Calling it again does nothing."""
        self._gates.uninstall()
        self._received.unwatch()
        self.method.close()
        self._hooks.close()
        _RUNNING.discard(self)

    def _check_open(self) -> None:
        if self not in _RUNNING:
            title = self.method.title
            raise RuntimeError(f"close() or a newer object has ended this {title}: make a new one for another run")

    @property
    def step(self) -> int:
        """Optimizer steps so far. Those that a ``GradScaler`` skips count only if the optimizer is fused."""
        self._warn_of_late_start()
        return self.method.step

    @property
    def perturbation(self) -> Perturbation:
        """The perturbation of the pairs' B."""
        return self.method.perturbation

    @property
    def current_rho(self) -> float:
        """The value of rho in the coming optimizer step."""
        return self.method.current_rho

    def _warn_of_late_start(self) -> None:
        if self._lacks_state:
            self._lacks_state = False
            rank_zero_warn(
                f"the optimizer has already taken steps without {self.method.title}, whose perturbation and count "
                "start now. To resume a run, make it before the optimizer's state is loaded, or call load_state_dict()"
            )

    # -- the optimizer's step

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Use the gradients of the coming step, once."""
        # This step is inside another: a parent class's, a wrapped optimizer's, or a retry after an error. No hook tells
        # that a step has raised an error, but a new gradient tells that it has ended.
        if self._steps_within > 0 and not self._received.identities:
            self._steps_within += 1
            return
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            refuse(self.method, ["run forward and backward before the optimizer's step, and pass it no closure"])
        if not optimizers.only_makes_state(self._optimizer):
            self._use_gradients()
        self._steps_within = 1

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._steps_within = max(self._steps_within - 1, 0)

    def _use_gradients(self) -> None:
        self._warn_of_late_start()
        self._check_parameters()
        missed = self._missed()
        if missed:
            raise RuntimeError(
                f"{self.method.title}: the gradients of {len(missed)} LoRA factors, such as {missed[0].name}, were "
                "taken without Ê. If their layers are in eval mode, call model.train() before each step, and set only "
                "other layers, such as dropout, to eval mode. If parts of the layers were replaced, call look_again(). "
                "If the layers were not called (fused kernels, layer.forward(x), a torch.compile(layer) from before "
                "this object was made, a penalty), call them, or run forward and backward inside `for each_pass in "
                "flat.training_passes():` and `with each_pass:`. Evaluate under torch.no_grad()"
            )
        self.method.before_step()
        self._received.forget()

    def _missed(self) -> list[LoRAPair]:
        """List the pairs whose B has got a gradient although no layer has read it perturbed."""
        missed: list[LoRAPair] = []
        method: Any = self.method
        takes_two_passes, received = isinstance(method, TwoPassStep), self._received.identities
        # Without an Ê, or in a plain step of FMLoRA, all read the clean weights; and also_no_grad leaves no note.
        if not (method.takes_ascent and not method.also_no_grad if takes_two_passes else method.perturbs):
            return missed
        for pair in self.method.pairs:
            readings = list(filter(None, map(reading_of, pair.readers)))
            if any(reading.was_perturbed for reading in readings):
                continue
            # What torch.autograd.grad returns calls no hook; a gradient of zeros is an idle expert's. With several
            # ranks, among which only backward() averages, it may be another rank's.
            is_alone = not received and world_size() == 1
            gradient = pair.B.grad if is_alone and any(reading.was_clean for reading in readings) else None
            is_given = gradient is not None and bool(gradient.norm())
            if is_given or id(pair.B) in received:
                missed.append(pair)
        # Outside of two passes another loss may run, such as unlearning's second one, and use experts of its own.
        return [] if takes_two_passes and len(missed) < len(received) else missed

    def _check_parameters(self) -> None:
        """Refuse a model whose parameters were replaced, as by ``fully_shard``: Ê belongs to the former ones."""
        # After a forward, FSDP2 shows whole parameters in place of its own.
        if any(pair.current_B is not pair.B and not isinstance(pair.B, DTensor) for pair in self.method.pairs):
            raise RuntimeError(
                f"the model's parameters were replaced after {self.method.title} was made: make it after the model is "
                "sharded, parametrized or pruned, or call look_again()"
            )
        if not isinstance(self.method.sharding, ZeroShards) and any(is_zeros(pair.B) for pair in self.method.pairs):
            raise RuntimeError(
                f"DeepSpeed has taken the model over after {self.method.title} was made: make it afterwards, with the "
                "engine and its optimizer"
            )
        if any("grad_sample" in vars(pair.B) for pair in self.method.pairs):
            raise RuntimeError(f"{self.method.title}: {wrappers.OPACUS}")

    # -- the state

    @property
    def _name(self) -> str:
        adapter_name = self.method.adapter_name
        return self.method.title if adapter_name is None else f"{self.method.title}[{adapter_name}]"

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict.setdefault(STATE_KEY, {})[self._name] = self.state_dict()

    def _before_loading(self) -> Any:
        """Read the method's state out of each state that the optimizer loads; return a function that stops this."""
        # Not through PyTorch's hook, which some optimizers, such as those of bitsandbytes, don't call.
        own = self._optimizer.load_state_dict

        def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._take_state(state_dict)
            return own(state_dict, *args, **kwargs)

        return put_on_instance(self._optimizer, "load_state_dict", load_state_dict)

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        if self not in _RUNNING:  # after the end, another patch on top of this one may still call it
            return
        state = state_dict.get(STATE_KEY, {}).get(self._name)
        # A DeepSpeed checkpoint has no state of this name, but is of a run that has taken steps.
        self._lacks_state = bool(state_dict.get("state", True))
        if state is not None:
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run, as CPU tensors and numbers; only distributed checkpoints lack it."""
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, of this class or of the callback of this name.

        Raises:
            MisconfigurationException: the state belongs to other pairs or settings.
        """
        if isinstance(state, dict) and isinstance(state.get("optimizers"), list):
            problem = f"the state is of {len(state['optimizers'])} optimizers, but a loop's object follows one"
            refuse(self.method, [problem])
        self.method.load_state_dict(state, self.search.names)
        self._lacks_state = False


def _has_stepped(model: Any, optimizer: Any) -> bool:
    """Say whether an optimizer has already taken a step."""
    if is_deepspeeds(optimizer):  # it makes its state by an empty step
        return bool(getattr(engine_of(model), "global_steps", 0))
    return any(bool(state.get("step", 1) != 0) for state in optimizer.state.values())


def _loop_problems(model: object, optimizer: Any, method: Any, total_steps: object) -> list[str]:
    """List why the method can't work in a loop, as far as it is known before the search for pairs."""
    problems = [] if total_steps is None else checks.integer_problems("total_steps", total_steps, 1)
    problems += checks.optimizer_problems([optimizers.innermost(optimizer)])
    by_deepspeed = is_deepspeeds(optimizers.innermost(optimizer))
    if not isinstance(model, nn.Module) or not (by_deepspeed or optimizers.stepped(optimizer)):
        given = f"{type(model).__name__} and {type(optimizer).__name__}"
        return problems or [f"the first two arguments must be a model and its torch.optim.Optimizer, got {given}"]
    takes_two_passes = isinstance(method, TwoPassStep)
    first_pass = [f"{method.title}'s first pass"] if takes_two_passes else []
    problems += wrappers.wrapping_problems(model, first_pass, takes_deepspeed=not takes_two_passes)
    if takes_two_passes and by_deepspeed:
        problems.append(wrappers.ONE_PASS_ONLY)
    if takes_two_passes and not method.sync_ascent and is_sharded(model):
        problems.append("sync_ascent=False needs each rank's own gradient, which FSDP does not keep")
    if method.lacks_horizon and total_steps is None:
        problems.append(f"{method.argument} spreads over the run, whose length is unknown in a loop: set total_steps")
    return problems
