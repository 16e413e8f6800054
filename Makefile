# Everything runs in a virtual environment in .venv, made on first use.
#   make demo                          set up and run the main job
#   make test                          set up, lint, types, tests
#   make demo TORCH='torch'            take another build of PyTorch than the pinned one
#   make test VENV=/path/to/your/venv  use an environment of your own (a torch in it is kept)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_ARGS ?=

BIN := $(VENV)/bin
RUN := HF_HUB_DISABLE_TELEMETRY=1 $(BIN)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint style bench results clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# PyTorch comes first and pinned: unpinned it is a CUDA build of several gigabytes on a machine without a GPU.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[$(1)]"
	touch $@
endef

$(VENV)/.recipes: pyproject.toml
	$(call install,recipes)

$(VENV)/.dev: pyproject.toml
	$(call install,dev)

demo: $(VENV)/.recipes ## Set up and run the main job: medical text classification, L2-SP beside plain fine-tuning
	$(RUN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/medical_textcls.py --compare --overwrite_output_dir $(DEMO_ARGS)

test: lint ## Set up, lint, check types, run the tests (minutes)
	$(RUN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.dev ## Run the tests that take longer
	$(RUN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.dev ## Format the code and mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Measure speed and memory of the penalty
	$(RUN)/python recipes/benchmarks/speed.py
	$(RUN)/python recipes/benchmarks/memory.py

results: $(VENV)/.dev ## Measure everything that the README reports, and write it there (about an hour)
	$(RUN)/python recipes/benchmarks/clinical_notes.py
	$(RUN)/python recipes/benchmarks/main_job.py
	$(RUN)/python recipes/benchmarks/speed.py
	$(RUN)/python recipes/benchmarks/memory.py
	$(RUN)/python recipes/benchmarks/readme.py

clean: ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
