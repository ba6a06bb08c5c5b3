# Works on a fresh clone with Python >= 3.10: `make test`, `make demo`, `make clip-demo`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help test demo clip-demo lint gpu-test benchmark clean

help:
	@echo "make demo       fine-tune a packaged language model with LoRA, EFMLoRA and FMLoRA, side by side"
	@echo "make clip-demo  train a small CLIP on emoji, then adapt it with few images of a style it has never seen"
	@echo "make test       lint, type check and all tests"
	@echo "make gpu-test   the tests that need a CUDA device"
	@echo "make benchmark  step time of every method relative to LoRA"

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar=on -e '.[recipes,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m recipes.demo

clip-demo: $(INSTALLED)
	$(BIN)/python -m recipes.clip_demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

gpu-test: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

benchmark: $(INSTALLED)
	$(BIN)/python -m recipes.benchmarks.step

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
