"""Command lines of programs: lists, switches, what is passed on, and what is refused."""

from dataclasses import dataclass, field

import pytest

from recipes.command_line.options import parse_known_options, parse_options


@dataclass
class Options:
    """Some options.

    Attributes:
        table: the name of a table.
        search: an option and its values.
        rho: given as texts.
        seeds: given as numbers.
        plan: do nothing.
    """

    table: str
    search: list[list[str]] = field(default_factory=list)
    rho: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    plan: bool = False


def test_lists_switches_and_what_is_handed_on() -> None:
    given = "table1 --search lr 1e-4 --seeds 13 21 --model.lr 2 --plan --search r/a 2/4 --rho 0.50 --data.x=[1,2]"
    options, others = parse_known_options(Options, given.split(), "program", None)
    assert options == Options("table1", [["lr", "1e-4"], ["r/a", "2/4"]], ["0.50"], [13, 21], True)
    assert others == ["--model.lr", "2", "--data.x=[1,2]"]


@pytest.mark.parametrize("given", [["--seeds=13"], ["--seeds", "13"]])
def test_a_list_of_one(given: list[str]) -> None:
    assert parse_options(Options, ["--table=a", "--plan=false", *given], "program", None) == Options("a", seeds=[13])


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--tabel=a"], "table"), (["--table=a", "--seeds=x"], "Got value: x"), (["--table=a", "--sed=1"], "--sed=1")],
)
def test_what_is_wrong_is_named(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(Options, given, "program", None)
    assert said in capsys.readouterr().err


def test_the_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_known_options(Options, ["--help"], "python -m program", "Do something.")
    said = capsys.readouterr().out
    assert "usage: python -m program" in said
    assert "an option and its values." in said
