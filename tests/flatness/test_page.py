"""What docs/flatness.md says works: the snippets run, functions, measures and tests exist."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml
from helpers import since_lightning

from lightning_flatlora import flatness
from recipes.shared.cli import RecipeCLI
from recipes.shared.configs import config_files

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = (ROOT / "docs" / "flatness.md").read_text()
TABLE = [line for line in PAGE.splitlines() if line.startswith("| ")]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


ROWS = [cells(line) for line in TABLE[1:]]


def test_the_configuration_suits_the_recipe_that_it_can_be_pasted_into() -> None:
    base, overlay = config_files("instruction_tuning", "efmlora")
    recipe, method = yaml.safe_load(base.read_text()), yaml.safe_load(overlay.read_text())
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    pasted, monitor = yaml.safe_load(text)["trainer"]["callbacks"]
    (ema,) = method["trainer"]["callbacks+"]
    assert pasted["class_path"] == ema["class_path"]
    assert pasted["init_args"]["rho"] == ema["init_args"]["rho"]
    data = recipe["data"]["init_args"]
    questions = 1221 * (1 - data["validation_share"] - data["test_share"])  # of packaged:commonsense_qa
    steps = recipe["trainer"]["max_epochs"] * questions / data["batch_size"]
    assert 2 <= steps // monitor["init_args"]["every_n_steps"] <= 10


@since_lightning("2.6.0", "Lightning 2.5.0 prints no configuration with the jsonargparse of today")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["flatness.md", "baselines.md", "recipes/instruction_tuning.md"])
def test_callbacks_that_a_command_adds_leave_the_configurations(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / name).read_text().replace("\\\n", "")
    for variable, value in re.findall(r"^(\w+)=(.+)$", text, re.MULTILINE):
        text = text.replace(f"${variable}", value.strip("\"'"))
    (command,) = re.findall(r"python -m recipes.instruction_tuning (fit .*callbacks\+=[^`\n]*)", text)
    arguments = shlex.split(command, comments=True)
    with pytest.raises(SystemExit):
        RecipeCLI(args=[*arguments, "--print_config"])
    made = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    kept = []
    for option, path in itertools.pairwise(arguments):
        if option == "--config":
            trainer = yaml.safe_load(Path(path).read_text())["trainer"]
            kept += trainer.get("callbacks", []) + trainer.get("callbacks+", [])
    assert [one["class_path"] for one in made[: len(kept)]] == [one["class_path"] for one in kept]
    added = re.findall(r"callbacks\+=(?:\w+\.)*(\w+) --trainer.callbacks.rho=(\S+)", command)
    assert [(one["class_path"].split(".")[-1], str(one["init_args"]["rho"])) for one in made[len(kept) :]] == added


def test_the_table_names_what_exists_and_all_of_it() -> None:
    assert [row[0].strip("`") for row in ROWS if row[0]] == list(flatness.MEASURES)
    for row in ROWS:
        assert hasattr(flatness, row[5].strip("`")), row
        file, test = row[7].strip("`").split("::")
        assert f"def {test}(" in (HERE / file).read_text(), row
