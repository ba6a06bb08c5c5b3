"""What is chosen for each method of the comparison on the validation part, and from which values."""

from dataclasses import dataclass

from recipes.comparison.task import Grids
from recipes.studies.plan import Config


@dataclass(frozen=True)
class Tuning:
    """How a method's configuration is found.

    Attributes:
        parameter: its own hyper-parameter, the one that is chosen.
        grid: the values to choose from: a name in the task's grids, or the configurations themselves.
        start: the method whose learning rate it takes; None for those that have their learning rate chosen.
    """

    parameter: str
    grid: str | tuple[Config, ...]
    start: str | None = "lora"

    def configurations(self, grids: Grids, learning_rate: float | None) -> list[Config]:
        """What is tried for it.

        Args:
            grids: of the task.
            learning_rate: that of the method it starts from; None for those without one.
        """
        inherited: Config = {} if learning_rate is None else {"learning_rate": learning_rate}
        if isinstance(self.grid, str):
            return [{**inherited, self.parameter: value} for value in grids[self.grid]]
        return [{**inherited, **config} for config in self.grid]


_REGULARIZED = (
    {"weight_decay": 0.1, "dropout": 0.1},
    {"weight_decay": 0.1, "dropout": 0.3},
    {"weight_decay": 1.0, "dropout": 0.1},
    {"weight_decay": 1.0, "dropout": 0.3},
)
METHODS: dict[str, Tuning] = {
    "lora": Tuning("learning_rate", "learning_rate", start=None),
    "lora_regularised": Tuning("weight_decay", _REGULARIZED),
    "efmlora": Tuning("rho", "rho"),
    "fmlora": Tuning("rho", "rho"),
    "lora_sam": Tuning("rho", "lora_rho"),
    "flat_lora": Tuning("sigma", "sigma"),
    "nbar": Tuning("alpha", "alpha"),
    "obar": Tuning("alpha", "alpha"),
    "full": Tuning("learning_rate", "full_learning_rate", start=None),
    "full_sam": Tuning("rho", "sam_rho", start="full"),
}
"""By the names of :data:`recipes.shared.methods.METHODS`."""

VARIANTS: dict[str, Tuning] = {
    "efmlora_projected": Tuning("rho", "rho"),
    "fmlora_projected": Tuning("rho", "rho"),
    "efmlora_layer": Tuning("rho", "layer_rho"),
    "efmlora_beta01": Tuning("rho", "rho"),
    "efmlora_every5": Tuning("rho", "rho"),
    "fmlora_every5": Tuning("rho", "rho"),
    "bi_lora": Tuning("rho", "rho"),
}
"""Beyond the paper, and a baseline that the published comparison has not; run only when they are named."""

ALL = METHODS | VARIANTS
