"""What is tuned for each method besides its learning rate, and the arguments of a recipe's command line for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Config = dict[str, float]
"""A method's settings, by name."""

LEARNING_RATE = "learning_rate"
BASELINE = "lora"


@dataclass(frozen=True)
class Method:
    """A method, as a recipe's arguments.

    Attributes:
        title: title in the table.
        parameter: the method's own setting, tuned together with the learning rate.
        grid: name of the setting's values in the table's grids.
        arguments: arguments of a recipe's command line, with ``{}`` for the setting.
    """

    title: str
    parameter: str
    grid: str
    arguments: Sequence[str]

    def configurations(self, rates: Sequence[float], grids: Mapping[str, Sequence[float]]) -> list[Config]:
        """Return all pairs of a learning rate and a value of the method's own setting.

        Example:
            >>> METHODS["efmlora"].configurations([1e-3], {"rho": [0.0, 0.1]})
            [{'learning_rate': 0.001, 'rho': 0.0}, {'learning_rate': 0.001, 'rho': 0.1}]
        """
        configurations = []
        for rate in rates:
            configurations += [{LEARNING_RATE: rate, self.parameter: value} for value in grids[self.grid]]
        return configurations

    def options(self, config: Config) -> list[str]:
        """Return the arguments that train with the method and one of its configurations."""
        # Not str.format, because the JSON of a schedule has its own braces.
        own = [argument.replace("{}", repr(config[self.parameter])) for argument in self.arguments]
        return [f"--model.learning_rate={config[LEARNING_RATE]!r}", *own]


def _callback(class_path: str, setting: str, *more: str) -> tuple[str, ...]:
    # An option without a number belongs to the last callback before it.
    return (f"--trainer.callbacks+={class_path}", f"--trainer.callbacks.{setting}", *more)


def _cosine(start: str, end: str) -> str:
    return f'{{"class_path": "lightning_flatlora.CosineRho", "init_args": {{"start": {start}, "end": {end}}}}}'


_BASELINES = "lightning_flatlora.baselines"
_BALANCEDNESS = f"{_BASELINES}.BalancednessRegularization"
METHODS: dict[str, Method] = {
    "lora": Method("LoRA", "lora_dropout", "lora_dropout", ("--model.lora.lora_dropout={}",)),
    "efmlora": Method("EFMLoRA", "rho", "rho", _callback("lightning_flatlora.EFMLoRA", "rho={}")),
    "fmlora": Method("FMLoRA", "rho", "rho", _callback("lightning_flatlora.FMLoRA", "rho={}")),
    "lora_sam": Method("LoRA-SAM", "rho", "lora_rho", _callback(f"{_BASELINES}.LoRASAM", "rho={}")),
    # Flat-LoRA's noise grows from nothing over the run, and BAR's regularization fades out.
    "flat_lora": Method(
        "Flat-LoRA", "sigma", "sigma", _callback(f"{_BASELINES}.RandomPerturbation", f"sigma={_cosine('0.0', '{}')}")
    ),
    "nbar": Method("nBAR", "alpha", "alpha", _callback(_BALANCEDNESS, f"alpha={_cosine('{}', '0.0')}")),
    "obar": Method(
        "oBAR",
        "alpha",
        "alpha",
        _callback(_BALANCEDNESS, f"alpha={_cosine('{}', '0.0')}", "--trainer.callbacks.kind=oBAR"),
    ),
}
DEFAULT = ("lora", "efmlora", "fmlora", "lora_sam")
"""The methods that run if none are named."""


def same_run(method: str, config: Config, grids: Mapping[str, Sequence[float]]) -> tuple[str, Config]:
    """Return the method and configuration that are run: LoRA's if the method's own setting is 0.

    Each method of size 0 equals LoRA bit for bit, so all methods share such a run.

    Args:
        method: name of the method.
        config: one of its configurations.
        grids: grids of the table; the first dropout is that of the recipe, which the other methods keep.

    Example:
        >>> same_run("fmlora", {"learning_rate": 0.001, "rho": 0.0}, {"lora_dropout": [0.1, 0.2]})
        ('lora', {'learning_rate': 0.001, 'lora_dropout': 0.1})
    """
    if method == BASELINE or config[METHODS[method].parameter] != 0:
        return method, config
    return BASELINE, {LEARNING_RATE: config[LEARNING_RATE], METHODS[BASELINE].parameter: grids["lora_dropout"][0]}
