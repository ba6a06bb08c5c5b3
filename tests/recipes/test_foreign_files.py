"""Whatever is done to a real file of each kind, reading it ends in data or in words for the user."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from one_command import ParsingCLI
from peft import LoraConfig

from recipes.command_line.checkpoints import differing_settings
from recipes.command_line.configs import written_settings
from recipes.command_line.model_card import model_card
from recipes.command_line.taken import taken
from recipes.report.adapters import base_and_task
from recipes.tune.answer import answer
from recipes.tune.verdict import Options, _of_files, _rows

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # means of losses near 1e308

PIECES = [
    *(
        b"[" * 99,
        b"[" * 5000,
        b"{",
        b"}",
        b"]",
        b'"',
        b"'",
        b":",
        b"- ",
        b"\n",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xf0",
    ),
    *(b"NaN", b"1e999", b"-1", b"9" * 5000, b"null", b"~", b"!!binary x", b"!!bool x", b"!!timestamp x", b"!!set {a}"),
    *(b"&a [*a]", b"*a", b"<<: {a: 1}", b"\\ud800", b"\\u0000", b"? ", b"2026-13-45", b"# ", b"\t", b"---\n", b"|\n"),
]
ODD = [None, True, -1, 0, 1.5, 1e308, float("nan"), float("inf"), 10**30, "", "x", "\0", "../x", "a/b", [], [[1]], {}]
ODD += [{"a": {"b": [1, None]}}, {"class_path": 3, "init_args": [1]}, [{"class_path": "torch.optim.SGD"}], "x" * 5000]


def of(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a value, as the list or dict that holds it and the key there."""
    keys: Any = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    places = []
    for key in keys:
        places += [(value, key), *of(value[key])]
    return places


@st.composite
def damaged(draw: Any, good: str, load: Callable[[str], Any] | None, dump: Callable[[Any], str]) -> bytes:
    """A real file with some of its values and then some of its bytes replaced."""
    content = good.encode()
    if load is not None:
        value = load(good)
        for _ in range(draw(st.integers(0, 2))):
            part, key = draw(st.sampled_from(of(value)))
            part[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        content = dump(value).encode()
    for _ in range(draw(st.integers(0, 2))):
        first = draw(st.integers(0, len(content)))
        last = min(len(content), first + draw(st.sampled_from([0, 0, 1, 1, 20, 10**6])))
        piece = draw(st.sampled_from([*PIECES, content[:300]]) | st.binary(max_size=2))
        content = content[:first] + piece + content[last:]
    return content


def ends_well(good: str, load: Any, dump: Any, path: Path, read: Callable[[], Any]) -> None:
    """Read the good file, and many damaged ones; another exception than ours fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(good)
    read()
    ended = set()

    @settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(damaged(good, load, dump))
    def end(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read()
            ended.add("data")
        except MisconfigurationException:
            ended.add("words")

    end()
    assert ended == {"data", "words"}


def test_an_adapters_configuration(tmp_path: Path) -> None:
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], base_model_name_or_path="x").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    folder: Any = SimpleNamespace(path=tmp_path)
    options: Any = SimpleNamespace(base=None)
    ends_well(path.read_text(), json.loads, json.dumps, path, lambda: base_and_task(folder, options))


def test_a_runs_settings(tmp_path: Path, command_line: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParsingCLI, "_run_subcommand", lambda self, name: None)
    line = ParsingCLI(["fit", "--method=efmlora", "--data.dataset=a/b"], recipe="classification")
    written = line._parser("fit").dump(line.config["fit"], skip_none=False)

    def read() -> None:
        run = written_settings(tmp_path / "checkpoints" / "last.ckpt")
        found, _ = taken(run)
        yaml.safe_dump(found)
        differing_settings(found, found)
        str(model_card("x", {"r": 1}, run, "text-classification", "peft"))

    ends_well(written, yaml.safe_load, yaml.safe_dump, tmp_path / "config.yaml", read)


ROWS: list[Any] = []
for number in range(4):
    ROWS.append(
        {"seed": number % 2, "rho": 0.1 * (number // 2), "opt.lr": 1e-2, "State": "finished", "val_loss": number}
    )
FRAME = pandas.DataFrame(ROWS)


def judge(source: Path) -> Callable[[], None]:
    def read() -> None:
        options = Options(str(source))
        answer(_rows(_of_files(options, "min"), options, "min"), "min").text("val_loss")

    return read


def lines(rows: Any) -> str:
    return "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize(
    ("ending", "good", "load", "dump"),
    [
        ("json", json.dumps(ROWS), json.loads, json.dumps),
        ("jsonl", lines(ROWS), lambda text: [json.loads(line) for line in text.split("\n")], lines),
        ("csv", FRAME.to_csv(index=False), None, None),
    ],
)
def test_a_table_of_a_sweep(ending: str, good: str, load: Any, dump: Any, tmp_path: Path) -> None:
    path = tmp_path / f"sweep.{ending}"
    ends_well(good, load, dump, path, judge(path))


@pytest.mark.parametrize("name", [".hydra/overrides.yaml", "metrics.csv"])
def test_a_folder_of_hydra(name: str, tmp_path: Path) -> None:
    for row in ROWS:
        folder = tmp_path / f"{row['seed']}-{row['rho']}"
        (folder / ".hydra").mkdir(parents=True)
        given = [f"seed={row['seed']}", f"+callbacks.rho={row['rho']}", "optimizer.lr=1e-2", "~logger"]
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(given))
        (folder / "metrics.csv").write_text(f"step,val_loss\n1,2.0\n2,\n3,{row['val_loss']}\n")
    load, dump = (yaml.safe_load, yaml.safe_dump) if name.endswith("yaml") else (None, None)
    ends_well((folder / name).read_text(), load, dump, folder / name, judge(tmp_path))
