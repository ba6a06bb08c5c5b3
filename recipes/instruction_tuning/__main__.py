"""``python -m recipes.instruction_tuning fit|validate|test|predict --config FILE``."""

from recipes.cli import RecipeCLI

if __name__ == "__main__":
    RecipeCLI()
