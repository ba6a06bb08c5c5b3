"""The study's figures on P1 and P2, the task that needs an adapter, for figures.py."""

import json
import runpy
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from arms import FRESH, strength_of  # in this folder
from p1_control import CONFIG
from p1_rate import HIGHER, mean_of_search
from scipy import stats

from recipes.studies.rows import Row, read
from recipes.studies.statistics import Estimate, estimate, holm, with_interval
from recipes.tune.answer import chosen
from recipes.tune.search import WITH, WITHOUT

RESULTS = Path(__file__).parent


def p_value(found: Estimate) -> float:
    """Return the two-sided p of a mean difference."""
    return float(2 * stats.t.sf(abs(found.mean / found.error), found.values - 1))


def rank_of(row: Row) -> str:
    """Return the rank of one of P1's adapters."""
    return str(row["config"]["model.lora.r/model.lora.lora_alpha"]).partition("/")[0]


def arm_of(row: Row) -> str:
    """Return "efmlora", or LoRA's rank."""
    return "efmlora" if row["side"] == "with" else rank_of(row)


def means_and_differences(
    arms: Mapping[str, Mapping[int, Mapping[str, float]]],
    measure: str,
    digits: tuple[int, int],
    pairs: tuple[tuple[str, str], ...],
    unit: float = 1,
) -> str:
    """Return cells: the means of LoRA with rank 8, LoRA with rank 32 and EFMLoRA, and differences with intervals."""
    (seeds,) = {tuple(sorted(found)) for found in arms.values()}
    cells = []
    for arm in ("8", "32", "efmlora"):
        cells.append(f"{statistics.mean(unit * arms[arm][seed][measure] for seed in seeds):.{digits[0]}f}")
    for one, other in pairs:
        values = [unit * (arms[one][seed][measure] - arms[other][seed][measure]) for seed in seeds]
        cells.append(with_interval(estimate(values), digits[1]))
    return " | ".join(cells)


def needs_an_adapter() -> list[str]:
    """Return the rows of P1 and P2, and P1's p."""
    arms: dict[str, dict[int, dict[str, float]]] = {"8": {}, "32": {}, "efmlora": {}}
    for file in ("p1", "p1_control", "p2"):
        for row in read(RESULTS / f"{file}.jsonl"):
            if row["stage"] == "final":
                found = arms[arm_of(row)].setdefault(row["seed"], {})
                found |= {"rise": row["rise"]} if file == "p2" else row["tested"]
    p_values = []
    for measure in ("test_loss", "rise"):
        values = [arms["efmlora"][seed][measure] - row[measure] for seed, row in arms["8"].items()]
        p_values.append(p_value(estimate(values)))
    pairs = (("efmlora", "8"), ("efmlora", "32"))
    rows = {
        "test loss, nats per token": means_and_differences(arms, "test_loss", (3, 3), pairs),
        "test accuracy, %": means_and_differences(arms, "test_accuracy", (1, 1), pairs, 100),
        "rise of the loss on other texts": means_and_differences(arms, "rise", (2, 2), pairs),
    }
    title = f"| On {len(arms['8'])} fresh seeds |"
    table = [f"| {name} | {cells} |" for name, cells in rows.items()]
    return [title, *table, f"p {holm(p_values)[0]:.4f} by Holm's method"]


def other_methods() -> list[str]:
    """Return the rows on the other methods in P1's task."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    searches: dict[str, list[Row]] = defaultdict(list)
    without: list[Row] = []
    for row in read(RESULTS / "p1.jsonl") + read(RESULTS / "p1_control.jsonl"):
        if row["stage"] == "final":
            losses[arm_of(row)][row["seed"]] = row["tested"]["test_loss"]
        elif row["side"] == WITHOUT:
            without.append(row)
    for row in read(RESULTS / "arms.jsonl"):
        searches[row["arm"]].append(row)
    names = {"bi_lora": "Bi-LoRA", "lora_sam": "LoRA-SAM", "scaling": "random scaling", "monteclora": "MonteCLoRA"}
    names |= {"fmlora": "FMLoRA", "half_fmlora": "half FMLoRA", "late_fmlora": "late FMLoRA"}
    names |= {"turned": "EFMLoRA, sign turned", "averaging": "averaging"}
    if names.keys() != searches.keys():
        raise ValueError(f"arms.jsonl has {', '.join(searches)}, and the page has {', '.join(names)}.")
    rows = [f"| On {FRESH} of P1's seeds |"]
    for name, title in names.items():
        config = chosen([*without, *searches[name]], "min")[WITH]
        finals = [row for row in searches[name] if row["stage"] == "final" and row["config"] == config]
        of_arm = {row["seed"]: float(row["tested"]["test_loss"]) for row in finals}
        if len(of_arm) != FRESH:
            raise ValueError(f"{title}'s choice has {len(of_arm)} final runs.")
        cells = [title, config["model.learning_rate"], rank_of(finals[0]), config["model.lora.lora_dropout"]]
        cells += [f"{strength_of(config):g}", f"{statistics.mean(of_arm.values()):.3f}"]
        differences = []
        for other in ("efmlora", "8", "32"):
            differences.append(estimate([losses[other][seed] - value for seed, value in of_arm.items()]))
        to_lora = differences[-1]  # of rank 32
        if to_lora.mean - to_lora.interval > 0:
            raise ValueError(f"The study says that no method is surely better than LoRA; {title} is.")
        cells += [with_interval(each, 3) for each in differences]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def higher_rate() -> str:
    """Return the passage on a rate beyond P1's grid."""
    higher, usual = read(RESULTS / "p1_rate.jsonl"), read(RESULTS / "p1.jsonl")
    means = f"{mean_of_search(higher, HIGHER):.2f} in place of {mean_of_search(usual, CONFIG):.2f} nats"
    return f"with 1e-2 it has {means} on {len(higher)} seeds"


def doubts() -> list[str]:
    """Return the passages on P1 over the search's seeds, and after temperature scaling."""
    found = runpy.run_path(str(RESULTS / "search_seeds.py"))["bootstrap"]()
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    trials: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for row in read(RESULTS / "calibrated.jsonl"):
        if row["stage"] == "search":
            trials[row["side"]][json.dumps(row["config"])] = tuple(row["validation"])
        else:
            losses[arm_of(row)][row["seed"]] = row["test"][1]
    for of_side in trials.values():
        best, scaled = (sorted(of_side, key=lambda config, i=i: of_side[config][i])[:4] for i in (0, 1))
        if best != scaled:
            raise ValueError("the best four trials do not keep their order after temperature scaling")
    to_lora = []
    for rank in ("8", "32"):
        values = [losses["efmlora"][seed] - value for seed, value in losses[rank].items()]
        to_lora.append(with_interval(estimate(values), 3))
    return [
        f"choice is {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]: in {100 * found.other:.0f} % of the draws",
        f"on ten seeds, they are {to_lora[0]} and {to_lora[1]}.",
    ]


def around() -> list[str]:
    """Return the rows on the loss around P1's adapters."""
    arms: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in read(RESULTS / "around.jsonl"):
        arms[arm_of(row)][row["seed"]] = row
    names = {
        "sam": "rise along FMLoRA's perturbation, rho 0.2",
        "lora": "rise along LoRA's own gradient, rho 0.2",
        "expected": "mean rise under noise of 5 %",
        "critical": "critical sharpness, per factor²",
    }
    rows = []
    for measure, name in names.items():
        digits = 2 if measure == "critical" else 3
        cells = means_and_differences(arms, measure, (digits, digits), (("32", "8"), ("efmlora", "32")))
        rows.append(f"| {name} | {cells} |")
    return rows
