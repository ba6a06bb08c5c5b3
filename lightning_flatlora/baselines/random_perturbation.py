"""Flat-LoRA's random perturbation: Gaussian noise on the whole weight, anew for each step."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_flatlora.callbacks.one_pass import OnePass
from lightning_flatlora.pairs import NoPairsError, PairSearch
from lightning_flatlora.schedules import RhoSchedule
from lightning_flatlora.weight_noise import WeightNoise, derived_seed, is_seed


class RandomPerturbation(OnePass):
    r"""Take each step's gradient where every adapted weight carries fresh Gaussian noise (Flat-LoRA), in one pass.

    .. math:: \text{gradient at } W' + \varepsilon, \qquad
        \varepsilon_{ij} \sim \mathcal N\!\left(0,\; \frac{\sigma^2}{m}\,\lVert W'_{i,:}\rVert^2\right)

    The noise is a function of (seed, optimizer step, layer): all micro-batches of an accumulation window and all ranks
    share it, and a resumed run draws what the uninterrupted one would have. It is on from the start of training_step to
    the end of its backward (the loss that is logged has it), off in validation and in all other hooks, and no stored
    weight ever changes, so nothing drifts; see :class:`~lightning_flatlora.weight_noise.WeightNoise`. The global random
    state is not touched. Noise lies on Linear layers alone; others are named once and train without.

    Args:
        sigma: size of the noise relative to the weights' rows, no unit, >= 0; or a schedule over optimizer steps: the
            paper raises it, ``CosineRho(0, sigma)``, to 0.05 on language and 0.15 on CLIP.
        seed: of all noise, >= 0.
        adapter_name: the peft adapter that enters W'; None takes the active ones.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work, as
            FSDP (at the start of fit, before the first step).

    Source: Li et al., arXiv 2409.14396, Eq. 7 and Algorithm 1.

    Example:
        >>> import lightning as L
        >>> from lightning_flatlora import CosineRho
        >>> trainer = L.Trainer(callbacks=[RandomPerturbation(CosineRho(0, 0.05))], accelerator="cpu", logger=False)
    """

    size_name = "sigma"
    works_sharded = False

    def __init__(self, sigma: float | RhoSchedule, seed: int = 0, *, adapter_name: str | None = None) -> None:
        problems = [] if is_seed(seed) else [f"seed must be an integer >= 0, got {seed!r}"]
        super().__init__(sigma, adapter_name=adapter_name, more_problems=problems)
        self.seed = seed

    @override
    def begin(self) -> None:
        super().begin()
        self.noise: WeightNoise | None = None
        self._is_found = False

    @override
    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed}

    @override
    def find(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        if problems := super().find(trainer, pl_module):
            return problems
        try:
            self.install(trainer, pl_module)
        except (NoPairsError, ValueError) as error:
            return [str(error)]
        self._is_found = True
        return []

    @override
    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put noise on the layers of the pairs that are trained now; none where none is."""
        if self._is_found:  # the start has just made it, and W0's norms take a pass over the whole base
            self._is_found = False
            return
        self.off()
        self.noise = None
        if any(pair.B.requires_grad for pair in self.main.pairs):
            self.noise = WeightNoise(pl_module, self.adapter_name)
            self.search = PairSearch(self.search.pairs, self.noise.left_out)

    @override
    def perturbs(self, trainer: Trainer) -> bool:
        return self.noise is not None and self.current_rho(trainer) > 0

    @override
    def on(self, trainer: Trainer) -> None:
        assert self.noise is not None
        self.noise.on(self.current_rho(trainer), derived_seed(self.seed, self.step))

    @override
    def off(self) -> None:
        if self.noise is not None:
            self.noise.off()

    @override
    def uninstall(self) -> None:
        self.off()
        super().uninstall()
