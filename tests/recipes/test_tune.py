"""The search with and without the perturbation: what is tried, run, shared and resumed, and the messages."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import optuna
import pandas
import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna import Trial

from recipes.command_line import precision
from recipes.command_line.arguments import option
from recipes.command_line.cli import RecipeCLI
from recipes.command_line.configs import RECIPES
from recipes.command_line.precision import SETTING
from recipes.studies.colours import COLOURS
from recipes.studies.process import FailedError, StoppedError
from recipes.studies.queue import Queue
from recipes.studies.rows import Row
from recipes.tune import verdict
from recipes.tune.__main__ import _search, _space, main
from recipes.tune.answer import CONTROL, SIDES, WITH, WITHOUT, Answer, answer, chosen, draw
from recipes.tune.search import ROUND, Options, Run, Search
from recipes.tune.space import Space, arguments

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

EFMLORA = RECIPES / "configs" / "methods" / "efmlora.yaml"
SPACE = {"model.lr": ["1e-4", "1e-3", "1e-2"], "model.r/model.alpha": ["2/4", "8/16"]}


@pytest.fixture
def options(tiny: str, tmp_path: Path) -> list[str]:
    """Four trials, and two fresh seeds, of a small classification."""
    sentences = [{"text": f"The {('cat', 'dog')[i % 2]} number {i}", "label": ("cat", "dog")[i % 2]} for i in range(60)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(sentence) for sentence in sentences))
    return [
        *("classification", "--budget=4", "--fresh=2", "--rho", "0.1", "0.5", f"--folder={tmp_path / 'search'}"),
        *("--search", "model.learning_rate", "1e-3", "1e-2", "--search", "model.head_learning_rate", "null", "1e-2"),
        *(f"--config={RECIPES / 'classification' / 'configs' / 'base.yaml'}", f"--config={EFMLORA}"),
        *(f"--model.model={tiny}", "--model.lora.target_modules=[q_proj,v_proj]", f"--data.dataset={data}"),
        *("--data.validation_share=0.15", "--data.test_share=0.15", "--trainer.max_steps=2", "--trainer.devices=1"),
        *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.val_check_interval=2"),
        *("--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"),
    ]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Do runs in this process; the list of commands. The third one is stopped."""
    commands: list[Sequence[str]] = []

    def run_here(command: Sequence[str]) -> None:
        commands.append(command)
        assert os.environ[SETTING] == "bf16-mixed"  # in all runs, unless an option says otherwise
        if len(commands) == 3:
            raise StoppedError
        RecipeCLI(list(command[3:]))  # after python -m recipes.classification

    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent))  # for the processes that print settings
    monkeypatch.setattr(precision, "_has_fast_bfloat16", lambda: True)
    monkeypatch.setenv(SETTING, "")  # so that it is restored afterwards
    monkeypatch.setattr("recipes.studies.process.run_process", run_here)
    return commands


def test_a_search_is_run_once_resumed_and_answered(
    options: list[str], started: list[Sequence[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "search"
    folder.mkdir()
    (folder / "table.txt").write_text("somebody's")
    assert main([*options, "--test"]) == 130
    assert "The same command resumes" in capsys.readouterr().out
    assert main([*options, "--test"]) == 0
    # Four trials of one seed, each repeated with two more, the winners and maybe a control with two fresh seeds, their
    # tests and one of the first trial, and one stop.
    rows = pandas.read_csv(folder / "results.csv")
    finals = rows[rows.stage == "final"]
    sides = finals.groupby(["model.learning_rate", "model.head_learning_rate", "rho"], dropna=False)
    assert len(finals) == 2 * len(sides) == len(rows) - 4 - 8
    assert len(started) == len(rows) + len(finals) + 1 + 1
    assert started[1][3] == "test"  # so that a search on data without a test part ends at its start
    assert list(started[2]) == list(started[3])
    assert {"--data.seed=101", "--data.shots_seed=101"} <= set(started[-1])
    assert all(set(of_side.seed) == {100, 101} for _, of_side in sides)
    out = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "Searched: rho of 0, 0.1, 0.5" in out
    assert "Precision: bf16-mixed" in out
    assert "val_score, more is better" in out
    assert "One more hour of one worker would buy" in out
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["model"]["class_path"] == "recipes.classification.module.TextClassification"
    assert (folder / "trials.png").stat().st_size > 0
    assert (folder / "table-1.txt").read_text() == "somebody's"
    assert not list(tmp_path.glob("search/search/**/*.ckpt"))
    # The verdict on the table and the study is the search's own.
    text = (folder / "table.txt").read_text()
    for source in (folder / "results.csv", f"sqlite:///{folder / 'study.db'}"):
        judged = ["--metric", "val_score", "--mode", "max"]
        verdict.main([str(source), *judged, "--picture", str(tmp_path / "verdict.png")])
        assert capsys.readouterr().out.startswith(text)
    # Nothing is run again, more seeds can be added, and runs with other options can't be mixed in.
    assert main([*options, "--test"]) == 0
    assert len(started) == len(rows) + len(finals) + 2
    with pytest.raises(MisconfigurationException, match="test was True and is False"):
        main(options)


def made(folder: Path, space: Space = SPACE, **settings: Any) -> Search:
    queue = Queue(optuna.create_study(), lambda key: Run(**key))
    space = {**space, "rho": ["0", "0.5", "5"]}
    return Search(Options("my.cli", **settings), [], space, queue, folder, "val_loss", "min")


def finished(folder: Path, rank_8: bool = False, space: Space = SPACE, **settings: Any) -> tuple[Search, list[Run]]:
    """A search whose runs take no time; the best are 1e-2 and rank 2 without the perturbation, and rho 5 with it."""
    search = made(folder, space, **settings)
    runs: list[Run] = []

    def perform(run: Run, trial: Trial) -> Row:
        rate, rank = run.config.get("model.lr", "0"), run.config.get("model.r/model.alpha")
        value = 1.0 - 10 * float(rate) + (rank == "8/16") - 0.1 * float(run.config["rho"]) + run.seed / 1000
        value -= 2 * (rank_8 and rank == "8/16" and run.config["rho"] == "5")
        return search._row(value, seconds=36.0)

    search.queue.work(search.open_runs, perform, runs.append)
    return search, runs


def changed(search: Search, **values: float) -> list[Row]:
    """A search's rows, with another value for the first final run of a side."""
    rows = [dict(row) for row in search.queue.rows]
    for side, value in values.items():
        next(row for row in rows if row["stage"] == "final" and row["side"] == side)["value"] = value
    return rows


def test_both_sides_have_as_many_trials_and_the_best_are_chosen(tmp_path: Path) -> None:
    search, runs = finished(tmp_path, budget=12)
    tried = {side: list(search.tried(side).values()) for side in SIDES}
    assert [len(rows) for rows in tried.values()] == [6, 6]
    assert len({json.dumps(row["config"]) for row in tried[WITHOUT]}) == 6  # all that exist
    assert chosen(search.queue.rows, "min")[WITHOUT] == {"model.lr": "1e-2", "model.r/model.alpha": "2/4", "rho": "0"}
    assert len(runs) == 12 + 2 * 2 * 2 + 2 * 5  # both winners have rank 2, so there is no control
    drawn = draw(search.queue.rows, "model.lr", "val_loss", "min").axes[0]
    lines, labels = drawn.get_legend_handles_labels()
    assert labels == ["rho 0", "rho 0.5", "rho 5"]
    assert lines[0].get_color() == COLOURS["LoRA"]
    assert arguments(chosen(search.queue.rows, "min")[WITHOUT]) == ["--model.lr=1e-2", "--model.r=2", "--model.alpha=4"]
    assert answer(search.queue.rows, "min").missing == []
    assert search.seconds_of_a_run() == 36.0


def test_rho_alone_can_be_searched(tmp_path: Path) -> None:
    search, runs = finished(tmp_path, space={}, budget=4)
    assert [search.trials_of(side) for side in SIDES] == [1, 2]
    assert len(runs) == 3 * 3 + 2 * 5
    assert draw(search.queue.rows, "rho", "val_loss", "min").axes[0].get_xlabel() == "rho"
    contrastive = replace(made(tmp_path), options=Options("clip_contrastive"))  # here the data's seed divides the parts
    assert contrastive.arguments({"rho": "0"}, 7) == ["--seed_everything=7", "--rho=0"]


def test_winners_that_differ_in_more_than_rho_have_a_control(tmp_path: Path) -> None:
    search, runs = finished(tmp_path, rank_8=True, budget=12)
    found = answer(search.queue.rows, "min")
    assert found.configs == chosen(search.queue.rows, "min")
    assert found.configs[CONTROL] == {**found.configs[WITH], "rho": "0"} != found.configs[WITHOUT]
    assert len(runs) == 12 + 2 * 2 * 2 + 3 * 5
    assert (found.rival, found.winner) == (WITHOUT, WITH)  # only rank 8 is worse
    for sign in (1, -1):
        values = {CONTROL: {seed: -sign * (1.0 + seed / 1e6) for seed in found.values[WITH]}}
        for side in SIDES:
            values[side] = {seed: sign * value for seed, value in found.values[side].items()}
        against = replace(found, values=values, less_is_better=sign == 1)
        assert against.rival == against.winner == CONTROL
        assert against.verdict().startswith("Don't: it is worse than LoRA with the same other settings, by ")
    assert "with - control, 95 % interval" in found.text("val_loss")


def test_a_round_learns_from_the_rounds_before_it_only(tmp_path: Path) -> None:
    """So workers that race get the same result, and so does a search whose budget is raised."""
    space = {"model.lr": [str(rate) for rate in range(9)], "model.r": ["1", "2"]}
    configs = []
    for trials in (12, 20):
        search, _ = finished(tmp_path, space=space, budget=trials)
        tried = [search.tried(side)[number] for side, number in product(SIDES, range(6))]
        configs.append([row["config"] for row in tried])
    assert configs[0] == configs[1]
    search, done = made(tmp_path, space, budget=20), list[Run]()
    assert [(run.trial, run.side) for run in search.open_runs()[:3]] == [(0, WITHOUT), (0, WITH), (1, WITHOUT)]
    assert len(search.open_runs()) == 2 * ROUND

    def last_ones() -> list[Run]:
        return search.open_runs()[::-1] if len(done) < ROUND else []

    search.queue.work(last_ones, lambda run, trial: search._row(1.0), done.append)
    assert all(run.trial < ROUND for run in [*done, *search.open_runs()])


def test_a_run_has_a_folder_of_its_own() -> None:
    names = set()
    for alpha in ("8/8", "8/16"):
        config = {"model.r/model.alpha": alpha, "model.targets": '["q", "v"]', "rho": "0"}
        names.add(Run(WITHOUT, config, 0, "search", 0).name)
        assert all(re.fullmatch(r"search/[\w.=+-]+/seed-0", name) for name in names)
    assert len(names) == 2


def test_runs_that_diverged_are_no_traceback(tmp_path: Path) -> None:
    search, _ = finished(tmp_path, rank_8=True, budget=12)
    control, lora = "Not known yet: LoRA with the same other settings diverged", "Not known yet: LoRA diverged"
    for side, sentence, winner in ((CONTROL, control, WITHOUT), (WITHOUT, lora, CONTROL), (WITH, "Don't: it", WITHOUT)):
        found = answer(changed(search, **{side: math.inf}), "min")
        assert "nan" in found.text("val_loss")
        assert found.verdict().startswith(sentence)
        assert "in 1 of its 5 final runs." in found.verdict()
        assert found.winner == winner


def test_a_run_that_fails_twice_counts_as_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, _ = finished(tmp_path, budget=4)

    def fails(*_: Any) -> Row:
        raise FailedError(1)

    monkeypatch.setattr("recipes.tune.search.fit", fails)
    config = {"model.lr": "1e-4", "model.r/model.alpha": "8/16"}
    run = Run(WITH, {**config, "rho": "5"}, 7, "search", 3)
    control, final = Run(CONTROL, {**config, "rho": "0"}, 7, "final", -1), run._replace(stage="final", seed=8)
    for each in (run, control):
        search.queue.work(lambda each=each: [each] * (search.queue.find(each) is None), search.perform, print)
        row = search.queue.find(each) or {}
        assert (row["value"], row["metric"], row["seed"]) == (math.inf, "val_loss", 7)
        assert search.queue.failures(each) == 2
    # A winner's settings have worked before, so if its final run fails, there is another reason.
    for _ in range(3):
        with pytest.raises(MisconfigurationException, match="seed 8 has failed, with the error above"):
            search.queue.work(lambda: [final], search.perform, print)


def test_settings_that_are_given_are_not_searched(capsys: pytest.CaptureFixture[str]) -> None:
    options = Options("vqa")
    for given in (["--model.lora.lora_alpha", "8"], ["--model.init_args.lora.r=8"], ["--model.lora={r: 8}"]):
        assert "model.lora.r/model.lora.lora_alpha" not in _space(options, given)
    assert "--model.lora.lora_alpha is given, so model.lora.r/model.lora.lora_alpha is" in capsys.readouterr().out


def test_a_changed_configuration_is_another_search(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("trainer: {max_epochs: 1}")
    options = Options("classification", metric="val_loss", mode="min", folder=tmp_path / "search")
    for _ in range(2):
        _search(options, ["--method=efmlora", f"--config={config}"])
    config.write_text("trainer: {max_epochs: 30}")
    with pytest.raises(MisconfigurationException, match=r"begun with other options: content of .*mine\.yaml was"):
        _search(options, ["--method=efmlora", f"--config={config}"])


def answer_of(without: Sequence[float], perturbed: Sequence[float], less_is_better: bool = True) -> Answer:
    values = {WITHOUT: dict(enumerate(without)), WITH: dict(enumerate(perturbed))}
    configs = {WITHOUT: {"rho": "0"}, WITH: {"rho": "5"}}
    return Answer(configs, values, less_is_better, {WITHOUT: [1.0, 2.0], WITH: [1.0, 2.0]})


def test_the_answer_is_one_sentence_with_its_doubt() -> None:
    better = answer_of([1.0, 1.2, 1.1], [0.5, 0.71, 0.6])
    assert better.verdict().startswith("Use it, with rho=5: it is better than LoRA, by 0.482 to 0.511 (95 %")
    assert better.winner == WITH
    assert answer_of([1.0, 1.2, 1.1], [0.5, 0.71, 0.6], less_is_better=False).verdict().startswith("Don't: it is worse")
    unknown = answer_of([1.0, 1.2, 1.1], [1.1, 1.0, 1.2])
    assert unknown.verdict().startswith("Not known yet: it is between ")
    assert unknown.winner == WITHOUT
    # If it is clearly worse than LoRA, the comparison with the control doesn't matter.
    worse = answer_of([1.0, 1.2, 1.1], [1.2, 1.4, 1.31])
    values = {**worse.values, CONTROL: {0: 0.1, 1: 3.2, 2: 0.1}}
    worse = replace(worse, configs={**worse.configs, CONTROL: {}}, values=values)
    assert worse.verdict().startswith("Don't: it is worse than LoRA, by ")


def test_equal_values_are_no_certainty() -> None:
    for without, perturbed in (([0.5, 0.5], [0.7, 0.7]), ([0.7, 0.7], [0.5, 0.5]), ([0.5, 0.6], [0.4, 0.4])):
        equal = answer_of(without, perturbed)
        assert re.match(
            r"No answer: all 2 final runs w.* gave 0.[457]. The seeds change nothing: check", equal.verdict()
        )
        assert equal.winner == WITHOUT
    diverged = answer_of([0.5, 0.6, 0.7], [0.4, 0.4, math.inf])
    assert diverged.verdict().startswith("Don't: it diverged in 1 of its 3 final runs")
    chance = replace(answer_of([1.0, 1.2, 1.1], [0.5, 0.71, 0.6]), trials={WITH: [0.5, 0.5, math.inf, 0.5]})
    assert chance.verdict().startswith("No answer: all 3 trials gave 0.5. Nothing was learnt: train longer")


def test_an_answer_tells_how_much_was_tried(tmp_path: Path) -> None:
    search, _ = finished(tmp_path, budget=8)
    found = answer(search.queue.rows, "min")
    worse = replace(found, less_is_better=not found.less_is_better)
    assert worse.verdict().endswith("(95 % interval), with the best of the 4 settings tried.")


@pytest.mark.parametrize("is_proven", [True, False])
def test_a_failure_is_no_divergence(
    is_proven: bool, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    done = 0

    def run_here(command: Sequence[str]) -> None:
        nonlocal done
        done += 1
        if not is_proven or done == 2:
            raise FailedError(2)
        fitted = {"monitor": "val_score", "mode": "max", "validations": [{"val_score": 0.25}], "training_seconds": 1.0}
        folder = Path(option(command, "--trainer.callbacks.folder") or "")
        folder.mkdir(parents=True)
        (folder / "fit.json").write_text(json.dumps(fitted))

    monkeypatch.setattr("recipes.studies.process.run_process", run_here)
    given = [*options, "--metric=val_score", "--mode=max"]
    if not is_proven:
        assert main(given) == 2
        assert "The first run has failed, with the error above: fix its cause" in capsys.readouterr().out
        return
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent))  # for the process that prints settings
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "has failed, with the error above" in out
    assert "counts as diverged" not in out
    assert "seed 0: val_score 0.25" in out
    assert "No answer: all 4 trials gave 0.25" in out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["vqa", "--rho", "-1"], r"different numbers above 0, got \[-1.0\]"),
        (["vqa", "--rho", "1", "1"], "different numbers"),
        (["vqa", "--budget", "2"], "--budget must be at least 4 and --fresh 2, got 2 and 5"),
        (["vqa", "--fresh", "1"], "--fresh 2, got 20 and 1"),
        (["vqa", "--search", "a/b", "1/2", "3"], "different values, each with 2 parts, got"),
        (["vqa", "--search", "a", "1", "1"], "--search a must have different values"),
        (["vqa", "--search", "a"], "--search a must have different values"),
        (["vqa", "--search", "a", "1", "--search", "b/a", "1/2"], "--search names an option once"),
        (["vqa", "--search", "rho", "1", "2"], "never rho"),
        (["json.tool", "--search", "a", "1", "2", "--a=1"], "json.tool is not a recipe.* say what is searched"),
        (["vqa", "--optimizer", "SGD"], "--optimizer has its own rate"),
        (["vqa", "--data.seed", "1"], "--data.seed is set by the search"),
        (["vqa", "--metric", "val_perplexity"], "--metric and --mode go together"),
        (["my_project.train", "--search", "a", "1"], "say what is judged, as in --metric val_loss"),
        (["no_recipe"], "no_recipe is not a recipe: there are classification.*say what is searched"),
    ],
)
def test_wrong_options_are_refused_before_the_first_run(wrong: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        main(wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_of_the_recipe_is_refused_before_the_first_run(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent))
    with pytest.raises(MisconfigurationException, match=r"(?s)the options of classification fit are wrong:.*max_stepz"):
        main([*options, "--trainer.max_stepz=3"])
    assert not (tmp_path / "search").exists()
