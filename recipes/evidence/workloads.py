"""What is trained in each workload, and the settings that a search may choose from."""

from dataclasses import dataclass
from typing import Any

from recipes.shared.methods import METHODS

Config = dict[str, Any]
Settings = dict[str, Any]

_ALL: Settings = {
    "model": "all-MiniLM-L6-v2",
    "frozen_layers": 4,
    "noise": 0.0,
    "length": 32,
    "batch_size": 16,
    "warmup_share": 0.06,
    "rank": 8,
    "scaling": 2.0,
    "targets": ["query", "value"],
}
_W1: Settings = {**_ALL, "data": "all_subjects", "shots": 16, "steps": 600}
_W2: Settings = {
    **_W1,
    "shots": 64,
    "noise": 0.4,
    "steps": 1000,
    "rank": 16,
    "targets": ["query", "key", "value", "dense"],
    "judged": "best",
}
_TASKS: Settings = {
    **_ALL,
    "tasks": [
        "sentiment",
        "privacy",
        "anatomy_surgery",
        "physiology_biochemistry",
        "pathology_medicine",
        "gynaecology_pediatrics",
    ],
    "shots": 64,
    "steps": 120,
    "validation": 150,
    "test": 400,
}
_W3: Settings = {**_TASKS, "arithmetic_weight": 0.4, "ties_density": 0.5, "ties_weight": 1.0}
WORKLOADS: dict[str, Settings] = {
    "w1": _W1,
    "w1_32_shots": {**_W1, "shots": 32},
    "w1_300_steps": {**_W1, "steps": 300},
    "w1_1000_steps": {**_W1, "steps": 1000},
    "w2": _W2,
    "w2_no_noise": {**_W2, "noise": 0.0},
    "w2_20_noise": {**_W2, "noise": 0.2},
    "w2_60_noise": {**_W2, "noise": 0.6},
    "w2_similar": {**_W2, "noise_to": "most_similar"},
    "w3": _W3,
    "w5": {**_TASKS, "in_turn": True},
    "w6": {**_ALL, "data": "sentiment", "length": 48, "shots": 1024, "steps": 384},
}
"""By name: all that decides a result besides the method, its configuration and the seed.

``frozen_layers`` of the encoder are computed once for each text; ``shots`` are the training examples of a class,
``noise`` is the share of them whose label is replaced, by any other one or by that of the class which ``noise_to``
names, ``length`` the tokens kept of a text, ``scaling`` LoRA's s.
``judged`` is "best" where runs are judged with the weights of the lowest validation loss; without it they are judged at
the end of training. W3 trains an adapter for each of its ``tasks`` in place of one on ``data``; ``validation`` and
``test`` are the most examples of each part, and the last three say how its adapters are merged. W5 trains one adapter
on all of them, ``in_turn``. W6 has enough examples for an adapter to be better than the frozen encoder, and its steps
are three epochs.
"""
WITH_HYPOTHESIS = ("w1", "w2", "w3")
"""All other workloads are secondary."""

SEARCHED_AS = {"w2_no_noise": "w2", "w2_20_noise": "w2", "w2_60_noise": "w2", "w2_similar": "w2"}
"""Workloads that take the settings which another one's searches choose: nobody knows how many labels are wrong, or how.
"""


def has_tasks(settings: Settings) -> bool:
    """Whether a run learns several tasks, and its row holds their means."""
    return "tasks" in settings


def is_in_turn(settings: Settings) -> bool:
    """Whether a run trains one adapter on several tasks, one after the other."""
    return bool(settings.get("in_turn"))


def is_merging(settings: Settings) -> bool:
    """Whether a run trains several adapters and merges them."""
    return has_tasks(settings) and not is_in_turn(settings)


@dataclass(frozen=True)
class Search:
    """What is tried for a method, each with every learning rate.

    Attributes:
        settings: beside the learning rate, in the order of their strength; the first adds nothing to LoRA.
        further: what the search is extended by, one after the other, where the strongest was chosen.
    """

    settings: tuple[Config, ...]
    further: tuple[Config, ...]


def _sizes(name: str, sizes: tuple[float, ...], further: tuple[float, ...]) -> Search:
    return Search(({}, *({name: size} for size in sizes)), tuple({name: size} for size in further))


_RHO = _sizes("rho", (0.5, 2.0, 8.0), (32.0, 128.0, 512.0))
_ALPHA = _sizes("alpha", (0.5, 2.0, 8.0), (32.0, 128.0, 512.0))
SEARCHES: dict[str, Search] = {
    "lora": Search(
        ({}, {"weight_decay": 0.1}, {"dropout": 0.1}, {"dropout": 0.3}),
        ({"dropout": 0.5}, {"dropout": 0.7}, {"dropout": 0.9}),
    ),
    "efmlora": _RHO,
    "fmlora": _RHO,
    "lora_sam": _RHO,
    "flat_lora": _sizes("sigma", (0.05, 0.2, 0.8), (3.2, 12.8, 51.2)),
    "nbar": _ALPHA,
    "obar": _ALPHA,
}
"""By the names of :data:`recipes.shared.methods.METHODS`."""

LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SEARCH_SEEDS = (100, 101, 102)
SEEDS = tuple(range(20))
EARLY_SEEDS = 8
"""After so many seeds a workload may end early."""

BASELINE = "lora"
CANDIDATE = "efmlora"
"""Whose difference to LoRA is the primary hypothesis."""

COMPETITORS: dict[str, Config] = {
    "early_stopping": {"early_stopping": True},
    "label_smoothing": {"label_smoothing": 0.1},
    "rank_2": {"rank": 2},
    "twice_the_steps": {"length_of_training": 2},
}
"""Free competitors: what each changes of LoRA's chosen settings."""


def competitors_of(settings: Settings) -> list[str]:
    """The free competitors of a workload; where all runs are judged at their best, early stopping is LoRA itself."""
    if settings.get("judged") == "best":
        return [name for name in COMPETITORS if name != "early_stopping"]
    return list(COMPETITORS)


PROBE = "linear_probe"
"""A linear classifier on the frozen encoder, beside every result."""

EXPLORED: dict[str, Config] = {
    "efmlora_twice_the_steps": {"length_of_training": 2},
    "efmlora_rho_0": {"rho": 0.0},
    "efmlora_rank_2": {"rank": 2},
    "efmlora_rho_0.1": {"rho": 0.1},
    "fmlora_unsearched": {},
}
"""What each changes of EFMLoRA's chosen settings. No hypothesis rests on these runs, and they come last."""

MORE_DROPOUT = "lora_more_dropout"
"""LoRA's best trial where its grid alone has all dropouts up to 0.9, whether or not an extension has come to them."""
MORE_DROPOUT_RANK_2 = "rank_2_more_dropout"
"""The same trial with rank 2."""

ON_DROPOUT = "efmlora_on_dropout"
"""EFMLoRA with that dropout and that rank, after a search of its own over rates and rho."""
ON_DROPOUT_RHO_0 = "efmlora_on_dropout_rho_0"
"""The best trial of that search whose rho is 0, which is LoRA of rank 2 at a rate that suits it."""
ON_DROPOUT_RATES = (1, 2, 4)  # times the rate of the arm with rank 2
ON_DROPOUT_RHO = (0.0, 0.5, 2.0, 8.0)

CHOSEN_OTHERWISE = {
    "lora_by_accuracy": BASELINE,
    MORE_DROPOUT: BASELINE,
    MORE_DROPOUT_RANK_2: BASELINE,
    ON_DROPOUT: CANDIDATE,
    ON_DROPOUT_RHO_0: CANDIDATE,
    "efmlora_above_0": CANDIDATE,
}
"""Arms for which another trial than the search's own is chosen: the most accurate one, the best of any dropout, the
best beside that dropout, and the best with a rho above 0. No hypothesis rests on these either, and they come last as
well. What trains each, by arm."""

ARMS = (*SEARCHES, *COMPETITORS, PROBE, *EXPLORED, *CHOSEN_OTHERWISE)
TITLES = {name: METHODS[name].title for name in SEARCHES} | {
    "early_stopping": "LoRA, early stopping",
    "label_smoothing": "LoRA, label smoothing 0.1",
    "rank_2": "LoRA, rank 2",
    "twice_the_steps": "LoRA, twice the steps",
    PROBE: "linear probe, frozen encoder",
    "efmlora_twice_the_steps": "EFMLoRA, twice the steps",
    "efmlora_rho_0": "EFMLoRA's choice with rho 0",
    "efmlora_rank_2": "EFMLoRA, rank 2",
    "efmlora_rho_0.1": "EFMLoRA's choice with rho 0.1",
    "fmlora_unsearched": "FMLoRA with EFMLoRA's choice",
    "lora_by_accuracy": "LoRA, chosen by accuracy",
    MORE_DROPOUT: "LoRA, dropout up to 0.9",
    MORE_DROPOUT_RANK_2: "LoRA, rank 2, dropout up to 0.9",
    ON_DROPOUT: "EFMLoRA, rank 2, dropout up to 0.9",
    ON_DROPOUT_RHO_0: "the same search with rho 0",
    "efmlora_above_0": "EFMLoRA, best rho above 0",
}
"""What the report calls each arm."""


def method_of(arm: str) -> str:
    """The name in :data:`recipes.shared.methods.METHODS` of what trains an arm that is no linear probe.

    Example:
        >>> method_of("nbar"), method_of("rank_2"), method_of("efmlora_rho_0"), method_of("fmlora_unsearched")
        ('nbar', 'lora', 'efmlora', 'fmlora')
    """
    if arm in SEARCHES:
        return arm
    if arm in CHOSEN_OTHERWISE:
        return CHOSEN_OTHERWISE[arm]
    if arm == "fmlora_unsearched":
        return "fmlora"
    return CANDIDATE if arm in EXPLORED else BASELINE
