"""What a search sets: options of `fit`, and the values to try."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, product

from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.study import create_study
from optuna.trial import create_trial
from scipy.stats.qmc import LatinHypercube

Config = dict[str, str]
"""The value of each setting, as on the command line."""
Space = Mapping[str, Sequence[str]]
"""The values of each setting, in order. Options that change together are one: "model.lora.r/model.lora.lora_alpha"."""

RHO = "rho"
_ATTEMPTS = 100  # to find a configuration that has not been tried

_RATES = ["5e-5", "1e-4", "3e-4", "1e-3", "3e-3"]
_DROPOUTS = ["0", "0.1", "0.5", "0.9"]
_RANK = "model.lora.r/model.lora.lora_alpha"
# alpha follows the rank, so that the scaling s, and with it the size of an update, does not change.
_SPACE: Space = {"model.learning_rate": _RATES, "model.lora.lora_dropout": _DROPOUTS, _RANK: ["2/4", "8/16", "32/64"]}
SPACES: Mapping[str, Space] = {
    "classification": {**_SPACE, "model.head_learning_rate": ["null", "1e-3", "4e-3"]},
    "instruction_tuning": _SPACE,
    "nlg": _SPACE,
    "vqa": _SPACE,
    "clip_fewshot": {**_SPACE, _RANK: ["2/1", "8/2", "32/4"]},  # its scaling is alpha / sqrt(r)
    "clip_contrastive": _SPACE,
}
"""What a recipe's search varies besides rho, unless the user says otherwise."""


def seeds_of(recipe: str) -> list[str]:
    """Return the options of a recipe that seed its data: the order of the batches, and which few examples are taken."""
    if recipe == "clip_contrastive" or recipe not in SPACES:
        return []  # the contrastive recipe's seed also draws the parts, which all runs share
    return ["data.seed", "data.shots_seed"] if recipe == "classification" else ["data.seed"]


def arguments(config: Config) -> list[str]:
    """Return the settings as options of `fit`, without rho.

    Example:
        >>> arguments({"model.lora.r/model.lora.lora_alpha": "2/4", "rho": "0.5"})
        ['--model.lora.r=2', '--model.lora.lora_alpha=4']
    """
    given = []
    for name, value in config.items():
        if name != RHO:
            pairs = zip(name.split("/"), parts(name, value), strict=True)
            given += [f"--{option}={each}" for option, each in pairs]
    return given


def parts(name: str, value: str) -> list[str]:
    """Return the values of options that change together; for a single option its value, whatever is in it."""
    return value.split("/") if "/" in name else [value]


def short(config: Config) -> str:
    """Return the settings in a form for people.

    Example:
        >>> short({"model.learning_rate": "1e-3", "model.lora.r/model.lora.lora_alpha": "2/4", "rho": "0.5"})
        'learning_rate=1e-3, r=2/4, rho=0.5'
    """
    # For options that change together, the first one's name and all values.
    names = [name.partition("/")[0].rpartition(".")[2] for name in config]
    return ", ".join(f"{name}={value}" for name, value in zip(names, config.values(), strict=True))


def suggestions(space: Space, tried: Sequence[tuple[Config, float]], number: int) -> list[Config]:
    """Return configurations that have not been tried, by Optuna's tree-structured Parzen estimator.

    The first ones are spread by a Latin hypercube, so that low and high rates are among them. Except for rho they are
    the same on both sides of a search. Equal arguments give equal suggestions, so that all workers find the same.

    Args:
        space: space to search, with the values of each setting in order.
        tried: configurations that have been tried, and their results; less is better.
        number: number of configurations.
    """
    sampler = TPESampler(seed=len(tried), n_startup_trials=1, multivariate=True, constant_liar=True)
    study = create_study(sampler=sampler)
    places: dict[str, BaseDistribution] = {name: IntDistribution(0, len(space[name]) - 1) for name in space}
    for config, value in tried:
        params = {name: space[name].index(config[name]) for name in space}
        study.add_trial(create_trial(params=params, distributions=places, value=value))
    spread = [] if tried else _spread(space, number)
    asked = (_config(space, study.ask(places).params.values()) for _ in range(_ATTEMPTS))
    every = (dict(zip(space, values, strict=True)) for values in product(*space.values()))
    taken = [config for config, _ in tried]
    for config in chain(spread, asked, every):
        if config not in taken:
            taken.append(config)
        if len(taken) == len(tried) + number:
            break
    return taken[len(tried) :]


def _spread(space: Space, number: int) -> list[Config]:
    """Return configurations in which the values of each setting are spread over its whole range."""
    points = LatinHypercube(len(space), scramble=False, rng=0).random(number)
    sizes = [len(values) for values in space.values()]
    return [_config(space, (point * sizes).astype(int)) for point in points]


def _config(space: Space, places: Iterable[int]) -> Config:
    """Return the configuration at these places among the values of each setting."""
    return {name: space[name][place] for name, place in zip(space, places, strict=True)}


def size(space: Space) -> int:
    """Count all configurations."""
    return math.prod(len(values) for values in space.values())
