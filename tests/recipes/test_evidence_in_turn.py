"""One adapter through several tasks in turn: against plain runs and a chain of them, its row and its report."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from evidence_runs import made_up, tiny_encoder

from recipes.evidence.in_turn import perform_in_turn
from recipes.evidence.module import ShotsClassifier
from recipes.evidence.plan import key_of_row
from recipes.evidence.run import Run
from recipes.evidence.tasks import CLASSES, judged_after_training, judged_again, short, trained
from recipes.evidence.workloads import WORKLOADS, Config
from recipes.language import texts
from recipes.language.texts import Example, Source

# Each contradicts the one before it, so that there is something to forget. By names that no other test uses, since what
# a task consists of is kept in the process.
PAIRS = {"turn_a": (0, 1), "turn_b": (1, 2), "turn_c": (2, 0)}
TASKS = list(PAIRS)
W5 = {**WORKLOADS["w5"], "tasks": TASKS, "shots": 4, "steps": 6, "batch_size": 4, "rank": 2, "frozen_layers": 1}
W5 |= {"validation": 8, "test": 10, "precision": "32-true"}
RUN = Run("w5", W5, "lora", {"learning_rate": 3e-2}, seed=0, stage="test")
BEST_BEFORE_THE_END = {"learning_rate": 0.3}


def of_two_classes(pair: tuple[int, int]) -> Iterator[Example]:
    for example in made_up():
        if example.label in pair:
            yield example._replace(label=pair.index(example.label))


@pytest.fixture(autouse=True)
def tiny(evidence: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for task, pair in PAIRS.items():
        monkeypatch.setitem(texts.TASKS, task, Source(("one", "other"), partial(of_two_classes, pair)))


def on(run: Run, *tasks: str) -> Run:
    """A run on fewer tasks."""
    return replace(run, settings={**run.settings, "tasks": list(tasks)})


def of_task(run: Run, task: str) -> Run:
    return replace(run, settings={**run.settings, "data": task})


# -- training


@pytest.mark.parametrize(
    ("arm", "config"),
    [
        ("early_stopping", {"early_stopping": True, **BEST_BEFORE_THE_END}),
        ("efmlora", {"rho": 2.0}),
        ("fmlora", {"rho": 2.0}),
        ("flat_lora", {"sigma": 2.0}),
    ],
)
def test_two_tasks_are_two_fits_with_nothing_but_the_weights_between_them(arm: str, config: Config) -> None:
    """The second one on layers that are made anew, so that no hook or average of the first one can be in them."""
    run = on(replace(RUN, arm=arm, config={**RUN.config, **config}), "turn_a", "turn_b")
    of_a, of_b = of_task(run, "turn_a"), of_task(run, "turn_b")
    first = trained(of_a, tiny_encoder())
    net = ShotsClassifier(tiny_encoder(), CLASSES, of_b.settings, of_b.config).net
    net.load_state_dict(first.net.state_dict())
    second = trained(of_b, tiny_encoder(), net)
    expected = {"turn_b": judged_after_training(of_b, second, tiny_encoder())}
    first.net = net
    expected["turn_a"] = judged_again(of_a, first, tiny_encoder())
    row = perform_in_turn(run)
    assert row["after"]["2"] == short(expected)
    assert row["after"]["1"]["turn_a"]["test_loss"] != row["after"]["2"]["turn_a"]["test_loss"]
    lora = perform_in_turn(replace(run, arm="lora", config=RUN.config))
    assert row["after"]["1"] != lora["after"]["1"]


# -- rows


def test_a_row_holds_what_the_adapter_knows_after_each_task(tmp_path: Path) -> None:
    row = perform_in_turn(RUN, tmp_path)
    assert json.loads(json.dumps(row)) == row
    assert key_of_row(row) == RUN.key()
    assert {"commit", "device", "torch", "seconds", "processor_seconds", "temperature"} <= set(row)
    assert (row["failed"], row["chance"]) == (False, 0.5)
    assert {number: list(by_task) for number, by_task in row["after"].items()} == {
        "1": TASKS[:1],
        "2": TASKS[:2],
        "3": TASKS,
    }
    for name in ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy"):
        assert row[name] == pytest.approx(sum(row["after"]["3"][task][name] for task in TASKS) / 3, abs=1e-12)
    losses = [row["after"][str(number)][task]["train_loss"] for number, task in enumerate(TASKS, 1)]
    assert row["train_loss"] == pytest.approx(sum(losses) / 3, abs=1e-12)
    # Fewer tasks are the beginning of more.
    fewer = perform_in_turn(on(RUN, *TASKS[:2]))
    assert fewer["after"] == {number: row["after"][number] for number in ("1", "2")}
    assert perform_in_turn(replace(RUN, seed=1))["after"] != row["after"]
