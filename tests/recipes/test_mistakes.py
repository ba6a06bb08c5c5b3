"""A mistake of the user's ends a command with its message, and without a traceback."""

import runpy

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import packaged_arguments

from recipes.shared.configs import config_arguments
from recipes.shared.mistakes import mistake_behind, without_traceback

# Another test may have imported a command's `__main__` before it is run here as the command.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")

MISTAKES = {
    "classification": ["fit", "--data.dataset=mine.csv", "--data.validation_split=validation"],
    "nlg": ["fit", "--data.dataset=mine.txt", "--data.test_split=test"],
}


@pytest.mark.usefixtures("command_line")
@pytest.mark.parametrize("recipe", MISTAKES)
def test_a_split_that_a_file_does_not_have_is_found_before_training(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, *options = MISTAKES[recipe]
    monkeypatch.setattr("sys.argv", [recipe, command, *packaged_arguments(recipe), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"recipes.{recipe}", run_name="__main__")
    message = str(ended.value)
    assert message.startswith("Error: ")
    assert "is a file, and has no split" in message
    assert "\n" not in message


@pytest.mark.usefixtures("command_line", "own_datasets")
@pytest.mark.parametrize("recipe", ["classification", "instruction_tuning", "nlg"])
def test_the_base_says_what_it_lacks(recipe: str, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["fit", *config_arguments(recipe, "lora"), "--trainer.accelerator=cpu"]
    for given, message in (
        ([], "no model: give a name on the Hub or a folder as --model.model, or 'packaged"),
        ([f"--model.model={tiny}"], "no data: give a file ending in .* as --data.dataset"),
    ):
        monkeypatch.setattr("sys.argv", [recipe, *base, *given])
        with pytest.raises(SystemExit, match=message):
            runpy.run_module(f"recipes.{recipe}", run_name="__main__")


@pytest.mark.usefixtures("command_line")
def test_a_missing_checkpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["test", *packaged_arguments("classification"), "--ckpt_path=gone.ckpt"]
    monkeypatch.setattr("sys.argv", ["classification", *arguments])
    with pytest.raises(SystemExit, match=r"^Error: --ckpt_path gone.ckpt: there is no such file$"):
        runpy.run_module("recipes.classification", run_name="__main__")


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a defect"), without_traceback():
        raise RuntimeError("a defect")


def test_what_another_library_has_wrapped_is_found() -> None:
    outer = ValueError("many lines")
    outer.__cause__ = MisconfigurationException("set rho")
    assert str(mistake_behind(outer)) == "set rho"
