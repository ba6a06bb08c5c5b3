"""One workload at several shares of replaced labels: whose settings are taken, and what the report shows."""

from pathlib import Path

import pytest
from evidence_runs import SETTINGS, Fake

from recipes.evidence import __main__ as command
from recipes.evidence import commands
from recipes.evidence.run import Run
from recipes.evidence.workloads import SEARCHED_AS, WORKLOADS
from recipes.shared.ledger import Row

TINY = {name: value for name, value in SETTINGS.items() if name != "precision"}
SHARES = {"w2_no_noise": 0.0, "w2_20_noise": 0.2, "w2": 0.4, "w2_60_noise": 0.6}
REAL = dict(WORKLOADS)  # before the tests put tiny ones in their place


@pytest.fixture(autouse=True)
def tiny(evidence: None, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_only_the_noise_differs_between_the_real_workloads() -> None:
    assert {name: REAL[name]["noise"] for name in SHARES} == SHARES
    assert REAL["w2_similar"] == {**REAL["w2"], "noise_to": "most_similar"}
    for name, searched_as in SEARCHED_AS.items():
        if name != "w2_similar":
            assert {**REAL[name], "noise": REAL[searched_as]["noise"]} == REAL[searched_as]
