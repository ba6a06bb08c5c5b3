"""`python -m recipes.instruction_tuning.export ADAPTER FOLDER`: a plain transformers model, without peft."""

from jsonargparse import auto_cli

from recipes.language.export import export
from recipes.shared.mistakes import without_traceback

if __name__ == "__main__":
    with without_traceback():
        auto_cli(export, prog="python -m recipes.instruction_tuning.export")
