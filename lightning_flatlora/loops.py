"""EFMLoRA and FMLoRA for any training loop: plain PyTorch, Fabric, accelerate, transformers' Trainer and others.

EFMLoRA is one line, after the optimizer is made and before its state is loaded::

    flat = EFMLoRA(model, optimizer, rho=0.05)

From then on the LoRA layers read B + Ê inside their own forward, in training mode while autograd records; each step of
the optimizer moves Ê by its gradients, and the optimizer's state dict carries Ê. FMLoRA needs a loop around the pass as
well, see :meth:`FMLoRA.training_passes`. Both use the engine of the callbacks of these names, and give their weights.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.distributed import average_gradients, is_sharded
from lightning_flatlora.forward_gate import ForwardGate
from lightning_flatlora.methods.assignment import assign_pairs
from lightning_flatlora.methods.b_perturbation import BPerturbationStep
from lightning_flatlora.methods.checks import integer_problems, optimizer_problems, refuse
from lightning_flatlora.methods.efmlora import EFMLoRAStep
from lightning_flatlora.methods.fmlora import FMLoRAStep
from lightning_flatlora.methods.gradients import parameters_of, set_aside
from lightning_flatlora.methods.replay import Replay
from lightning_flatlora.pairs import merge_problems, nothing_found, search_pairs
from lightning_flatlora.pairs.lora_pair import NoPairsError, PairSearch
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import RhoSchedule
from lightning_flatlora.wrappers import unwrapped, without_sync, wrapping_problems

__all__ = ["EFMLoRA", "FMLoRA"]

STATE_KEY = "lightning_flatlora"
"""Under which an optimizer's state dict carries the states of the methods."""

_RUNNING: "WeakSet[LoopMethod]" = WeakSet()


class LoopMethod:
    """Base of both classes: a method that is driven by the hooks of an optimizer.

    Attributes:
        method: the step of the method, with its settings and state.
        search: the pairs of the model, and what was left out.

    Args:
        model: as the loop calls it.
        optimizer: that trains the pairs, also as a library has wrapped it.
        method: with its settings.
        total_steps: optimizer steps of the run, for a schedule that spreads over it.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, method: BPerturbationStep, total_steps: int | None = None
    ) -> None:
        problems = [] if total_steps is None else integer_problems("total_steps", total_steps, 1)
        inner = _innermost(optimizer)
        if not isinstance(model, nn.Module) or "_optimizer_step_pre_hooks" not in getattr(inner, "__dict__", {}):
            given = f"{type(model).__name__} and {type(optimizer).__name__}"
            problems.append(f"the first two arguments must be a model and its torch.optim.Optimizer, got {given}")
            refuse(method, problems)
        problems += wrapping_problems(model, takes_two_passes=method.takes_two_passes)
        problems += optimizer_problems([inner])
        if not method.sync_ascent and is_sharded(model):
            problems.append("sync_ascent=False needs each rank's own gradient, which FSDP does not keep")
        if method.lacks_horizon and total_steps is None:
            problems.append(
                f"{method.argument} spreads over the run, whose length a loop does not say: set total_steps"
            )
        refuse(method, problems)
        self.method = method
        self._model = model
        self._optimizer = method.optimizer = inner
        method.horizon = math.inf if total_steps is None else total_steps
        self._handles: list[Any] = []
        self.search = PairSearch([], [])
        self.look_again()
        if self.search.left_out:
            rank_zero_info(f"{method.title} leaves unperturbed: " + "; ".join(self.search.left_out))
        # An object that an interrupted cell of a notebook has left on the same layers has no more say.
        names = {id(pair.B) for pair in method.pairs}
        for other in list(_RUNNING):
            if names & {id(pair.B) for pair in other.method.pairs}:
                other.close()
        self._install()
        self._handles = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_state_dict_post_hook(self._add_state),
            inner.register_load_state_dict_pre_hook(self._take_state),
        ]
        _RUNNING.add(self)

    def look_again(self) -> None:
        """Search the model for pairs again, after adapters or scalings have changed; those that stay keep their Ê.

        Raises:
            NoPairsError: the model holds no pair that is trained.
            MisconfigurationException: the optimizer holds none, or an adapter is merged.
        """
        method, module = self.method, unwrapped(self._model)
        search = search_pairs(module, method.adapter_name, method.finder)
        if not search.pairs:
            raise NoPairsError(nothing_found(module, method.adapter_name, method.finder, search))
        assignment = assign_pairs(search, [self._optimizer])
        problems = merge_problems(module)
        if not assignment.pairs[0]:
            problems.append(
                f"trainable LoRA factors, such as {search.pairs[0].name}, are not in the optimizer: give them to it, "
                "or give the optimizer that holds them"
            )
        refuse(method, problems)
        is_installed = bool(self._handles)
        self._uninstall()
        self.search = search
        method.follow(assignment.pairs[0], module, self._model)
        refuse(method, method.pair_problems())
        if is_installed:
            self._install()

    def _install(self) -> None:
        self.method.install()

    def _uninstall(self) -> None:
        self.method.close()

    def close(self) -> None:
        """Leave no trace on the model's layers and the optimizer; the state stays. Calling it again does nothing."""
        self._uninstall()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _RUNNING.discard(self)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far; those that a ``GradScaler`` skips are not seen."""
        return self.method.step

    @property
    def perturbation(self) -> Perturbation:
        """The perturbation of the pairs' B."""
        assert self.method.perturbation is not None
        return self.method.perturbation

    @property
    def current_rho(self) -> float:
        """The radius of the coming optimizer step."""
        return self.method.current_rho

    # -- the optimizer's hooks

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Use the gradients of the coming step; a closure gives them within it."""
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

    def _use_gradients(self) -> None:
        self._check_parameters()
        # If any gradient of these is not finite, a loss scaler skips the step within a fused optimizer.
        self.method.before_step(parameters_of(self._optimizer))

    def _check_parameters(self) -> None:
        """Refuse a model whose parameters were replaced, as by fully_shard after this object was made."""
        held = {id(parameter) for parameter in parameters_of(self._optimizer)}
        if self.method.pairs and not any(id(pair.B) in held for pair in self.method.pairs):
            raise RuntimeError(
                f"the optimizer holds none of the parameters that {self.method.title} knows: make it after the model "
                "is sharded, or call look_again()"
            )

    @property
    def _name(self) -> str:
        adapter_name = self.method.adapter_name
        return self.method.title if adapter_name is None else f"{self.method.title}[{adapter_name}]"

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict.setdefault(STATE_KEY, {})[self._name] = self.state_dict()

    def _take_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        states = state_dict.get(STATE_KEY, {})
        if self._name in states:
            self.load_state_dict(states[self._name])
        elif state_dict["state"]:
            rank_zero_warn(
                f"the optimizer's state has none of {self._name}, as after a run without it: its perturbation and its "
                "count of steps begin here"
            )

    # -- the state

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs, as CPU tensors and numbers.

        The optimizer's own state dict carries it already, except in a distributed checkpoint, which keeps only what it
        knows of an optimizer.
        """
        return {**self.method.state_dict(), "settings": self.method.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict`, or that of the callback of this name, returned.

        Raises:
            MisconfigurationException: the state belongs to other pairs or settings.
        """
        problems = self.method.settings_problems(state["settings"])
        if "optimizers" in state:
            problems.append(f"the state is of {len(state['optimizers'])} optimizers, and a loop's object follows one")
        refuse(self.method, problems)
        self.method.load_state_dict(state, self.search.names)


class EFMLoRA(LoopMethod):
    """One pass per step, at B plus an average of past perturbations (Algorithm 2): LoRA's speed, by one line.

    Make it after the model is sharded and before the optimizer's state is loaded. Clip gradients by their norm, which
    does not change E. Several optimizers take one object each. After the loop :meth:`close` leaves no trace on the
    model; evaluation, generation, saving and merging need nothing.

    Args:
        model: as the loop calls it, also after ``fabric.setup``, DDP or ``fully_shard``.
        optimizer: the one that trains the pairs, also as Fabric or accelerate has wrapped it.
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        beta: weight of the fresh perturbation in the average, in (0, 1]; 1 keeps only the latest.
        total_steps: optimizer steps of the run, for a schedule that spreads over it.
        settings: all others as in :class:`lightning_flatlora.EFMLoRA`.

    Raises:
        MisconfigurationException: values out of range, or a model or optimizer that can't work.
        NoPairsError: the model trains no LoRA pair.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        >>> flat = EFMLoRA(model, optimizer, rho=0.5)
        >>> for batch in torch.randn(3, 8, 4):
        ...     model(batch).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> flat.step
        3
        >>> flat.close()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rho: float | RhoSchedule,
        *,
        beta: float = 0.9,
        total_steps: int | None = None,
        **settings: Any,
    ) -> None:
        self._gate = ForwardGate()
        super().__init__(model, optimizer, EFMLoRAStep(rho, beta=beta, **settings), total_steps)

    @override
    def _install(self) -> None:
        super()._install()
        self._gate.install(self.perturbation)

    @override
    def _uninstall(self) -> None:
        # First, since its classes lie over those of the perturbation.
        self._gate.uninstall()
        super()._uninstall()

    @override
    def _use_gradients(self) -> None:
        if self.method.perturbs and not self._gate.has_opened and self.perturbation.has_gradient:
            raise RuntimeError(
                "EFMLoRA: the LoRA layers have run in eval mode since the last step, in which they read the clean "
                "weights, so the step would be plain LoRA: call model.train() before it, and switch single layers, "
                "such as dropout, to eval mode by themselves"
            )
        super()._use_gradients()
        self._gate.has_opened = False

    def training_passes(self) -> Iterator[AbstractContextManager[None]]:
        """Give one pass, which does nothing, so that a loop may be written for both methods."""
        yield nullcontext()


class FMLoRA(LoopMethod):
    """Two passes over each batch, the second at a fresh perturbation (Algorithm 1).

    The gradient that is left for the optimizer is that of the second pass. Both passes draw the same dropout masks, and
    buffers count each batch once. What else the code inside a pass changes, it changes twice. Steps that don't perturb
    have one pass.

    The arguments and errors are those of :class:`EFMLoRA`, except for ``beta``; ``sync_ascent`` is as in
    :class:`lightning_flatlora.FMLoRA`.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        >>> flat = FMLoRA(model, optimizer, rho=0.5)
        >>> for batch in torch.randn(3, 8, 4):
        ...     for each_pass in flat.training_passes():
        ...         with each_pass:
        ...             model(batch).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> flat.close()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rho: float | RhoSchedule,
        *,
        total_steps: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, optimizer, FMLoRAStep(rho, **settings), total_steps)
        self._replay = Replay(unwrapped(model), [self._optimizer], is_sharded(model))
        self._passes_begun = 0
        self._lacks_second_pass = False

    def training_passes(self) -> Iterator[AbstractContextManager[None]]:
        """Give the passes over one batch, or over one micro-batch of an accumulation window.

        Run forward and backward inside each of them, with the same batch. Under DDP and Fabric put
        ``no_backward_sync`` and ``no_sync`` inside. They are the ascent and the descent, or one pass if the step does
        not perturb.
        """
        if not self._handles:
            raise RuntimeError("close() has ended this FMLoRA: make a new one for another run")
        self._passes_begun += 1
        if not self.method.ascends:
            yield nullcontext()
            return
        self._has_ascended = False
        yield self._ascent()
        if not self._has_ascended:
            raise RuntimeError(
                "the first pass was not entered: write `for each_pass in flat.training_passes():` and in it "
                "`with each_pass:`"
            )
        yield self._descent()

    @override
    def _use_gradients(self) -> None:
        if not self._passes_begun:
            raise RuntimeError(
                "the optimizer was about to step without FMLoRA's passes: run forward and backward inside of each of "
                "flat.training_passes(). To go on without the method, call flat.close()"
            )
        if self._lacks_second_pass:
            raise RuntimeError(
                "the optimizer was about to step after the first of two passes, which leaves no gradient for the step: "
                "run both, `for each_pass in flat.training_passes():` and in it `with each_pass:`"
            )
        super()._use_gradients()
        self._passes_begun = 0

    @contextmanager
    def _ascent(self) -> Iterator[None]:
        """The first pass: its gradient gives E and is then dropped."""
        self._has_ascended = True
        self._replay.first_pass_starts(self.method.pairs[0].B.device)
        with set_aside(self._replay.parameters, [self._optimizer]):
            # In an accumulation window DDP would otherwise take the ascent's gradient for the window's.
            with without_sync(self._model):
                yield
            sharded = is_sharded(self._model)
            if sharded and not self.perturbation.has_gradient:
                raise RuntimeError(
                    "the first pass left no gradient: under FSDP2 each micro-batch must synchronize, so leave "
                    "no_backward_sync (set_requires_gradient_sync) out, or use EFMLoRA"
                )
            if not sharded and all(parameter.grad is None for parameter in parameters_of(self._optimizer)):
                rank_zero_warn(
                    "the first pass left no gradient, so E is 0: does backward stand inside each pass, and is this "
                    "FMLoRA of the model and the optimizer that the loop trains?"
                )
            if self.method.sync_ascent and not sharded:
                average_gradients(self.method.ascending)
            self._at_perturbed_weights = self.method.ascend()
        self._lacks_second_pass = True

    @contextmanager
    def _descent(self) -> Iterator[None]:
        """The second pass: the same random numbers at B + E."""
        self._lacks_second_pass = False
        with self._replay.running(), self._at_perturbed_weights:
            yield


def _innermost(optimizer: Any) -> Any:
    """The optimizer of PyTorch in what Fabric, accelerate or a method over another one has made of it."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer
