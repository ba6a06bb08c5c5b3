"""`python -m recipes.instruction_tuning.export ADAPTER FOLDER`: a plain transformers model, without peft."""

from recipes.language.export import main

if __name__ == "__main__":
    main("python -m recipes.instruction_tuning.export")
