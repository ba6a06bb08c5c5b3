"""The shipped YAML files: every combination can be loaded, and an overlay changes only what it names."""

import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from one_command import ParsingCLI
from recipe_runs import STRATEGIES, config_arguments

from recipes.command_line.arguments import taken_apart
from recipes.command_line.configs import RECIPES, methods_of

ROOT = RECIPES.parent
FILES = sorted(RECIPES.glob("**/configs/**/*.yaml"))
NAMES = [path.parent.parent.name for path in FILES if path.name == "base.yaml"]
OVERLAYS = []
for name in NAMES:
    OVERLAYS += [(name, method) for method in methods_of(name) if method not in ("lora", "full")]
RHO = {"vqa": 0.2}
"""The recipes whose radius is another one than the 0.05 of the shared overlays."""

Parse = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def parse() -> Iterator[Parse]:
    """A function that gives the settings which the real parser makes of arguments, by dotted names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["test"])  # LightningCLI warns if there are arguments besides those it is given
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # caused by Lightning
        patch.chdir(ROOT)
        cli = ParsingCLI(config_arguments(NAMES[0], "lora"), run=False)  # once, because building a parser takes longest

        @cache
        def settings(arguments: tuple[str, ...]) -> dict[str, Any]:
            cli.parse_arguments(cli.parser, list(arguments))
            cli.before_instantiate_classes()
            return flat(yaml.safe_load(cli.parser.dump(cli.config, skip_none=False)))

        yield lambda arguments: dict(settings(tuple(arguments)))


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; callbacks and loggers, which are lists, by their class names."""
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
    """The settings that are new or have changed."""
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
    assert changed[f"{owner}rho"] == RHO.get(recipe, 0.05)
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
    if overlay.stem == "wandb":  # in addition to the other loggers
        assert set(plain) < set(made)
        assert changed["trainer.logger.WandbLogger.init_args.name"] == "efmlora"


# -- the commands in the files and on the pages


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The recipe and the arguments of each ``fit`` in a comment, which may span several lines."""
    found = re.findall(r"python -m recipes\.(\w+) fit (.*)", re.sub(r"\\\n#", "", text))
    return [(recipe, shlex.split(line, comments=True)) for recipe, line in found]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_the_commands_in_a_file_load_it(path: Path, parse: Parse) -> None:
    found = commands(path.read_text(encoding="utf-8"))
    assert found
    for recipe, arguments in found:
        complete = taken_apart(recipe, arguments).arguments({})
        assert path in [Path(each.removeprefix("--config=")).resolve() for each in complete]
        parse([each for each in complete if not each.startswith("--method")])
