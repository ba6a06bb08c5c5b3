"""Plans for the paper's tables: shares, choices, trials, and the recipes' commands; nothing is trained."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import optuna
import pytest
from one_command import ParsingCLI

from recipes.reproduce import plan as planning
from recipes.reproduce import run as running
from recipes.reproduce.__main__ import main
from recipes.reproduce.methods import METHODS
from recipes.reproduce.plan import Plan
from recipes.reproduce.report import count, table_text
from recipes.reproduce.run import Context, Run, restored, score, validated
from recipes.reproduce.table import TABLES, Table
from recipes.studies import queue as queues
from recipes.studies.process import FailedError, command
from recipes.studies.queue import Queue, file_storage, study_so_far
from recipes.studies.rows import Row

GRIDS = {"lora_dropout": (0.0, 0.1), "rho": (0.0, 0.05), "lora_rho": (0.0, 0.1), "sigma": (0.0, 0.1), "alpha": (0.0, 1)}


SMALL: dict[str, Any] = {"learning_rates": (1e-2,), "grids": GRIDS}


class Fake:
    """Stands in for the runs; each method's last configuration is the best, and some runs fail."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failing: list[str] = []
        self.start: Barrier | None = None

    def __call__(self, run: Run, _: Any = None) -> Row:
        if any(part in run.name for part in self.failing):
            raise FailedError(3)
        if self.start is not None and not self.done:
            self.start.wait(timeout=60)  # for the other worker
        self.done.append(run.name)
        metrics = [metric.name for metric in run.table.tasks[run.task].metrics]
        return {
            "value": 0.0,
            "score": sum(run.config.values()) / 10,
            "loss": 1.0,
            "metrics": dict.fromkeys([f"test_{name}" for name in metrics], 0.5),
            "steps": 0,
            "training_seconds": 1.0,
            **dict.fromkeys(("device", "precision", "commit"), "here"),
        }


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Replaces the command's runs, with small grids."""
    found = Fake()
    monkeypatch.setitem(TABLES, "table1", replace(TABLES["table1"], **SMALL))
    monkeypatch.setattr(planning, "perform", found)
    return found


Planned = Callable[..., Plan]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    """A function that makes the plan of a table."""

    def plan(name: str, tasks: list[str] | None = None, study: optuna.Study | None = None, **changed: Any) -> Plan:
        monkeypatch.setitem(TABLES, name, replace(TABLES[name], **changed))
        table, queue = TABLES[name], Queue(study or optuna.create_study(), restored)
        return Plan(table, table.methods, tasks or list(table.tasks), table.seeds, "tuned", queue)

    return plan


def work(plan: Plan, perform: Callable[[Run], Row]) -> None:
    plan.queue.work(plan.open_runs, lambda run, _: perform(run), print)


@pytest.mark.parametrize(("name", "tasks"), [("table1_offline", []), ("table2", ["rte"])])
def test_workers_share_the_runs_and_finals_wait_for_all_choices(
    name: str, tasks: list[str], planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "_WAIT", 0.01)
    study = optuna.create_study()
    fakes = [Fake(), Fake()]
    fakes[0].start = fakes[1].start = Barrier(2)
    plans = [planned(name, tasks, study) for _ in fakes]
    threads = [Thread(target=work, args=each) for each in zip(plans, fakes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    done = fakes[0].done + fakes[1].done
    assert len(done) == len(set(done))
    assert all(fake.done for fake in fakes)
    for plan in plans:
        assert not plan.open_runs()
        assert {run.name for run in plan.runs()} == set(done)
    assert any("/test/efmlora-learning_rate" in name for name in done)
    assert "± 0.0 (" in table_text(plans[0])


def test_workers_of_other_tasks_do_each_others_runs(planned: Planned) -> None:
    study, fake = optuna.create_study(), Fake()
    first, other = (planned("table1", [task], study, **SMALL) for task in ("sst2", "rte"))
    queued = first.open_runs()[0]
    study.enqueue_trial({}, user_attrs={"name": queued.name, "run": queued.key()})
    work(other, fake)
    assert fake.done[0] == queued.name
    assert {name.partition("/")[0] for name in fake.done[1:]} == {"rte"}
    work(first, fake)
    assert {name.partition("/")[0] for name in fake.done[len(other.queue.rows) :]} == {"sst2"}
    assert len(fake.done) == len(set(fake.done)) == len(first.queue.rows)


def test_commands_of_other_tasks_share_a_storage(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, storage = tmp_path / "table", f"--storage=sqlite:///{tmp_path}/shared.db"
    given = ["table1", "--methods", "lora", "efmlora", f"--folder={folder}", storage, "--study=mine"]
    folder.mkdir()
    (folder / "table.md").write_text("somebody's")
    assert main([*given, "--plan"]) == 0
    assert "Done: 0." in capsys.readouterr().out
    for task in ("sst2", "rte"):
        assert main([*given, "--tasks", task]) == 0
    assert {name.partition("/")[0] for name in fake.done} == {"sst2", "rte"}
    assert (folder / "table-1.md").read_text() == "somebody's"
    assert not (folder / "study.db").exists()
    assert main([*given, "--tasks", "sst2", "rte", "--plan", "--model.model=other"]) == 0
    assert f"Done: {len(fake.done)}. 0 runs may start now." in capsys.readouterr().out


def test_a_run_that_fails_keeps_no_other_one_from_being_done(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["table1", "--tasks", "sst2", "rte", "--methods", "lora", "efmlora", f"--folder={tmp_path}/table"]
    fake.failing = [""]  # all; the first one shows what is wrong with them
    assert main(given) == 3
    assert "The first run has failed, with the error above" in capsys.readouterr().out
    assert len(study_so_far(file_storage(tmp_path / "table"), "table1").trials) == 1
    assert not list(tmp_path.rglob("table.md"))
    fake.failing = ["rho=0.05", "seed-21"]
    assert main(given) == 1
    # The dropouts of both tasks, as EFMLoRA's rho 0 is LoRA's run. Its other rho has failed, so nothing is chosen.
    assert len(fake.done) == 4
    said = capsys.readouterr().out
    assert "Failed, with the error above" in said
    assert said.partition("Failed, with")[2].count("/efmlora-learning_rate=0.01-rho=0.05/seed-") == 2
    fake.failing.remove("rho=0.05")
    assert main(given) == 1
    assert len(fake.done) == 4 + 2 + 2 * 2 * 4
    fake.failing.clear()
    assert main(given) == 0
    assert len(fake.done) == len(set(fake.done)) == 4 + 2 + 2 * 2 * 5


def test_a_run_that_another_worker_has_done_has_not_failed(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other worker may have more memory."""
    failed: list[Run] = []

    def perform(run: Run, _: Context) -> Row:
        if run.seed == run.table.seeds[1]:
            failed.append(run)
            raise FailedError(1)
        if failed:
            other = Queue(study_so_far(file_storage(tmp_path), "table1"), restored)
            other.work(lambda: [each for each in failed if other.find(each) is None], fake, print)
        return fake(run)

    monkeypatch.setattr(planning, "perform", perform)
    assert main(["table1", "--tasks=sst2", "--methods=lora", "--protocol=paper", f"--folder={tmp_path}"]) == 0
    assert len(failed) == 1


def test_equal_scores_are_decided_by_the_loss(planned: Planned) -> None:
    plan = planned("table1", ["sst2"], learning_rates=(1e-3, 1e-2), grids=GRIDS)

    def perform(run: Run) -> Row:
        loss = abs(run.config["learning_rate"] - 1e-2) + run.config.get("rho", 0.0)
        return {**Fake()(run), "score": 0.5, "loss": loss}

    work(plan, perform)
    assert plan.chosen("sst2", "efmlora") == {"learning_rate": 1e-2, "rho": 0.0}
    assert {run.method for run in plan.finals("sst2", "efmlora")} == {"lora"}  # radius 0, so these are LoRA's own runs
    assert "| EFMLoRA | learning_rate 0.01*, rho 0 |" in table_text(plan)  # marked, as it is at an end of the grid


@pytest.mark.parametrize("name", ["table2", "table5"])
def test_a_run_that_has_diverged_is_not_chosen(name: str, planned: Planned) -> None:
    table = TABLES[name]
    task = next(iter(table.tasks))
    plan = planned(name, [task], learning_rates=(1e-2, 1e-3), grids=GRIDS)

    def perform(run: Run) -> Row:
        value = math.nan if run.config["learning_rate"] == 1e-2 else 0.5
        validations = [{f"val_{table.choice}": value, "val_loss": value}]
        judged = score(validated(validations, table), table)
        return {**Fake()(run), "value": judged, "score": judged, "loss": value}

    work(plan, perform)
    chosen = plan.chosen(task, "lora")
    assert chosen is not None
    assert chosen["learning_rate"] == 1e-3


def test_a_run_that_has_diverged_is_done(tmp_path: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "fit", lambda *_: {"seconds_per_step": 1.0})
    monkeypatch.setattr(running, "tested", lambda *_: {"test_loss": math.nan})
    monkeypatch.setattr(running, "checkpoint", lambda *_: tmp_path / "best.ckpt")
    plan = planned("table5")
    run = Run("vizwiz", "lora", {"learning_rate": 1.0, "lora_dropout": 0.0}, 5, "test", TABLES["table5"])
    context = Context(tmp_path, "32-true")
    plan.queue.work(
        lambda: [] if plan.queue.find(run) else [run], lambda each, _: running.perform(each, context), print
    )
    (row,) = plan.queue.rows
    assert row["value"] == -math.inf
    assert math.isnan(row["metrics"]["test_loss"])


def test_the_page_says_what_the_smallest_and_the_largest_table_cost(planned: Planned) -> None:
    page = (running.RECIPES.parent / "docs" / "recipes" / "reproduce.md").read_text(encoding="utf-8")
    costs = []
    for name in TABLES.keys() - {"table6"}:  # which measures a few steps only
        plan = planned(name)
        counts = count(plan, plan.tasks)
        costs.append((counts.steps, counts.choosing + counts.final, name))
    steps, runs, name = min(costs)
    assert f"from {runs} runs and {steps:,} steps for\n`{name}`" in page
    steps, runs, name = max(costs)
    assert f"to {runs} runs and {steps / 1e6:.1f} million steps for `{name}`" in page


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_method_has_as_many_trials(table: Table) -> None:
    numbers = {len(method.configurations(table.learning_rates, table.grids)) for method in METHODS.values()}
    assert len(numbers) == 1
    for name, grid in table.grids.items():
        assert len(set(grid)) == len(grid)
        assert name == "lora_dropout" or 0.0 in grid or table.keeps == "nothing"
    assert table.tuning_seed not in table.seeds
    for task in table.tasks.values():
        assert task.start is None or task.start in table.tasks


# -- the commands of every table


Parse = Callable[[list[str]], Any]


@pytest.fixture(scope="module")
def parse() -> Iterator[Parse]:
    """A function that returns the settings which a recipe's parser makes of a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["test"])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        cli = ParsingCLI([f"--config={running.RECIPES}/classification/configs/base.yaml"], run=False)

        def settings(command: list[str]) -> Any:
            cli.parse_arguments(cli.parser, command[4:])
            cli.before_instantiate_classes()
            return cli.config

        yield settings


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_settings_of_every_method_arrive(table: Table, parse: Parse, tmp_path: Path) -> None:
    task = next(iter(table.tasks))
    for name, method in METHODS.items():
        config = method.configurations([1.5e-3], table.grids)[-1]
        run = Run(task, name, config, 5, "validation", table)
        settings = parse(
            command(table.recipe, "fit", tmp_path / run.name, running.fit_arguments(run, Context(tmp_path, "32-true")))
        )
        model, callbacks = settings.model.init_args, settings.trainer.callbacks
        assert model.learning_rate == 1.5e-3
        assert callbacks[-1].init_args.folder == str(tmp_path / run.name)
        if name == "lora":
            assert model.lora["lora_dropout"] == config["lora_dropout"]
            continue
        size = callbacks[-2].init_args[method.parameter]
        assert config[method.parameter] in (size, *getattr(size, "init_args", {}).values())


TASKS = []
for table in TABLES.values():
    TASKS += [(table, task) for task in table.tasks]


@pytest.mark.parametrize(("table", "task"), TASKS, ids=lambda value: getattr(value, "name", value))
def test_the_protocols_values_are_those_of_the_recipes_files(
    table: Table, task: str, parse: Parse, tmp_path: Path
) -> None:
    run = Run(task, "lora", {"learning_rate": 1.0, "lora_dropout": 1.0}, 5, "test", table)
    chosen = ("--model.learning_rate", "--model.lora")
    arguments = running.fit_arguments(run, Context(tmp_path, "32-true"))
    given = [argument for argument in arguments if not argument.startswith(chosen)]
    settings = parse(command(table.recipe, "fit", tmp_path, given))
    # Runs of size 0 are shared with LoRA's, so their other settings must be the same.
    assert settings.model.init_args.lora["lora_dropout"] == table.grids["lora_dropout"][0]
    assert table.tasks[task].learning_rate == settings.model.init_args.learning_rate
    if settings.trainer.max_steps > 0:
        assert table.tasks[task].steps == settings.trainer.max_steps


# -- what is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["table9"], "TABLE: there is no table9; there are table1, table1_offline"),
        (["table1", "--tasks", "cola"], "--tasks: there is no cola; there are sst2, sst5"),
        (["table1", "--seeds", "7"], "--seeds: seed 7 chooses the settings, so it can't be used for testing"),
        (["table1", "--methods", "sam"], "--methods: there is no sam; there are lora, efmlora"),
        (["table1", "--seeds", "a"], "Expected a <class 'int'>. Got value: a"),
    ],
)
def test_errors_are_clear(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert said in f"{capsys.readouterr().err} {stopped.value}"
    assert not list(tmp_path.iterdir())
