"""`python -m recipes.nlg.export ADAPTER FOLDER`: a plain transformers model with the adapter merged in."""

from jsonargparse import auto_cli

from recipes.language.export import main
from recipes.shared.mistakes import without_traceback

if __name__ == "__main__":
    with without_traceback():
        auto_cli(main, prog="python -m recipes.nlg.export")
