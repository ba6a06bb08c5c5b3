"""EFMLoRA and FMLoRA for a training loop of your own, in Lightning Fabric or plain PyTorch.

The objects of this module drive the same engine as the callbacks of these names, and give the same weights. A loop gets
three lines: one that makes the object, one around forward and backward, and one before the optimizer's step.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.methods.gradients import parameters_of, set_aside
from lightning_flatlora.distributed import average_gradients, is_sharded
from lightning_flatlora.loop_method import LoopMethod
from lightning_flatlora.lora_pair import trained_factors
from lightning_flatlora.methods.replay import Replay
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import RhoSchedule
from lightning_flatlora.wrappers import unwrapped, without_sync

__all__ = ["EFMLoRA", "FMLoRA"]


class EFMLoRA(LoopMethod):
    """One pass a step, at B plus an average of past perturbations (Algorithm 2): LoRA's speed.

    Args:
        model: as the loop calls it, after ``fabric.setup``, DDP, ``fully_shard`` or ``deepspeed.initialize``.
        optimizer: the one that trains all pairs, also as Fabric has wrapped it. Of a DeepSpeed engine its own is taken.
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
        beta: weight of the fresh perturbation in the average, in (0, 1]; 1 keeps only the latest.
        settings: ``total_steps``, the optimizer steps of the run, for a schedule that spreads over it; all others as in
            :class:`lightning_flatlora.EFMLoRA`.

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
        ...     with flat.training_pass():
        ...         model(batch).square().mean().backward()
        ...     flat.before_step()
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
        **settings: Any,
    ) -> None:
        self.beta = beta
        super().__init__(model, optimizer, rho, **settings)

    @contextmanager
    def training_pass(self) -> Iterator[None]:
        """Around forward and backward of one batch or micro-batch: the layers read B + Ê, and afterwards B."""
        self._begin_pass()
        perturbation = self._group.averaged
        if perturbation is None:
            yield
            return
        perturbation.on()
        try:
            yield
        finally:
            perturbation.off()

    @override
    def training_passes(self) -> Iterator[AbstractContextManager[None]]:
        """One :meth:`training_pass`, so that a loop may be written for both methods."""
        yield self.training_pass()

    @override
    def _move_average(self) -> None:
        self._follow_scaling()
        rho = self.current_rho if self.is_refresh_step else None
        # Where any gradient of these is not finite a loss scaler skips the step.
        self._group.average(self._optimizer, rho, self.beta, parameters_of(self._optimizer))


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
        ...     flat.before_step()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> flat.close()
    """

    takes_two_passes = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rho: float | RhoSchedule,
        *,
        sync_ascent: bool = True,
        **settings: Any,
    ) -> None:
        self.sync_ascent = sync_ascent
        super().__init__(model, optimizer, rho, **settings)
        self._second_pass = Replay(unwrapped(model), [self._optimizer], is_sharded(model))
        self._lacks_second_pass = False

    @override
    def before_step(self) -> None:
        if self._lacks_second_pass:
            raise RuntimeError(
                "FMLoRA.before_step came after the first of two passes, which leaves no gradient for the step: run "
                "both, `for each_pass in flat.training_passes():` and in it `with each_pass:`"
            )
        super().before_step()

    @override
    def training_passes(self) -> Iterator[AbstractContextManager[None]]:
        """The ascent and the descent, or one pass where the step does not perturb."""
        self._begin_pass()
        perturbation = self.perturbation
        if perturbation is None or not perturbation.learns or not self.is_refresh_step or self.current_rho == 0:
            yield nullcontext()
            return
        self._has_ascended = False
        yield self._ascent(perturbation)
        if not self._has_ascended:
            raise RuntimeError(
                "the first pass was not entered: write `for each_pass in flat.training_passes():` and in it "
                "`with each_pass:`"
            )
        yield self._descent(perturbation)

    @override
    def _move_average(self) -> None:
        """Nothing: each E is of one batch, and of its first pass."""

    @contextmanager
    def _ascent(self, perturbation: Perturbation) -> Iterator[None]:
        """The first pass: its gradient gives E and is then dropped."""
        self._has_ascended = True
        self._second_pass.first_pass_starts(perturbation.pairs[0].B.device)
        with set_aside(self._second_pass.parameters, [self._optimizer]):
            # In an accumulation window DDP would otherwise take the ascent's gradient for the window's.
            with without_sync(self._model):
                yield
            sharded = is_sharded(self._model)
            if sharded and not perturbation.has_gradient:
                raise RuntimeError(
                    "the first pass left no gradient: under FSDP2 each micro-batch must synchronize, so leave "
                    "no_backward_sync (set_requires_gradient_sync) out, or use EFMLoRA"
                )
            if not sharded and all(parameter.grad is None for parameter in parameters_of(self._optimizer)):
                rank_zero_warn(
                    "the first pass left no gradient, so E is 0: does backward stand inside each pass, and is this "
                    "FMLoRA of the model and the optimizer that the loop trains?"
                )
            if self.sync_ascent and not sharded:
                average_gradients(trained_factors(perturbation.pairs))
            perturbation.assign(perturbation.ascend(self.current_rho, at_perturbed=False))
        self._lacks_second_pass = True

    @contextmanager
    def _descent(self, perturbation: Perturbation) -> Iterator[None]:
        """The second pass: the same random numbers at B + E."""
        self._lacks_second_pass = False
        with self._second_pass.running(), perturbation.applied():
            yield
