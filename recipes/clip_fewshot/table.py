"""The table of a sweep: accuracies with the values that validation chose, beside published figures."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.shared.ledger import Row
from recipes.shared.statistics import mean_cell
from recipes.shared.tables import markdown
from recipes.studies.choice import Judgement, best

Setting = tuple[float | None, float | None]

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
"""Other people's figures by method: ``source``, and ``accuracy`` in % by data set and number of shots, a text."""


def tables(rows: Sequence[Row], part: str = "test") -> str:
    """Markdown: a table for each data set.

    Args:
        rows: the runs' results.
        part: whose accuracy: "test", with the radius and rate that validation chose, or "validation", with all.
    """
    shown = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        of_dataset = [row for row in rows if row["dataset"] == dataset]
        shown.append(f"{dataset}:\n\n{table(of_dataset, part)}")
    note = f"Accuracy in % on the {part} part, mean ± standard error (seeds); step time relative to LoRA's."
    if part == "test" and any(len(_settings(rows, name)) > 1 for name in _names(rows)):
        note += " Values in brackets have the best validation accuracy of those that were run."
    if part == "test":
        for name, method in PUBLISHED.items():
            if any(_is_published(method, row) for row in rows):
                note += f" Published, {name}: {method['source']}."
    return "\n\n".join([*shown, note])


def table(rows: Sequence[Row], part: str = "test") -> str:
    """Markdown: a line for each method, accuracy in % over seeds for each number of shots, and relative step time.

    Args:
        rows: the results on one data set.
        part: as in :func:`tables`.

    Example:
        >>> data = {"dataset": "dtd", "split": "torchvision", "shots": 1, "zero_shot": {"accuracy": 0.25}}
        >>> method = {"name": "LoRA", "rho": None, "learning_rate": None, "seconds_per_step": 0.5}
        >>> runs = [{**data, **method, "test": {"accuracy": accuracy}} for accuracy in (0.5, 0.6)]
        >>> print(table(runs))
        | method | 1 shot | step time |
        |---|---|---|
        | zero-shot | 25.0 |  |
        | LoRA | 55.0 ± 5.0 (2) | 1.00 |
    """
    shots = sorted({row["shots"] for row in rows})
    base = _seconds([row for row in rows if row["name"] == "LoRA"])
    lines = [["method", *map(counted, shots), "step time"]]
    if part == "test":
        lines += _published(rows, shots)
        zero_shot = f"{100 * statistics.mean(row['zero_shot']['accuracy'] for row in rows):.1f}"
        lines.append(["zero-shot", *[zero_shot] * len(shots), ""])
    for name in _names(rows):
        of_method = [row for row in rows if row["name"] == name]
        seconds = _seconds(of_method)
        relative = f"{seconds / base:.2f}" if seconds and base else "-"
        for label, cells in _cells(of_method, name, shots, part):
            lines.append([label, *cells, relative])
    return markdown(lines)


def _cells(rows: Sequence[Row], name: str, shots: Sequence[int], part: str) -> list[tuple[str, list[str]]]:
    """The lines of a method: one for each setting on the validation part, one with the chosen ones on the test part."""
    settings = _settings(rows, name)
    lines = []
    if part == "validation":
        for setting in settings:
            of_setting = [row for row in rows if _setting(row) == setting]
            cells = [mean_cell(_accuracies(of_setting, number, part)) for number in shots]
            lines.append((", ".join([name, *_shown(setting)]), cells))
        return lines
    cells = []
    for number in shots:
        of_shots = [row for row in rows if row["shots"] == number]
        choice = ""
        if len(_settings(of_shots, name)) > 1:
            best = chosen(of_shots)
            of_shots = [row for row in of_shots if _setting(row) == best]
            choice = f" [{', '.join(_shown(best))}]"
        cells.append(mean_cell(_accuracies(of_shots, number, part)) + choice)
    return [(name, cells)]


def chosen(rows: Sequence[Row]) -> Setting:
    """The radius and the learning rate with the best mean validation accuracy; of equals the first.

    Args:
        rows: of one data set, method and number of shots.

    Raises:
        MisconfigurationException: the runs have not been validated.

    Example:
        >>> tried = ((0.1, 0.5), (0.3, 0.6), (0.1, 0.4))
        >>> chosen([{"rho": rho, "learning_rate": None, "validation": {"accuracy": a}} for rho, a in tried])
        (0.3, None)
    """
    judged: dict[Setting, list[Judgement]] = {}
    for row in rows:
        accuracy = row["validation"].get("accuracy", math.nan)
        if math.isnan(accuracy):
            raise MisconfigurationException(
                "validation accuracy chooses between values of --rho and --learning_rate, and these runs have none: "
                "set --data.init_args.validation_shots above 0"
            )
        judged.setdefault(_setting(row), []).append((accuracy,))
    return list(judged)[best(list(judged.values()))]


def counted(shots: int) -> str:
    """A number of shots in words.

    Example:
        >>> counted(1), counted(4)
        ('1 shot', '4 shots')
    """
    return f"{shots} shot{'s' * (shots > 1)}"


def _published(rows: Sequence[Row], shots: Sequence[int]) -> list[list[str]]:
    """Lines of published figures, where the runs had the published parts."""
    lines = []
    for name, method in PUBLISHED.items():
        if all(_is_published(method, row) for row in rows):
            figures = method["accuracy"][rows[0]["dataset"]]
            lines.append([f"{name}, published", *(str(figures.get(str(number), "-")) for number in shots), ""])
    return lines


def _is_published(method: dict[str, Any], row: Row) -> bool:
    return row["dataset"] in method["accuracy"] and row["split"] == "coop"


def _names(rows: Sequence[Row]) -> list[str]:
    # A set would lose the order in which the methods were named.
    return list(dict.fromkeys(row["name"] for row in rows))


def _settings(rows: Sequence[Row], name: str) -> list[Setting]:
    return list(dict.fromkeys(_setting(row) for row in rows if row["name"] == name))


def _setting(row: Row) -> Setting:
    return row["rho"], row["learning_rate"]


def _shown(setting: Setting) -> list[str]:
    return [f"{name} {value:g}" for name, value in zip(("rho", "lr"), setting, strict=True) if value is not None]


def _accuracies(rows: Sequence[Row], shots: int, part: str) -> list[float]:
    accuracies = []
    for row in rows:
        if row["shots"] == shots:
            if "accuracy" not in row[part]:
                raise MisconfigurationException(
                    f"these runs have no accuracy on the {part} part: set --data.init_args.validation_shots above 0, "
                    "or leave --part out"
                )
            accuracies.append(100 * row[part]["accuracy"])
    return accuracies


def _seconds(rows: Sequence[Row]) -> float | None:
    seconds = [row["seconds_per_step"] for row in rows if row["seconds_per_step"]]
    return statistics.median(seconds) if seconds else None
