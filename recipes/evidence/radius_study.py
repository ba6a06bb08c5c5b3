"""The runs of the rules for the radius, beside a workload's searches, and what each loses against a searched rho."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from typing_extensions import override

from recipes.evidence.plan import Piece, Plan
from recipes.evidence.radius import DIRECTIONS, RULES
from recipes.evidence.run import Run
from recipes.evidence.search import common_grid, mean_loss
from recipes.evidence.workloads import BASELINE, CANDIDATE, SEARCH_SEEDS, Config
from recipes.shared.tables import Table, settings_text

RATES = (1.0, 2.0, 4.0)
"""Learning rates of every rule, as multiples of the one that LoRA's search has chosen."""


@dataclass(frozen=True)
class Reference:
    """What a workload's own searches have found.

    Attributes:
        base: mean validation loss of LoRA without regularization at its best rate, nats.
        searched: of EFMLoRA with the rate and the rho that its search has chosen.
        rho: that one.
        rate: that learning rate.
        lora_rate: the learning rate that LoRA's search has chosen.
    """

    base: float
    searched: float
    rho: float
    rate: float
    lora_rate: float


class RadiusPlan(Plan):
    """The runs of all rules and directions on a workload whose searches of LoRA and EFMLoRA are finished."""

    def reference(self) -> Reference | None:
        """What the searches have found; None while they are not finished."""
        grid = common_grid(self.chosen)
        lora, efmlora = self.chosen(BASELINE, grid), self.chosen(CANDIDATE, grid)
        if lora is None or efmlora is None:
            return None
        base = min(mean_loss(self.search_rows(BASELINE, {"learning_rate": rate})) for rate in grid.learning_rates)
        searched = mean_loss(self.search_rows(CANDIDATE, efmlora))
        rate, lora_rate = efmlora["learning_rate"], lora["learning_rate"]
        return Reference(base, searched, efmlora.get("rho", 0.0), rate, lora_rate)

    @override
    def pieces(self) -> list[Piece]:
        return [self._piece(arm, configs) for arm, configs in self.configs().items()]

    def configs(self) -> dict[str, list[Config]]:
        """By rule, all values at all learning rates; by direction, those at the rate and rho of EFMLoRA's search."""
        found = self.reference()
        if found is None:
            return {}
        configs: dict[str, list[Config]] = {}
        for arm, rule in RULES.items():
            configs[arm] = list(_at_rates([{rule.name: value} for value in rule.values], found.lora_rate))
        # A direction has no meaning where the search has chosen no perturbation.
        for arm, rule in DIRECTIONS.items() if found.rho else ():
            chosen = {"learning_rate": found.rate, "rho": found.rho}
            configs[arm] = [{**chosen, rule.name: value} for value in rule.values]
        return configs

    def _piece(self, arm: str, configs: Sequence[Config]) -> Piece:
        runs = []
        for config in configs:
            for seed in SEARCH_SEEDS:
                runs.append(Run(self.workload, self.settings, arm, config, seed, "search"))
        return Piece(arm, runs, len(runs), [arm])

    def losses(self) -> dict[tuple[str, str], float]:
        """By rule and value: the mean validation loss at the best of its learning rates, in nats.

        A fixed rho is among them, from EFMLoRA's search. Values whose runs are not finished are left out.
        """
        grid = common_grid(self.chosen)
        configs = {CANDIDATE: [config for config in grid.trials(CANDIDATE) if "rho" in config], **self.configs()}
        by_rate: dict[tuple[str, str], list[float]] = {}
        for arm, of_arm in configs.items():
            for config in of_arm:
                rows = self.search_rows(arm, config)
                loss = mean_loss(rows) if len(rows) == len(SEARCH_SEEDS) else math.nan
                # The rho of a direction is the workload's, so that one line is the same setting everywhere.
                shown = [(name, v) for name, v in config.items() if name not in ("learning_rate", "rho")]
                setting = dict(shown) if arm != CANDIDATE else {"rho": config["rho"]}
                by_rate.setdefault((arm, settings_text(setting)), []).append(loss)
        best = {place: min(losses) for place, losses in by_rate.items()}
        return {place: loss for place, loss in best.items() if not math.isnan(sum(by_rate[place]))}


def radius_table(plans: Sequence[RadiusPlan]) -> Table:
    """Of each rule and value what it loses against the searched rho, in shares of the search's gain.

    The gain is LoRA's validation loss without regularization less EFMLoRA's, each at its best rate: 0 % is as good as
    the searched rho, 100 % as LoRA, and more is worse than LoRA.
    """
    references = {plan.workload: plan.reference() for plan in plans}
    losses = {plan.workload: plan.losses() for plan in plans}
    places: dict[tuple[str, str], None] = {}
    for of_workload in losses.values():
        places.update(dict.fromkeys(of_workload))
    titles = {CANDIDATE: "fixed rho", **{arm: rule.title for arm, rule in {**RULES, **DIRECTIONS}.items()}}
    rows = []
    for arm, setting in places:
        shares = []
        cells = []
        for workload, reference in references.items():
            loss = losses[workload].get((arm, setting))
            share = None if loss is None or reference is None else lost(loss, reference)
            cells.append("" if loss is None else f"{loss:.3f}" + ("" if share is None else f" ({share:.0f} %)"))
            shares += [] if share is None else [share]
        mean = f"{statistics.mean(shares):.0f} %" if len(shares) == len(plans) else ""
        rows.append([titles[arm], setting, *cells, mean])
    notes = ["validation loss in nats at the best rate, and the share of the searched gain that is lost"]
    for workload, found in references.items():
        if found is not None:
            notes.append(f"{workload}: LoRA {found.base:.3f}, searched rho {found.rho:g} {found.searched:.3f}")
    return Table("radius", ("rule", "setting", *references, "mean loss of the gain"), rows, notes)


def lost(loss: float, reference: Reference) -> float | None:
    """Which share of the search's gain a validation loss has lost, in percent; None where there is no gain.

    Example:
        >>> lost(1.9, Reference(base=2.0, searched=1.8, rho=2.0, rate=1e-3, lora_rate=1e-3))
        50.0
    """
    gain = reference.base - reference.searched
    if gain <= 0:
        return None
    return round(100 * (loss - reference.searched) / gain, 6)


def _at_rates(settings: Sequence[Config], rate: float) -> Iterator[Config]:
    for setting in settings:
        for factor in RATES:
            yield {"learning_rate": factor * rate, **setting}
