"""One adapter through several tasks in turn: against plain runs and a chain of them, its row and its report."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the recipes' dependencies are not installed")

from evidence_runs import Fake, figures, install, made_up, tiny_encoder
from safetensors.torch import load_file

from recipes.evidence import __main__ as command
from recipes.evidence import commands
from recipes.evidence import tasks as on_tasks
from recipes.evidence.__main__ import main
from recipes.evidence.conditions import AS_TRAINED, scale_adapter
from recipes.evidence.in_turn import perform_in_turn
from recipes.evidence.kept import Kept, restored
from recipes.evidence.module import ShotsClassifier, trained_parameters
from recipes.evidence.plan import RESULTS, key_of_row
from recipes.evidence.robustness import judge
from recipes.evidence.run import Run, perform
from recipes.evidence.tasks import CLASSES, judged_after_training, judged_again, short, trained
from recipes.evidence.workloads import COMPETITORS, PROBE, WORKLOADS, Config
from recipes.language import texts
from recipes.language.texts import Example, Source
from recipes.shared.ledger import Ledger, Row

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
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    for task, pair in PAIRS.items():
        monkeypatch.setitem(texts.TASKS, task, Source(("one", "other"), partial(of_two_classes, pair)))


def on(run: Run, *tasks: str) -> Run:
    """A run on fewer tasks."""
    return replace(run, settings={**run.settings, "tasks": list(tasks)})


def of_task(run: Run, task: str) -> Run:
    return replace(run, settings={**run.settings, "data": task})


def kept_weights(run: Run, folder: Path) -> dict[str, Tensor]:
    return load_file(folder / perform_in_turn(run, folder)["weights"])


# -- training


@pytest.mark.parametrize(
    ("arm", "config"),
    [("lora", {}), ("efmlora", {"rho": 2.0}), ("early_stopping", {"early_stopping": True}), ("rank_2", {"rank": 1})],
)
def test_one_task_is_a_plain_run(arm: str, config: Config) -> None:
    run = replace(RUN, arm=arm, config={**BEST_BEFORE_THE_END, **config})
    plain = perform(of_task(run, "turn_a"))
    row = perform_in_turn(on(run, "turn_a"))
    assert figures(row) == figures(plain)
    for name, value in row["after"]["1"]["turn_a"].items():
        assert value == plain[name]


SIZES = {"efmlora": "rho", "fmlora": "rho", "lora_sam": "rho", "flat_lora": "sigma", "nbar": "alpha", "obar": "alpha"}


@pytest.mark.parametrize(
    ("arm", "config"),
    [("lora", {}), ("early_stopping", {"early_stopping": True, **BEST_BEFORE_THE_END})]
    + [(arm, {size: 2.0}) for arm, size in SIZES.items()],
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
    if arm != "lora":
        lora = perform_in_turn(replace(run, arm="lora", config=RUN.config))
        assert row["after"]["1"] != lora["after"]["1"]


@pytest.mark.parametrize("method", ["efmlora", "fmlora"])
def test_rho_0_is_lora(method: str) -> None:
    at_0 = perform_in_turn(replace(RUN, arm=method, config={**RUN.config, "rho": 0.0}))
    assert at_0["after"] == perform_in_turn(RUN)["after"]


def test_it_begins_with_the_seeds_adapter_and_all_heads_alike(tmp_path: Path) -> None:
    found = kept_weights(replace(RUN, seed=3, config={"learning_rate": 0.0}), tmp_path)
    L.seed_everything(3, verbose=False)
    start = trained_parameters(ShotsClassifier(tiny_encoder(), CLASSES, W5, RUN.config))
    assert len(found) == 2 * 2 + 2 * 3
    for name, weight in found.items():
        part, _, rest = name.partition(".")
        its_start = start[f"net.{rest}"] if part == "adapter" else start[f"head.{rest.partition('.')[2]}"]
        assert torch.equal(weight, its_start)


def test_a_head_stays_as_it_is_while_later_tasks_are_learned(tmp_path: Path) -> None:
    found = [kept_weights(on(RUN, *TASKS[:number]), tmp_path) for number in (1, 2, 3)]
    for earlier, later in ((found[0], found[1]), (found[1], found[2])):
        for name, weight in earlier.items():
            assert torch.equal(weight, later[name]) == name.startswith("heads.")
    assert not torch.equal(found[2]["heads.turn_a.weight"], found[2]["heads.turn_b.weight"])


def test_early_stopping_takes_the_best_weights_before_the_next_task_begins() -> None:
    long = replace(RUN, settings={**W5, "steps": 20}, config=BEST_BEFORE_THE_END)
    stopped = perform_in_turn(replace(long, config={**long.config, "early_stopping": True}))
    last = perform_in_turn(long)
    assert stopped["after"]["1"]["turn_a"]["validation_loss"] < last["after"]["1"]["turn_a"]["validation_loss"]


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


def test_the_kept_weights_are_those_that_the_end_is_judged_by(tmp_path: Path) -> None:
    row = perform_in_turn(RUN, tmp_path)
    found = load_file(tmp_path / row["weights"])
    for task in TASKS:
        module = ShotsClassifier(tiny_encoder(), CLASSES, W5, RUN.config)
        adapter = {name.removeprefix("adapter."): weight for name, weight in found.items() if "lora" in name}
        assert not module.net.load_state_dict(adapter, strict=False).unexpected_keys
        module.head.load_state_dict({name: found[f"heads.{task}.{name}"] for name in ("weight", "bias")})
        again = judged_again(of_task(RUN, task), module, tiny_encoder())
        assert again["test_loss"] == row["after"]["3"][task]["test_loss"]


def test_the_last_adapter_is_judged_with_each_head_under_other_conditions(tmp_path: Path) -> None:
    row = perform_in_turn(RUN, tmp_path)
    kept = Kept(RUN, row["weights"])
    conditions = judge(kept, tmp_path)["conditions"]
    for name in ("accuracy", "loss", "ece", "brier", "loss_scaled"):
        assert conditions[AS_TRAINED][name] == pytest.approx(row[f"test_{name}"], rel=1e-6)
    halved = []
    for task, module in restored(kept, tmp_path).items():
        scale_adapter(module, 0.5)
        halved.append(judged_again(of_task(RUN, task), module, tiny_encoder())["test_loss"])
    assert conditions["scale_0.5"]["loss"] == pytest.approx(sum(halved) / len(TASKS), rel=1e-6)
    assert conditions["scale_0.5"]["loss"] != conditions[AS_TRAINED]["loss"]


def test_a_search_does_not_see_the_test_part(tmp_path: Path) -> None:
    row = perform_in_turn(replace(RUN, stage="search"), tmp_path)
    assert list(row["after"]) == ["1", "2", "3"]
    assert "test" not in json.dumps({name: row[name] for name in row if name not in RUN.key()})
    assert not list(tmp_path.iterdir())


def test_a_run_fails_as_a_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fits = []
    plain_fit = on_tasks.fit

    def failing_fit(run: Run, module: ShotsClassifier, encoder: Any) -> Any:
        fits.append(run.settings["data"])
        best = plain_fit(run, module, encoder)
        module.has_failed = module.has_failed or fits == TASKS[:2]
        return best

    monkeypatch.setattr(on_tasks, "fit", failing_fit)
    for run in (RUN, replace(RUN, config={"learning_rate": 1e38})):
        row = perform_in_turn(run, tmp_path)
        assert row["failed"]
        assert row["test_accuracy"] == row["chance"] == 0.5
        assert row["validation_loss"] is row["train_loss"] is None
        assert "after" not in row
    assert fits == ["turn_a", "turn_b", "turn_a"]
    assert not list(tmp_path.iterdir())


def test_the_probe_has_nothing_to_forget() -> None:
    row = perform_in_turn(replace(RUN, arm="linear_probe", config={}))
    accuracies = [scores["test_accuracy"] for scores in row["single"].values()]
    assert row["test_accuracy"] == pytest.approx(sum(accuracies) / 3, abs=1e-12)
    assert "after" not in row


# -- the command


class FakeInTurn(Fake):
    """What is learned loses 10 points with the next task, with EFMLoRA 4; seed 3 of LoRA has failed."""

    def __call__(self, run: Run, folder: Path | None = None) -> Row:
        row = super().__call__(run, folder)
        if (run.arm, run.seed) == ("lora", 3):
            return row | {"failed": True, "test_accuracy": row["chance"]}
        if run.stage == "test" and run.arm != PROBE:
            lost = 0.04 if run.arm == "efmlora" else 0.1
            row["after"] = {}
            for number in (1, 2, 3):
                later = {task: {"test_accuracy": row["test_accuracy"] - lost} for task in TASKS[: number - 1]}
                row["after"][str(number)] = {**later, TASKS[number - 1]: {"test_accuracy": row["test_accuracy"]}}
        return row


def test_the_command_runs_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeInTurn(gain=0.05)
    monkeypatch.setattr(commands, "perform_in_turn", fake)
    monkeypatch.setitem(command.WORKLOADS, "w5", {name: v for name, v in W5.items() if name != "precision"})
    options = ["--workload", "w5", "--folder", str(tmp_path), "--precision", "32-true"]
    options += ["--methods", "lora", "efmlora", *COMPETITORS, PROBE]
    assert main(["run", *options]) == 0
    assert {run.workload for run in fake.done} == {"w5"}
    assert {run.arm for run in fake.done} >= {"lora", "efmlora", "rank_2", "early_stopping", "linear_probe"}
    done = len(fake.done)
    assert main(["run", *options]) == 0
    assert len(fake.done) == done
    assert main(["report", *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "w5, EFMLoRA minus LoRA, 20 seeds: **gain**" in shown
    assert "The workload is secondary: no hypothesis of the protocol rests on it." in shown
    text = (tmp_path / "w5.md").read_text()
    # LoRA's failed run counts with the accuracy of chance, and not as one that has forgotten nothing.
    assert "| 10.0 ± 0.0 (19) |  |" in text
    assert "| 4.0 ± 0.0 (20) | -6.00 [-6.00, -6.00] |" in text
    assert "| EFMLoRA | 56.0 → 52.0 | 56.0 → 52.0 | 56.0 → 56.0 |" in text
    assert (tmp_path / "w5.png").stat().st_size > 10_000
    assert (tmp_path / "w5_kept.png").stat().st_size > 10_000


def test_the_command_finds_the_rows_of_real_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = {**W5, "tasks": TASKS[:2], "steps": 2}
    monkeypatch.setitem(command.WORKLOADS, "w5", {name: v for name, v in two.items() if name != "precision"})
    done: list[Run] = []

    def counted(perform_one: Callable[..., Row], run: Run, folder: Path) -> Row:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(run)
        return perform_one(run, folder)

    monkeypatch.setattr(commands, "perform_in_turn", partial(counted, perform_in_turn))
    options = ["--workload", "w5", "--folder", str(tmp_path), "--precision", "32-true", "--methods", "lora"]
    assert main(["run", *options]) == 130
    ledger = Ledger(tmp_path / RESULTS, key_of_row)
    assert [row["after"]["2"].keys() for row in ledger.rows] == [set(TASKS[:2])] * 2
    first = list(done)
    done.clear()
    assert main(["run", *options]) == 130
    assert not {str(run) for run in done} & {str(run) for run in first}


def test_the_real_tasks_are_those_that_w3_merges() -> None:
    of_w3 = {name: value for name, value in WORKLOADS["w3"].items() if not name.startswith(("ties", "arithmetic"))}
    assert WORKLOADS["w5"] == {**of_w3, "in_turn": True}
