"""Bi-LoRA: SAM's perturbation of the full weight as a second low-rank pair, which climbs while LoRA's pair descends."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_flatlora.baselines.auxiliary_pairs import AuxiliaryPairs
from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.methods.checks import integer_problems
from lightning_flatlora.methods.step_method import StepMethod
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair
from lightning_flatlora.schedules import RhoSchedule, is_size
from lightning_flatlora.weight_noise import adapted_linears


class BiLoRA(MethodCallback):
    r"""Take each step's gradient where an auxiliary pair perturbs every adapted weight (Bi-LoRA), in one pass.

    .. math:: \text{gradient at } W_0 + s B A + B_2 A_2, \qquad
        \max_{A_2, B_2} L \text{ subject to } \lVert B_2 A_2 \rVert_F \le \rho \text{ over all layers}

    The pass that gives the gradients of A and B also gives those of A2 and B2. Where the step's gradients are complete,
    the auxiliary pairs take a step up, and are scaled back to the ball if they have left it:

    .. math:: (A_2, B_2) \leftarrow \sqrt c\, \left((A_2, B_2) + \eta\, \lVert (A_2, B_2) \rVert_F\,
        \frac{(G_{A_2}, G_{B_2})}{\lVert (G_{A_2}, G_{B_2}) \rVert_F}\right), \qquad
        c = \min\!\left(1, \frac{\rho}{\lVert B_2 A_2 \rVert_F}\right)

    The paper's abstract and summaries of it give the second pair on the full weight, its ascent in the pass of the
    descent, the ball, and that only the first pair is kept. The full text was not at hand, and the following is a
    choice of this package: one ball and one gradient norm over all layers; a step relative to the norm of the factors,
    which needs no learning rate and does not depend on the scale of the loss; the same factor :math:`\sqrt c` for A2
    and B2; the rank; A2 drawn as LoRA's A and B2 = 0, so that the first step is plain LoRA's.

    The auxiliary pairs are in no module, optimizer or state dict: this callback holds them, in float32 or wider, and
    saves them with its state. They are on from the start of training_step to the end of its backward (so the logged
    loss includes them), and off in validation and in all other hooks. An accumulation window is one ascent from the sum
    of its gradients. Where a gradient is not finite, the pairs stay as they are. Clipping comes afterwards and does not
    concern them. Under DDP their gradients are averaged over the ranks. The global random state is not touched. Only
    Linear layers get a pair; others are named once and train without it.

    Args:
        rho: radius of the ball around the full weights, in the weights' units, >= 0; or a schedule over optimizer
            steps. With 0 the run is LoRA's, bit for bit.
        step_size: :math:`\eta`, the length of an ascent step relative to the norm of all A2 and B2, without a unit,
            > 0.
        rank: of the auxiliary pairs, >= 1; None takes that of the layer's adapters, their sum where it has several.
        seed: of all A2, >= 0.
        adapter_name: the peft adapter beside which the pairs are put; None takes the active ones.
        finder: says what the pairs are where the layers are not peft's, see :mod:`lightning_flatlora.finders`; of those
            there, ``litgpt_pairs`` and a ``PairsByName`` with ``base`` know the weight that is perturbed.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work,
            such as FSDP (at the start of fit, before the first step).

    Source: Liu et al., arXiv 2508.19564 (ICLR 2026), the abstract.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[BiLoRA(rho=0.5)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        step_size: float = 0.1,
        rank: int | None = None,
        seed: int = 0,
        adapter_name: str | None = None,
        finder: Finder | None = None,
    ) -> None:
        super().__init__(BiLoRAStep(rho, step_size, rank, seed, adapter_name=adapter_name, finder=finder))


class BiLoRAStep(StepMethod):
    """The step of :class:`BiLoRA`.

    Attributes:
        auxiliary: the pairs that climb.
    """

    title = "BiLoRA"
    works_sharded = False

    def __init__(
        self,
        rho: float | RhoSchedule,
        step_size: float,
        rank: int | None,
        seed: int,
        *,
        adapter_name: str | None,
        finder: Finder | None,
    ) -> None:
        self.step_size = step_size
        self.rank = rank
        self.seed = seed
        super().__init__(rho, adapter_name=adapter_name, finder=finder)

    @override
    def argument_problems(self) -> list[str]:
        problems = []
        if not is_size(self.step_size) or self.step_size == 0:
            problems.append(f"step_size must be a finite number > 0, got {self.step_size!r}")
        if self.rank is not None:
            problems += integer_problems("rank", self.rank, least=1)
        return problems + integer_problems("seed", self.seed, least=0)

    @override
    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "seed": self.seed}

    @override
    def reset(self) -> None:
        super().reset()
        self.auxiliary = AuxiliaryPairs(self.rank, self.seed)
        self._left_out: list[str] | None = None

    @override
    def follow(self, pairs: list[LoRAPair], module: nn.Module, wrapped: nn.Module) -> None:
        super().follow(pairs, module, wrapped)
        # None if no pair is trained now.
        if not any(pair.B.requires_grad for pair in pairs):
            self.auxiliary.follow([])
            return
        linears, self._left_out = adapted_linears(module, self.adapter_name, self.finder)
        self.auxiliary.follow(linears)

    @property
    @override
    def left_out(self) -> list[str] | None:
        return self._left_out

    @property
    @override
    def perturbs(self) -> bool:
        return len(self.auxiliary) > 0 and self.current_rho > 0

    @override
    def on(self) -> None:
        self.auxiliary.on()

    @override
    def off(self) -> None:
        self.auxiliary.off()

    @override
    def forget_gradients(self) -> None:
        # A window that did not end in a step has left its gradients.
        self.auxiliary.forget_gradients()

    @override
    def use_gradients(self, also_finite: Iterable[nn.Parameter]) -> None:
        """Move the auxiliary pairs by the gradients of the pass that this step is about to use."""
        if self.perturbs:
            self.auxiliary.ascend(self.current_rho, self.step_size, also_finite)
        self.auxiliary.forget_gradients()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "auxiliary": self.auxiliary.state_dict()}

    @override
    def restore(self, state: dict[str, Any], known: Iterable[str]) -> None:
        self.auxiliary.load_state_dict(state["auxiliary"])
