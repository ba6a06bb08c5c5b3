"""`python -m recipes.instruction_tuning.export ADAPTER FOLDER`: a plain transformers model, without peft."""

from jsonargparse import auto_cli

from recipes.language.export import main
from recipes.shared.mistakes import without_traceback

if __name__ == "__main__":
    with without_traceback():
        auto_cli(main, prog="python -m recipes.instruction_tuning.export")
