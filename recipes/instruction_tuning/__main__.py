"""``python -m recipes.instruction_tuning fit|validate|test|predict --config FILE``."""

from recipes.command_line.cli import RecipeCLI
from recipes.command_line.mistakes import without_traceback

if __name__ == "__main__":
    with without_traceback():
        RecipeCLI(recipe="instruction_tuning")
