"""`python -m recipes.instruction_tuning.export ADAPTER FOLDER`: a plain transformers model, without peft."""

from jsonargparse import auto_cli

from recipes.command_line.mistakes import without_traceback
from recipes.language.export import export

if __name__ == "__main__":
    with without_traceback():
        auto_cli(export, prog="python -m recipes.instruction_tuning.export")
