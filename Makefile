# Works on a fresh clone with Python >= 3.11: `make test`, `make demo`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is installed: for the demo the recipes' dependencies, for lint and tests the tools too.
RECIPES := $(VENV)/.recipes
DEV := $(VENV)/.dev
# Whose layers the tests train, and whose bounds on its dependencies exclude transformers 5.
LITGPT := 0.5.13
# An environment with the oldest releases that are supported.
OLDEST := .venv-oldest

.PHONY: help test test-oldest demo lint docs gpu-test slurm-test benchmark clean

help:
	@echo "make demo       a picture of what the perturbation changes, next to LoRA with and without dropout"
	@echo "make test       lint, type check, the site and all tests"
	@echo "make docs       the site, in docs/_build/html"
	@echo "make test-oldest  the package's tests with the oldest supported Lightning, peft and torchmetrics"
	@echo "make gpu-test   the tests that need a CUDA device"
	@echo "make slurm-test the tests that need root and SLURM's daemons, which they start: apt-get install slurm-wlm munge"
	@echo "make benchmark  step time of every method relative to LoRA"

$(RECIPES): EXTRAS := recipes
$(DEV): EXTRAS := recipes,dev

$(RECIPES) $(DEV): pyproject.toml
	@echo "Installing the package with [$(EXTRAS)] into $(VENV), once: PyTorch, transformers and others, about 0.7 GB to"
	@echo "fetch and 2 GB on the disk. On Linux pip may take PyTorch's CUDA build, which is 3 GB more; PyTorch's CPU build,"
	@echo "installed into $(VENV) beforehand, is kept. This takes minutes. The demo then fetches an encoder and"
	@echo "texts, 0.2 GB."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar=on -e '.[$(EXTRAS)]'
	if test $@ = $(DEV); then $(BIN)/python -m pip install --quiet --no-deps litgpt==$(LITGPT); fi
	@touch $@

demo: $(RECIPES)
	$(BIN)/python -m recipes.demo

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# DOCS_LINKS=1 links to the documentation of PyTorch and Lightning, which needs a network. REPOSITORY is the address to
# which the front page leads.
docs: $(DEV)
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

# The type checker and the site take one core each.
test: $(DEV)
	$(MAKE) --jobs=2 lint docs
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slurm"

$(OLDEST)/.installed: pyproject.toml tests/oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --progress-bar=on -c tests/oldest.txt -e '.[recipes,dev]'
	@touch $@

# Lightning 2.5 itself calls jsonargparse as was usual then.
test-oldest: $(OLDEST)/.installed
	JSONARGPARSE_DEPRECATION_WARNINGS=off $(OLDEST)/bin/python -m pytest lightning_flatlora tests --ignore=tests/recipes --ignore=tests/distributed

gpu-test: $(DEV)
	$(BIN)/python -m pytest -m gpu

slurm-test: $(DEV)
	$(BIN)/python -m pytest -m slurm tests/distributed

benchmark: $(RECIPES)
	$(BIN)/python -m recipes.benchmarks.step

clean:
	rm -rf $(VENV) $(OLDEST) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache
