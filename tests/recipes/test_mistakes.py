"""A user's mistake ends a command with a message, and without a traceback."""

import runpy

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.command_line.mistakes import mistake_behind, without_traceback

# Another test may already have imported the `__main__` of a command that is run here.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")

NO_SPLIT = "^Error: .*has no split[^\n]*$"
MISTAKES = [
    ("classification", ["fit", "TINY", "--data.dataset=mine.csv", "--data.validation_split=validation"], NO_SPLIT),
    ("nlg", ["fit", "TINY", "--data.dataset=mine.txt", "--data.test_split=test"], NO_SPLIT),
    ("nlg", ["test", "TINY", "--data.dataset=mine.txt", "--ckpt_path=gone.ckpt"], "gone.ckpt: there is no such file"),
]
for name in ("classification", "instruction_tuning", "nlg"):
    MISTAKES.append((name, ["fit"], "no model: give a name on the Hub or a folder as --model.model, or 'packaged"))
    MISTAKES.append((name, ["fit", "TINY"], "no data: give a file ending in .* as --data.dataset"))


@pytest.mark.usefixtures("command_line", "own_datasets")
@pytest.mark.parametrize(("recipe", "given", "message"), MISTAKES)
def test_a_mistake_ends_a_command_with_a_sentence(
    recipe: str, given: list[str], message: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [each.replace("TINY", f"--model.model={tiny}") for each in given]
    monkeypatch.setattr("sys.argv", [recipe, *arguments, "--trainer.accelerator=cpu"])
    with pytest.raises(SystemExit, match=message):
        runpy.run_module(f"recipes.{recipe}", run_name="__main__")


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a defect"), without_traceback():
        raise RuntimeError("a defect")


def test_what_another_library_has_wrapped_is_found() -> None:
    outer = ValueError("many lines")
    outer.__cause__ = MisconfigurationException("set rho")
    assert str(mistake_behind(outer)) == "set rho"
