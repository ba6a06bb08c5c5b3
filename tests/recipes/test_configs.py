"""The shipped YAML files: every combination is loaded, and an overlay changes what it names and nothing else."""

import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from one_command import ParsingCLI
from recipe_runs import STRATEGIES, config_arguments

from recipes.shared.cli import RecipeCLI
from recipes.shared.configs import RECIPES, methods_of, shipped_configs

ROOT = RECIPES.parent
FILES = sorted(RECIPES.rglob("*.yaml"))
NAMES = [path.parent.parent.name for path in FILES if path.name == "base.yaml"]
OVERLAYS = []
for name in NAMES:
    OVERLAYS += [(name, method) for method in methods_of(name) if method not in ("lora", "full")]
RHO = {"vqa": 0.2}
"""The recipes whose radius is another one than the 0.03 of the shared overlays."""

Parse = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def parse() -> Iterator[Parse]:
    """A function from arguments to the settings that the real parser makes of them, by dotted names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["test"])  # LightningCLI warns of other arguments beside its own
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it
        patch.chdir(ROOT)
        cli = ParsingCLI(config_arguments(NAMES[0], "lora"), run=False)  # once, because to make a parser takes longest

        @cache
        def settings(arguments: tuple[str, ...]) -> dict[str, Any]:
            cli.parse_arguments(cli.parser, list(arguments))
            cli.before_instantiate_classes()
            return flat(yaml.safe_load(cli.parser.dump(cli.config, skip_none=False)))

        yield lambda arguments: dict(settings(tuple(arguments)))


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; callbacks and loggers, which are lists, by the names of their classes."""
    children = value
    if isinstance(value, list):
        children = {}
        for item in value:
            if isinstance(item, dict):
                children[item["class_path"].split(".")[-1]] = item
    if not isinstance(children, dict) or not children:
        return {name: value}
    settings = {}
    for key, child in children.items():
        settings.update(flat(child, f"{name}.{key}" if name else key))
    return settings


def changes(plain: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """The settings that are new or other ones than before."""
    return {name: value for name, value in made.items() if name not in plain or plain[name] != value}


# -- every combination


@pytest.mark.parametrize(("recipe", "method"), OVERLAYS)
def test_a_method_changes_what_its_overlay_names_and_nothing_else(recipe: str, method: str, parse: Parse) -> None:
    plain, made = parse(config_arguments(recipe, "lora")), parse(config_arguments(recipe, method))
    lost, changed = set(plain) - set(made), changes(plain, made)
    names = [name for name in plain if re.fullmatch(r"run_name|trainer\.logger\.\w+\.init_args\.name", name)]
    assert len(names) > 1
    for name in names:
        assert (plain[name], changed.pop(name)) == ("lora", method)
    assert not lost
    (callback,) = {name.split(".")[2] for name in changed}
    assert callback.lower() == method
    owner = f"trainer.callbacks.{callback}.init_args."
    assert changed.pop(f"trainer.callbacks.{callback}.class_path") == f"lightning_flatlora.{callback}"
    assert changed.get(f"{owner}beta", 0.9) == 0.9
    assert changed[f"{owner}rho"] == RHO.get(recipe, 0.03)
    assert not [name for name in changed if not name.startswith(owner) or name in plain]


@pytest.mark.parametrize(
    ("overlay", "part"),
    [
        *((path, "trainer.strategy") for path in sorted(STRATEGIES.glob("*.yaml"))),
        (RECIPES / "configs" / "loggers" / "wandb.yaml", "trainer.logger.WandbLogger."),
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", NAMES)
def test_a_strategy_or_a_logger_changes_nothing_else(recipe: str, overlay: Path, part: str, parse: Parse) -> None:
    arguments = config_arguments(recipe, "efmlora")
    plain, made = parse(arguments), parse([*arguments, f"--config={overlay}"])
    changed = changes(plain, made)
    assert changed
    assert all(name.startswith(part) for name in changed)
    if overlay.stem == "wandb":  # beside the other loggers
        assert set(plain) < set(made)
        assert changed["trainer.logger.WandbLogger.init_args.name"] == "efmlora"


# -- the commands in the files and on the pages


def commands(text: str) -> list[list[str]]:
    """Arguments of the recipes' ``fit`` in a comment, which may go over several lines."""
    joined = re.sub(r"\\\n#", "", text)
    return [shlex.split(line, comments=True) for line in re.findall(r"python -m recipes\.\w+ fit (.*)", joined)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_the_commands_in_a_file_load_it(path: Any, parse: Parse) -> None:
    found = commands(path.read_text(encoding="utf-8"))
    assert found
    for arguments in found:
        assert str(path.relative_to(ROOT)) in arguments
        parse(arguments)


def test_the_pages_name_files_that_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for name in re.findall(r"recipes/[\w/]+\.yaml", page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page}: {name}"


# -- what users see


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--help"], "--run_name"),
        (["fit"], "the following arguments are required"),
        (["fit", "--config=recipes/vqa/configs/efmlora.yaml"], "File does not exist"),
    ],
)
def test_help_and_errors_name_the_shipped_files(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        RecipeCLI(arguments)
    shown = "".join(capsys.readouterr())
    assert said in shown
    assert shown.endswith(f"{shipped_configs('')}\n")
    with pytest.raises(SystemExit):
        RecipeCLI(["--help"], recipe="vqa")
    assert "recipes/vqa/configs" in (own := capsys.readouterr().out)
    assert "recipes/nlg" not in own
    for path in FILES:
        assert path.name in shown
        assert str(path.parent.relative_to(ROOT)) in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no settings"),
        ("# trainer:\n#   max_epochs: 3\n", "holds no settings"),
        ("trainer:\n\tmax_epochs: 3\n", r"is no YAML: (?s:.)*line 2"),
    ],
)
def test_a_configuration_that_can_not_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    """Of several files the parser does not say which one it means."""
    broken = tmp_path / "mine.yaml"
    broken.write_text(text)
    for given in (["--config", str(broken)], [f"--config={broken}"]):
        with pytest.raises(MisconfigurationException, match=f"--config {broken} {message}"):
            RecipeCLI(["fit", *given], recipe="classification")
