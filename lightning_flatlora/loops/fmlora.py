"""EFMLoRA and FMLoRA through the hooks of an optimizer."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from typing_extensions import override

from lightning_flatlora.loops.loop_method import LoopMethod
from lightning_flatlora.methods.b_perturbation import EFMLoRAStep, FMLoRAStep
from lightning_flatlora.methods.optimizers import has_gradient
from lightning_flatlora.methods.replay import Replay
from lightning_flatlora.rank_zero import rank_zero_warn
from lightning_flatlora.sharding import is_sharded
from lightning_flatlora.wrappers import unwrapped, without_sync


class EFMLoRA(LoopMethod):
    """One pass per step, at B plus an average of past perturbations (Algorithm 2): LoRA's speed, in one line.

    Create it after the model is sharded and before the optimizer's state is loaded, with the optimizer that the loop
    steps. Clip gradients by their norm, which does not change E. Several optimizers need one object each. A new object
    on the same pairs closes the former one. After the loop :meth:`close` leaves no trace on the model. Evaluation,
    generation, saving and merging need no change.

    Args:
        model: the model that the loop calls, also after ``fabric.setup``, DDP or ``fully_shard``.
        optimizer: the one that trains the pairs, plain or wrapped by Fabric or accelerate.
        rho: radius of the ball in full weight space, in the weights' units, >= 0; or a schedule over optimizer steps.
            Required: None is refused.
        total_steps: optimizer steps of the run, for a schedule that spreads over it.
        settings: ``beta``, ``estimator`` and the others of :class:`lightning_flatlora.EFMLoRA`.

    Raises:
        MisconfigurationException: values out of range, or a model or optimizer that can't work.
        NoPairsError: the model trains no LoRA pair.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        >>> flat = EFMLoRA(model, optimizer, rho=0.05)
        >>> for batch in torch.randn(3, 8, 4):
        ...     model(batch).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> flat.step
        3
        >>> flat.close()
    """

    kind = EFMLoRAStep
    method: EFMLoRAStep

    def training_passes(self, also_no_grad: bool = False) -> Iterator[AbstractContextManager[None]]:
        """Yield the one pass of a step, so that one loop works for both methods.

        Inside it, layers read B + Ê even in eval mode, or if they are not called, as by fused kernels.

        Args:
            also_no_grad: let them do so also under ``no_grad``, for a loss whose gradient depends on what runs there,
                such as GradCache.
        """
        self._check_open()
        yield self._pass(also_no_grad) if self.method.perturbs else nullcontext()

    @contextmanager
    def _pass(self, also_no_grad: bool) -> Iterator[None]:
        self.perturbation.note_reads(was_perturbed=False)
        with self.perturbation.applied(only_with_grad=not also_no_grad):
            yield
        self.perturbation.note_reads(was_perturbed=True)  # in whichever way


class FMLoRA(LoopMethod):
    """Two passes over each batch, the second at a fresh perturbation (Algorithm 1).

    The optimizer gets the gradient of the second pass. Both passes draw the same dropout masks, and buffers,
    torchmetrics and one level of the model's own numbers, lists, dicts and sets count each batch once; anything deeper
    changes twice. If a model spans several accelerators (``device_map``), only the first pair's draws the same masks.
    Steps that don't perturb have one pass.

    Arguments and errors are those of :class:`EFMLoRA`, without ``beta``, but with ``sync_ascent`` as in
    :class:`lightning_flatlora.FMLoRA`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        >>> flat = FMLoRA(model, optimizer, rho=0.05)
        >>> for batch in torch.randn(3, 8, 4):
        ...     for each_pass in flat.training_passes():
        ...         with each_pass:
        ...             model(batch).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> flat.close()
    """

    kind = FMLoRAStep
    method: FMLoRAStep
    _passes_begun = 0

    @override
    def look_again(self) -> None:
        super().look_again()
        self._replay = Replay(unwrapped(self._model), [self._optimizer], is_sharded(self._model))

    def training_passes(self, also_no_grad: bool = False) -> Iterator[AbstractContextManager[None]]:
        """Yield the passes over one batch, or over one micro-batch of an accumulation window.

        They are the ascent and the descent, or one pass if the step does not perturb. Run forward and backward inside
        each of them, with the same batch. Put DDP's ``no_sync`` and Fabric's ``no_backward_sync`` inside, and sampling,
        such as a policy's completions, before them.

        Args:
            also_no_grad: as for :class:`EFMLoRA`.
        """
        self._check_open()
        self.method.also_no_grad = also_no_grad
        last: AbstractContextManager[None] = nullcontext()
        if self.method.takes_ascent:
            yield self._ascent()
            if self._replay.at_perturbed_weights is None:
                raise RuntimeError(
                    "the first pass has not run: write `for each_pass in flat.training_passes():` and `with each_pass:`"
                )
            last = self._replay.running()
        self._passes_begun += 1
        yield last

    @override
    def _use_gradients(self) -> None:
        if self._replay.at_perturbed_weights is not None:
            raise RuntimeError(
                "the optimizer was about to step after the first of two passes, which leaves no gradient for the step: "
                "run both, by `for each_pass in flat.training_passes():` and `with each_pass:`"
            )
        if not self._passes_begun:
            raise RuntimeError(
                "the optimizer was about to step without FMLoRA's passes: run forward and backward inside each of "
                "flat.training_passes(). To continue without the method, call flat.close()"
            )
        super()._use_gradients()
        self._passes_begun = 0

    @contextmanager
    def _ascent(self) -> Iterator[None]:
        """Run the first pass, whose gradient gives E and is then dropped."""
        # This forgets a skipped second pass: the batch may be repeated from its first pass.
        self._replay.first_pass_starts(self.method.pairs[0].B.device)
        sharded = is_sharded(self._model)
        with self._replay.ascent(self.method, is_averaged=False):
            # In an accumulation window DDP would otherwise mistake the ascent's gradient for the window's.
            with without_sync(self._model):
                yield
            if sharded and not self.perturbation.has_gradient:
                raise RuntimeError(
                    "the first pass left no gradient: under FSDP2 each micro-batch must synchronize, so leave "
                    "no_backward_sync (set_requires_gradient_sync) out, or use EFMLoRA"
                )
            if not sharded and not has_gradient(self._optimizer):
                rank_zero_warn(
                    "the first pass left no gradient, so E is 0: does backward run inside each pass, and is this "
                    "FMLoRA made with the model and the optimizer that the loop trains?"
                )
