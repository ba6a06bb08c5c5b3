"""``python -m recipes.clip_fewshot fit|validate|test|predict --config FILE``."""

from recipes.shared.cli import RecipeCLI
from recipes.shared.mistakes import without_traceback

if __name__ == "__main__":
    with without_traceback():
        RecipeCLI(recipe="clip_fewshot")
