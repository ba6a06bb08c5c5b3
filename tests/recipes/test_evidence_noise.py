"""One workload at several shares of replaced labels: whose settings are taken, and what the report shows."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the recipes' dependencies are not installed")

from evidence_runs import SETTINGS, Fake, install

from recipes.evidence import __main__ as command
from recipes.evidence import commands
from recipes.evidence.noise_report import accuracy, noise_figure, noise_tables
from recipes.evidence.run import Run
from recipes.evidence.workloads import SEARCHED_AS, WORKLOADS
from recipes.shared.ledger import Row

TINY = {name: value for name, value in SETTINGS.items() if name != "precision"}
SHARES = {"w2_no_noise": 0.0, "w2_20_noise": 0.2, "w2": 0.4, "w2_60_noise": 0.6}
REAL = dict(WORKLOADS)  # before the tests put tiny ones in their place


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    for name, share in SHARES.items():
        monkeypatch.setitem(command.WORKLOADS, name, {**TINY, "noise": share, "judged": "best"})


class FakeNoise(Fake):
    """The last step is worse than the best by the share of replaced labels; seed 1 of LoRA has failed.

    Noise of similar classes costs 10 points.
    """

    def __call__(self, run: Run, folder: Path | None = None) -> Row:
        row = super().__call__(run, folder)
        if run.stage == "search":
            return row
        if (run.arm, run.seed) == ("lora", 1):
            return row | {"failed": True, "test_accuracy": row["chance"], "test_loss": None}
        if "noise_to" in run.settings:
            row["test_accuracy"] -= 0.1
        lost = run.settings["noise"] / 2
        row["at_end"] = {"test_accuracy": row["test_accuracy"] - lost, "test_loss": row["test_loss"] + lost}
        return row


def options_of(workload: str, folder: Path) -> list[str]:
    options = ["--workload", workload, "--folder", str(folder), "--precision", "32-true"]
    return [*options, "--methods", "lora", "efmlora", "rank_2", "--seeds", "0", "1", "2"]


def test_other_shares_take_the_settings_of_the_workloads_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeNoise(gain=0.05)
    monkeypatch.setattr(commands, "perform", fake)
    assert command.main(["run", *options_of("w2_20_noise", tmp_path)]) == 0
    searched = [run for run in fake.done if run.stage == "search"]
    tested = [run for run in fake.done if run.stage == "test"]
    assert {run.workload for run in searched} == {"w2"}
    assert {run.settings["noise"] for run in searched} == {0.4}
    assert {run.workload for run in tested} == {"w2_20_noise"}
    assert len(tested) == 9
    # Its own workload finds the searches done.
    fake.done.clear()
    for workload in ("w2", "w2_no_noise", "w2_60_noise"):
        assert command.main(["run", *options_of(workload, tmp_path)]) == 0
    assert {run.stage for run in fake.done} == {"test"}
    assert {run.workload for run in fake.done} == set(SHARES) - {"w2_20_noise"}

    capsys.readouterr()
    assert command.main(["report", *options_of("w2", tmp_path)]) == 0
    text = (tmp_path / "w2.md").read_text()
    assert "w2, test accuracy in %, best on validation" in text
    assert "w2, test accuracy in %, last step" in text
    assert "| arm | 0 % | minus LoRA's | 20 % | minus LoRA's | 40 % | minus LoRA's | 60 % | minus LoRA's |" in text
    assert (tmp_path / "w2_noise.png").stat().st_size > 10_000
    # A workload that takes another one's settings shows its own share alone.
    assert command.main(["report", *options_of("w2_60_noise", tmp_path)]) == 0
    assert not (tmp_path / "w2_60_noise_noise.png").exists()


def test_a_picture_needs_two_shares_and_a_table_one() -> None:
    best, last = {"test_accuracy": 0.5, "test_loss": 2.0}, {"test_accuracy": 0.4, "test_loss": 3.0}
    rows = {"lora": [{"seed": 0, "settings": {"noise": 0.4}, **best, "at_end": last}]}
    first, second, losses = noise_tables("w2", rows)
    assert (first.rows, second.rows) == ([["LoRA", "50.0 (1)", ""]], [["LoRA", "40.0 (1)", ""]])
    assert losses.rows == [["LoRA", "2.000 → 3.000"]]
    assert noise_figure("w2", rows) is None
    assert noise_tables("w2", {}) == []


def test_an_arm_with_a_single_seed_is_in_the_table_and_not_in_the_picture() -> None:
    rows: dict[str, list[Any]] = {"lora": [], "efmlora": []}
    for arm, seed in (("lora", 0), ("lora", 1), ("efmlora", 0)):
        for noise in (0.0, 0.4):
            best = {"test_accuracy": 0.5 + 0.1 * seed, "test_loss": 2.0}
            rows[arm].append({"seed": seed, "settings": {"noise": noise}, **best, "at_end": best})
    assert [line[0] for line in noise_tables("w2", rows)[0].rows] == ["LoRA", "EFMLoRA"]
    figure = noise_figure("w2", rows)
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LoRA"]


def test_an_arm_that_was_run_at_one_share_alone_is_drawn_there() -> None:
    rows: dict[str, list[Any]] = {"lora": [], "rank_2": []}
    for seed in (0, 1):
        for arm, noise in (("lora", 0.0), ("lora", 0.4), ("rank_2", 0.4)):
            best = {"test_accuracy": 0.5 + 0.1 * seed, "test_loss": 2.0}
            rows[arm].append({"seed": seed, "settings": {"noise": noise}, **best, "at_end": best})
    figure = noise_figure("w2", rows)
    assert figure is not None
    for axes in figure.axes:
        assert [len(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "o"] == [2, 1]


def test_both_moments_of_a_run_are_told_apart_and_failed_runs_have_one() -> None:
    settings = {"noise": 0.2}
    row = {"seed": 3, "settings": settings, "test_accuracy": 0.5, "at_end": {"test_accuracy": 0.4}}
    failed = {"seed": 4, "settings": settings, "test_accuracy": 0.1}
    other = {"seed": 3, "settings": {"noise": 0.6}, "test_accuracy": 0.3}
    of_share = partial(accuracy, [row, failed, other], 0.2)
    assert of_share(moment="best") == pytest.approx({3: 50.0, 4: 10.0})
    assert of_share(moment="last") == pytest.approx({3: 40.0, 4: 10.0})


def test_noise_of_another_kind_is_in_no_other_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**TINY, "noise": 0.4, "judged": "best", "noise_to": "most_similar"}
    monkeypatch.setitem(command.WORKLOADS, "w2_similar", settings)
    monkeypatch.setattr(commands, "perform", FakeNoise(gain=0.05))
    for workload in ("w2", "w2_similar"):
        assert command.main(["run", *options_of(workload, tmp_path)]) == 0
    for workload, accuracy_of_efmlora in (("w2", 56.0), ("w2_similar", 46.0)):
        assert command.main(["report", *options_of(workload, tmp_path)]) == 0
        assert f"| EFMLoRA | {accuracy_of_efmlora} ± 0.6 (3) |" in (tmp_path / f"{workload}.md").read_text()


def test_only_the_noise_differs_between_the_real_workloads() -> None:
    assert {name: REAL[name]["noise"] for name in SHARES} == SHARES
    assert REAL["w2_similar"] == {**REAL["w2"], "noise_to": "most_similar"}
    for name, searched_as in SEARCHED_AS.items():
        if name != "w2_similar":
            assert {**REAL[name], "noise": REAL[searched_as]["noise"]} == REAL[searched_as]
