"""``python -m recipes.vqa fit|validate|test|predict --config FILE``."""

from recipes.cli import RecipeCLI

if __name__ == "__main__":
    RecipeCLI()
