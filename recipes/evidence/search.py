"""Which trials a method's search has, how the grids grow, and which trial is chosen."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from recipes.evidence.workloads import BASELINE, LEARNING_RATES, SEARCHES, Config
from recipes.shared.ledger import Row

_FACTOR = 2.0  # between neighbouring learning rates
_EXTENSIONS = 6  # at most, at each end of the learning rates
_NOTHING_LEARNED = 0.99  # of the loss of a guess at random


@dataclass(frozen=True)
class Grid:
    """The grid of all methods together: what one of them gets more, all get, so that all have as many trials.

    Attributes:
        lower_rates: learning rates below those that the search began with.
        higher_rates: learning rates above them.
        further: settings beyond the strongest that the search began with.
    """

    lower_rates: int = 0
    higher_rates: int = 0
    further: int = 0

    @property
    def learning_rates(self) -> list[float]:
        """From the lowest to the highest."""
        lower = [LEARNING_RATES[0] / _FACTOR**power for power in range(self.lower_rates, 0, -1)]
        higher = [LEARNING_RATES[-1] * _FACTOR**power for power in range(1, self.higher_rates + 1)]
        return [*lower, *LEARNING_RATES, *higher]

    def settings(self, method: str) -> list[Config]:
        """What a method tries beside the learning rate, from the weakest to the strongest."""
        search = SEARCHES[method]
        return [*search.settings, *search.further[: self.further]]

    def trials(self, method: str, diverges: Callable[[Config], bool] = lambda config: False) -> list[Config]:
        """The configurations of a method, from the weakest setting to the strongest, each with all learning rates.

        Args:
            method: of the searches.
            diverges: whether the runs of a trial are done and training has diverged in them. After a setting with which
                it has at every rate no stronger one is tried.
        """
        found: list[Config] = []
        for setting in self.settings(method):
            of_setting = [{"learning_rate": rate, **setting} for rate in self.learning_rates]
            found += of_setting
            if all(map(diverges, of_setting)):
                break
        return found

    def with_all_settings(self, method: str) -> "Grid":
        """The grid with everything that a method's settings can be extended by."""
        return replace(self, further=len(SEARCHES[method].further))

    def extended(self, method: str, chosen: Config) -> "Grid":
        """The grid with one more value at each end where the chosen trial of a method is."""
        rates, grid = self.learning_rates, self
        if chosen["learning_rate"] == rates[0] and self.lower_rates < _EXTENSIONS:
            grid = replace(grid, lower_rates=self.lower_rates + 1)
        if chosen["learning_rate"] == rates[-1] and self.higher_rates < _EXTENSIONS:
            grid = replace(grid, higher_rates=self.higher_rates + 1)
        setting = {name: value for name, value in chosen.items() if name != "learning_rate"}
        # The weakest adds nothing to LoRA: there is nothing below it.
        if setting == self.settings(method)[-1] and self.further < len(SEARCHES[method].further):
            grid = replace(grid, further=self.further + 1)
        return grid


def arm_of(method: str, config: Config) -> str:
    """The arm whose run a trial is: at size 0 all methods are LoRA, bit for bit, and share its runs."""
    return BASELINE if set(config) == {"learning_rate"} else method


def common_grid(chosen_on: Callable[[str, Grid], Config | None]) -> Grid:
    """The grid as far as the finished searches have extended it.

    Args:
        chosen_on: gives the trial that a method's search on a grid has chosen, None while it is not finished.
    """
    grid = Grid()
    while True:
        wider = grid
        for method in SEARCHES:
            chosen = chosen_on(method, grid)
            if chosen is not None:
                # From this grid and not from the one that others have widened: each end grows by one value at a time.
                own = grid.extended(method, chosen)
                wider = Grid(
                    max(wider.lower_rates, own.lower_rates),
                    max(wider.higher_rates, own.higher_rates),
                    max(wider.further, own.further),
                )
        # Each search on the wider grid chooses anew, and may end at the new end; the number of extensions is limited.
        if wider == grid:
            return grid
        grid = wider


def choose(trials: Sequence[tuple[Config, Sequence[Row]]], by_accuracy: bool = False) -> Config:
    """The trial with the lowest mean validation loss; of equal ones the most accurate, and then the first.

    A run that has failed has an infinite loss.

    Args:
        trials: configurations with the rows of all their seeds.
        by_accuracy: the highest mean accuracy comes first, and the loss decides between equal ones.

    Example:
        >>> low = {"validation_loss": 1.0, "validation_accuracy": 0.5}
        >>> high = {"validation_loss": 2.0, "validation_accuracy": 0.9}
        >>> trials = [({"rho": 1.0}, [high, low]), ({"rho": 2.0}, [low, low])]
        >>> choose(trials), choose(trials, by_accuracy=True)
        ({'rho': 2.0}, {'rho': 1.0})
    """

    def badness(trial: tuple[Config, Sequence[Row]]) -> tuple[float, float]:
        error = -statistics.mean(row["validation_accuracy"] for row in trial[1])
        return (error, mean_loss(trial[1])) if by_accuracy else (mean_loss(trial[1]), error)

    return min(trials, key=badness)[0]


def has_diverged(rows: Sequence[Row]) -> bool:
    """Whether the runs of a trial have learned next to nothing: their mean loss is that of a guess at random, or more.

    Example:
        >>> [has_diverged([{"validation_loss": loss, "chance": 0.5}]) for loss in (0.69, 0.6)]
        [True, False]
    """
    return mean_loss(rows) >= _NOTHING_LEARNED * -math.log(rows[0]["chance"])


def mean_loss(rows: Sequence[Row]) -> float:
    """Mean validation loss in nats, infinite if a run has failed."""
    losses = [row["validation_loss"] for row in rows]
    return math.inf if None in losses else statistics.mean(losses)
