"""The method written a second time: dense, in float64, one pair at a time, with weights that are moved and restored.

It follows Algorithms 1 and 2 line by line in plain PyTorch and shares no code with the package. It forms full n x n and
n x m matrices on purpose. The pseudo-inverse of a Gram matrix is the damped one that the project defines.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

DELTA = 1e-6


def pinv_of_gram(K: Tensor) -> Tensor:
    """K⁺ = (K + max(delta tr K, tiny) I)⁻¹ by a general inverse."""
    damping = max(DELTA * float(K.trace()), torch.finfo(K.dtype).tiny)
    return torch.linalg.inv(K + damping * torch.eye(len(K), dtype=K.dtype))


def ascent(A: Tensor, B: Tensor, G_A: Tensor | None, G_B: Tensor, s: float, estimator: str) -> tuple[Tensor, Tensor]:
    """(1/s) G_hat A⁺ and ||G_hat||^2 of one pair; all matrices are two-dimensional.

    A's gradient outside of A's row space counts as far as B^T G_B and G_A A^T agree; without penalties they are equal.
    """
    K_A = pinv_of_gram(A @ A.T)
    # Exact gradients of B lie in A's row space; a damped inverse, unlike a pseudo-inverse, enlarges any other part.
    projector = K_A @ A @ A.T
    G_B = G_B @ projector
    X = G_B @ K_A
    if estimator == "projected" or G_A is None:
        return X / s**2, (X * G_B).sum() / s**2
    K_B = pinv_of_gram(B.T @ B)
    direction = (torch.eye(len(B), dtype=B.dtype) + B @ K_B @ B.T) @ X / (2 * s**2)
    C, C_A = B.T @ G_B, G_A @ A.T @ projector
    agreeing = (C * (K_B @ C @ K_A)).sum()
    differing = ((C - C_A) * (K_B @ (C - C_A) @ K_A)).sum()
    norm = (X * G_B).sum() + 3 * agreeing
    if agreeing > 0:
        beyond_A = (G_A * (K_B @ G_A)).sum() - (C_A * (K_B @ C_A @ K_A)).sum()
        norm = norm + agreeing / (agreeing + differing) * beyond_A
    return direction, norm / (4 * s**2)


def perturbations(ascents: list[tuple[Tensor, Tensor]], rho: float, norm_scope: str) -> list[Tensor]:
    """E of every pair from all ascents: Eqs. 13-15."""
    total = sum(float(norm) for _, norm in ascents)
    E = []
    for direction, norm in ascents:
        squared = total if norm_scope == "global" else float(norm)
        E.append(direction * (rho / squared**0.5) if squared > 0 else torch.zeros_like(direction))
    return E


@dataclass
class Reference:
    """A literal training loop; ``pairs`` are (A, B, s) of ``model``."""

    model: nn.Module
    pairs: list[tuple[nn.Parameter, nn.Parameter, float]]
    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: torch.optim.Optimizer
    rho: Callable[[int], float]
    beta: float | None = None  # None for FMLoRA
    estimator: str = "average"
    norm_scope: str = "global"
    start_step: int = 0
    every_n_steps: int = 1
    accumulate: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    scheduler: Any = None
    step: int = 0
    ema: list[Tensor] | None = None
    losses: list[float] = field(default_factory=list)

    def train(self, batches: list[Any]) -> None:
        """One epoch; a shorter last window is also divided by ``accumulate``, as in Lightning."""
        for start in range(0, len(batches), self.accumulate):
            window = batches[start : start + self.accumulate]
            self.optimizer.zero_grad()
            if self.beta is None:
                self.two_pass_gradients(window)
            else:
                self.one_pass_gradients(window)
            self.clip()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.step += 1

    @property
    def due(self) -> bool:
        return self.step >= self.start_step and (self.step - self.start_step) % self.every_n_steps == 0

    def two_pass_gradients(self, window: list[Any]) -> None:
        for batch in window:
            saved = [None if p.grad is None else p.grad.clone() for p in self.parameters()]
            loss = self.loss(self.model, batch) / self.accumulate
            self.losses.append(float(loss.detach()) * self.accumulate)
            if self.due and self.rho(self.step) > 0:
                self.optimizer.zero_grad()
                loss.backward()
                E = self.fresh()
                for p, grad in zip(self.parameters(), saved, strict=True):
                    p.grad = grad
                self.move(E)
                (self.loss(self.model, batch) / self.accumulate).backward()
                self.move_back()
            else:
                loss.backward()

    def one_pass_gradients(self, window: list[Any]) -> None:
        if self.ema is not None:
            self.move(self.ema)
        for batch in window:
            loss = self.loss(self.model, batch) / self.accumulate
            self.losses.append(float(loss.detach()) * self.accumulate)
            loss.backward()
        fresh = self.fresh() if self.due else None  # uses the perturbed B, which is still in place
        if self.ema is not None:
            self.move_back()
        if fresh is not None and self.ema is None:
            self.ema = fresh
        elif fresh is not None and self.ema is not None and self.beta is not None:
            self.ema = [(1 - self.beta) * old + self.beta * new for old, new in zip(self.ema, fresh, strict=True)]

    def fresh(self) -> list[Tensor]:
        flat = [
            (A.data.flatten(1), B.data.flatten(1), None if A.grad is None else A.grad.flatten(1), B.grad.flatten(1), s)
            for A, B, s in self.pairs
        ]
        return perturbations([ascent(*f, self.estimator) for f in flat], self.rho(self.step), self.norm_scope)

    def move(self, E: list[Tensor]) -> None:
        self.clean = [B.data.clone() for _, B, _ in self.pairs]
        for (_, B, _), e in zip(self.pairs, E, strict=True):
            B.data = B.data + e.view_as(B)

    def move_back(self) -> None:
        for (_, B, _), clean in zip(self.pairs, self.clean, strict=True):
            B.data = clean

    def clip(self) -> None:
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm)
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(self.parameters(), self.clip_value)

    def parameters(self) -> list[nn.Parameter]:
        return list(self._parameters())

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.optimizer.param_groups:
            yield from group["params"]
