"""Balancedness-aware regularization: SAM's implicit regularizer on LoRA, made explicit."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.base import FlatLoRACallback, watched_parameters
from lightning_flatlora.callbacks.checks import choice_problems
from lightning_flatlora.distributed import Layout
from lightning_flatlora.schedules import RhoSchedule

Kind = Literal["nBAR", "oBAR"]


class BalancednessRegularization(FlatLoRACallback):
    r"""Scale A against B of every layer before each optimizer step, as SAM does implicitly (BAR), in one pass.

    .. math:: B \leftarrow (1 + \sigma\alpha\eta)\, B, \qquad A \leftarrow (1 - \sigma\alpha\eta)\, A

    with the learning rate :math:`\eta` and, layer by layer,

    .. math:: \sigma_\text{nBAR} = \begin{cases} 1 & \lVert G_B \rVert \ge \lVert G_A \rVert \\ -1 & \text{else}
        \end{cases} \qquad
        \sigma_\text{oBAR} = \begin{cases} -1 & \lVert B \rVert \ge \lVert A \rVert \\ 1 & \text{else} \end{cases}

    oBAR always shrinks the balancedness :math:`|\lVert B \rVert^2 - \lVert A \rVert^2| / 2`, nBAR moves it as SAM's
    flow would. It happens when the step's gradients are complete, of all ranks and unscaled, and before clipping, as
    decoupled weight decay does; each factor takes the learning rate of its own parameter group. A pair whose factors
    have no gradient stays as it is, and so do all pairs in a step that a loss scaler is about to skip. No pass, no
    memory, and the host does not wait.

    Args:
        alpha: strength, relative to the learning rate, no unit, >= 0; or a schedule over optimizer steps: the paper
            lets it decrease, ``LinearRho(alpha, 0)`` or ``CosineRho(alpha, 0)``.
        kind: "nBAR", by the norms of the gradients, or "oBAR", by those of the factors.
        adapter_name: the peft adapter to balance; None takes the active ones.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work, as a
            frozen A or FSDP (at the start of fit, before the first step).

    Source: Li et al., arXiv 2410.14802, Algorithms 2 (nBAR) and 3 (oBAR).

    Example:
        >>> import lightning as L
        >>> from lightning_flatlora import LinearRho
        >>> regularizer = BalancednessRegularization(LinearRho(1.0, 0.0), kind="oBAR")
        >>> trainer = L.Trainer(callbacks=[regularizer], accelerator="cpu", logger=False)
    """

    size_name = "alpha"
    works_sharded = False

    def __init__(self, alpha: float | RhoSchedule, kind: Kind = "nBAR", *, adapter_name: str | None = None) -> None:
        super().__init__(alpha, adapter_name=adapter_name, more_problems=choice_problems("kind", kind, Kind))
        self.kind: Kind = kind

    @override
    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @override
    def find(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        problems = super().find(trainer, pl_module)
        frozen = [pair.name for pair in self.search.pairs if not pair.learns_A]
        if frozen:
            problems.append(
                f"A of {len(frozen)} pairs is frozen, as beside {frozen[0]}, and can't be scaled: train it as well"
            )
        return problems

    @override
    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(pair.B.dtype in (torch.bfloat16, torch.float16) for pair in self.search.pairs):
            rank_zero_warn(
                f"{type(self).__name__}: B is kept in {self.search.pairs[0].B.dtype}, where a factor as near to 1 as "
                "1 + alpha * lr is rounded away. Keep it in float32, as with precision='bf16-mixed'."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.follow(trainer, pl_module)
        if not self.holds_pairs(trainer, optimizer):
            return
        alpha = self.current_rho(trainer)
        if alpha > 0:
            self._rescale(trainer, alpha)
        self.step += 1

    @torch.no_grad()
    def _rescale(self, trainer: Trainer, alpha: float) -> None:
        groups = trainer.optimizers[self.main.index].param_groups
        strength = {id(p): alpha * group["lr"] for group in groups for p in group["params"]}
        learning = [pair for pair in self.search.pairs if not pair.is_off]
        pairs = [pair for pair in learning if pair.A.grad is not None and pair.B.grad is not None]
        signs = self._signs([pair.A for pair in pairs], [pair.B for pair in pairs])
        if watched := watched_parameters(trainer, self.main.index):
            happens = Layout().all_finite(watched, watched[0].device)
            signs = [sign * happens.to(sign.device) for sign in signs]
        for pair, sign in zip(pairs, signs, strict=True):
            pair.B.mul_(1 + strength[id(pair.B)] * sign)
            pair.A.mul_(1 - strength[id(pair.A)] * sign)

    def _signs(self, A: list[nn.Parameter], B: list[nn.Parameter]) -> list[Tensor]:
        """For each pair 1 where B grows and A shrinks, else -1; shape (), on the device."""
        of_gradients = self.kind == "nBAR"
        norms_A, norms_B = (
            [torch.linalg.vector_norm(p.grad if of_gradients else p) for p in factors] for factors in (A, B)
        )
        if_larger = 1.0 if of_gradients else -1.0
        larger = [(b >= a, torch.full_like(b, if_larger)) for a, b in zip(norms_A, norms_B, strict=True)]
        return [torch.where(is_larger, sign, -sign) for is_larger, sign in larger]
