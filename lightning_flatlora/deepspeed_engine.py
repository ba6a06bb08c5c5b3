"""What differs under DeepSpeed's engine, in ZeRO stages 1 and 2: where the parameters and gradients are.

The engine replaces the optimizer's parameters by flat pieces of its own, and after backward each rank keeps the
gradients of its own piece alone. Both can be asked for, so that a training loop with DeepSpeed's engine is exact.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.distributed import Layout


def is_engine(model: nn.Module | None) -> bool:
    """Whether a model is as ``deepspeed.initialize`` has wrapped it."""
    return any(f"{kind.__module__}.{kind.__name__}" == _ENGINE for kind in type(model).__mro__)


_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"


def engine_problems(engine: Any, *, takes_two_passes: bool) -> list[str]:
    """Why a perturbation can't be exact under an engine, one line for each reason.

    Args:
        engine: for which :func:`is_engine` is true.
        takes_two_passes: whether the method must drop the gradient of a first pass.
    """
    problems = []
    if type(engine).__name__ == "PipelineEngine":
        problems.append("DeepSpeed's pipeline runs its own loop over micro-batches: use its engine without a pipeline")
    if engine.zero_optimization_stage() > 2:
        problems.append("DeepSpeed's ZeRO-3 splits the parameters, which has not been tested: use stage 1 or 2")
    if engine.zero_offload_optimizer() is not None:
        problems.append("DeepSpeed's optimizer offload has not been tested: leave offload_optimizer out")
    managed = getattr(engine, "managed_gradient_accumulation", None)  # older releases always manage it
    if managed is not None and not managed():
        problems.append(
            "with managed_gradient_accumulation=false gradients are complete only inside engine.step(): leave it out"
        )
    if takes_two_passes:
        problems.append(
            "DeepSpeed adds each backward to gradients of its own, from which the first pass can't be taken away: "
            "use EFMLoRA, which has one pass"
        )
    return problems


def window_is_complete(engine: Any) -> bool:
    """Whether the coming ``engine.step()`` will step the optimizer, and not only count a micro-batch."""
    return bool(engine.is_gradient_accumulation_boundary())


class EngineOptimizer(Optimizer):
    """The engine's optimizer, as one that holds the model's own parameters.

    Attributes:
        optimizer: the one of PyTorch that the engine steps.
    """

    def __init__(self, engine: Any) -> None:  # the base's constructor would want parameters to train
        self._engine = engine
        self.optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)

    @property
    @override
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The engine's groups with their learning rates now, and in them the model's parameters."""
        flat_groups = self._engine.optimizer.param_groups
        # Stages 1 and 2 list the parameters beside the flat pieces; stage 0 has no such pieces.
        own = getattr(self._engine.optimizer, "bit16_groups", None)
        if own is None:
            return list(flat_groups)
        return [{**group, "params": list(params)} for group, params in zip(flat_groups, own, strict=True)]


class EngineLayout(Layout):
    """Factors that each rank holds whole, and gradients that the engine assembles from its ranks' pieces.

    A gradient takes one all-reduce of its size, so every rank must ask for the same ones in the same order.
    """

    @override
    def stack(self, parameters: Sequence[nn.Parameter], *, gradients: bool = False) -> Tensor:
        if not gradients:
            return super().stack(parameters)
        return torch.stack([_full_gradient(parameter).flatten(1) for parameter in parameters])

    @override
    def has_gradient(self, parameters: Iterable[nn.Parameter]) -> bool:
        return any(self.have_gradients(list(parameters)))

    @override
    def have_gradients(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        """All that are trained count: the engine keeps zeros for those that a backward did not reach."""
        return [parameter.requires_grad for parameter in parameters]

    @override
    def all_finite(self, parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
        finite = torch.ones((), dtype=torch.bool, device=device)
        for parameter in dict.fromkeys(parameters):
            if parameter.requires_grad:
                finite &= torch.isfinite(_full_gradient(parameter)).all().to(device)
        return finite


def _full_gradient(parameter: nn.Parameter) -> Tensor:
    """The mean over all ranks and micro-batches, float32; zero for a parameter that the engine does not train."""
    from deepspeed.utils import safe_get_full_grad

    gradient = safe_get_full_grad(parameter)
    return torch.zeros_like(parameter) if gradient is None else gradient
