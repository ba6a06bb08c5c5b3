"""``python -m recipes.clip_contrastive fit|validate|test --config FILE``."""

from recipes.cli import RecipeCLI

if __name__ == "__main__":
    RecipeCLI()
