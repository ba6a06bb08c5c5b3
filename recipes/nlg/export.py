"""`python -m recipes.nlg.export ADAPTER FOLDER`: a plain transformers model with the adapter merged in."""

from recipes.language.export import main

if __name__ == "__main__":
    main("python -m recipes.nlg.export")
