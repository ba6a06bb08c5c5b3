"""What a search tries next."""

import math

from recipes.tune.space import Space, suggestions

SPACE: Space = {"model.lr": ["1e-4", "1e-3", "1e-2"], "model.r/model.alpha": ["2/4", "8/16"]}


def test_suggestions_are_new_and_the_same_again() -> None:
    tried: list[tuple[dict[str, str], float]] = []
    for number in (2, 3, 1):  # of six
        found = suggestions(SPACE, tried, number)
        assert found == suggestions(SPACE, tried, number)
        for config in found:
            assert config not in [before for before, _ in tried]
            tried.append((config, math.inf if number == 2 else float(number)))


def test_both_sides_begin_with_the_same_settings_spread_over_the_space() -> None:
    rates = [f"{number}e-5" for number in range(1, 6)]
    space: Space = {"model.learning_rate": rates, "model.lora.lora_dropout": ["0", "0.9"], "rho": ["0"]}
    without = suggestions(space, [], 4)
    assert {config["model.learning_rate"] for config in without} == {rates[0], rates[1], rates[3], rates[4]}
    assert [config["model.lora.lora_dropout"] for config in without].count("0") == 2
    perturbed = suggestions({**space, "rho": ["1", "2"]}, [], 4)
    assert [{**config, "rho": "0"} for config in perturbed] == without
