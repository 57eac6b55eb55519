# Both main targets do all their own set-up in .venv and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-full lint quality clean

demo: $(STAMP)  ## the main job on real weights and text: runs/demo/report.html
	$(BIN)/hf-sparse-attn run recipes/demo.yaml

test: $(STAMP) lint  ## lint, types and all tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-full: $(STAMP) lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

quality: $(STAMP)  ## full-size quality figures: runs/quality/report.html (needs apt-get)
	$(BIN)/hf-sparse-attn run recipes/quality.yaml

# torch comes first and alone: an unpinned torch, pulled in by another package, would be the multi-gigabyte CUDA build
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
