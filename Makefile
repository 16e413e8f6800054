# Everything runs in a virtual environment in .venv, made on first use (test-floor: in .venv-floor, release-check: in .venv-release).
#   make demo                          set up and run the main job
#   make test                          set up, lint, types, tests
#   make demo TORCH='torch'            take another build of PyTorch than the pinned one
#   make test VENV=/path/to/your/venv  use an environment of your own (a torch in it is kept)
PYTHON ?= python3
VENV ?= .venv
FLOOR ?= .venv-floor
RELEASE ?= .venv-release
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
# The tests of a file share what they have set up.
SIDE_BY_SIDE ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
RUN := HF_HUB_DISABLE_TELEMETRY=1 $(BIN)

.DEFAULT_GOAL := help
.PHONY: help demo test test-distributed test-slow test-floor lint style reference release-check bench results \
	results-domains results-quality clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

comma := ,

# Into the environment whose marker file is made. PyTorch comes first and pinned: unpinned it is a CUDA build of
# several gigabytes on a machine without a GPU.
define install
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -c "import torch" 2>/dev/null || $(@D)/bin/python -m pip install $(TORCH)
	$(@D)/bin/python -m pip install -e ".[$(1)]" $(2)
	touch $@
endef

$(VENV)/.recipes: pyproject.toml
	$(call install,recipes)

$(VENV)/.dev: pyproject.toml
	$(call install,dev)

$(VENV)/.distributed: $(VENV)/.dev
	$(call install,dev$(comma)deepspeed)

# Every `>=` of pyproject.toml read as `==`, but for PyTorch, which is TORCH, and what builds the package. pyarrow is
# the floor of datasets 3.0: later ones need NumPy 2 without saying so.
$(FLOOR)/constraints.txt: pyproject.toml Makefile
	mkdir -p $(@D)
	grep -oE '"[A-Za-z0-9-]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' | grep -vE '^(torch|setuptools)=' > $@
	echo 'pyarrow==15.0.0' >> $@

$(FLOOR)/.floor: $(FLOOR)/constraints.txt
	$(call install,test,-c $<)

demo: $(VENV)/.recipes ## Set up and run the main job: medical text classification, L2-SP beside plain fine-tuning
	$(RUN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/medical_textcls.py --compare --overwrite_output_dir $(DEMO_ARGS)

test: lint ## Set up, lint, check types, run the tests (minutes)
	$(RUN)/python -m pytest -m "not slow and not distributed" $(SIDE_BY_SIDE)

test-distributed: $(VENV)/.distributed ## Run the tests that start several processes (DDP, FSDP, DeepSpeed; on the CPU)
	$(RUN)/python -m pytest -m distributed

test-slow: $(VENV)/.dev ## Run the tests that take longer
	$(RUN)/python -m pytest -m slow

test-floor: $(FLOOR)/.floor ## Set up the oldest versions that pyproject.toml allows (Python 3.10 or 3.11), run the core tests
	HF_HUB_DISABLE_TELEMETRY=1 $(FLOOR)/bin/python -m pytest -m "not slow and not distributed" $(SIDE_BY_SIDE) --ignore tests/end_to_end

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.dev ## Format the code and mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/.dev ## Write the reference of all public names, hf_l2sp/API.md
	$(BIN)/python .ci/api_reference.py

$(RELEASE)/.tools:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet build twine
	touch $@

release-check: $(RELEASE)/.tools ## Build sdist and wheel, check them, try the wheel in an empty environment (minutes)
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(RELEASE)/bin/python .ci/release_check.py --torch '$(TORCH)'

bench: $(VENV)/.dev ## Measure speed and memory of the penalty
	$(RUN)/python recipes/benchmarks/speed.py
	$(RUN)/python recipes/benchmarks/memory.py
	$(RUN)/python recipes/benchmarks/auto_cost.py

results: $(VENV)/.dev ## Measure everything that the README reports, and write it there (about an hour)
	$(RUN)/python recipes/benchmarks/clinical_notes.py
	$(RUN)/python recipes/benchmarks/main_job.py
	$(RUN)/python recipes/benchmarks/speed.py
	$(RUN)/python recipes/benchmarks/memory.py
	$(RUN)/python recipes/benchmarks/readme.py

results-domains: $(VENV)/.dev ## Measure the recipes on real data: make results-domains DATA=FOLDER (hours)
	$(RUN)/python recipes/benchmarks/domains.py --data $(DATA)
	$(RUN)/python recipes/benchmarks/scarce_labels.py --data $(DATA)/medical_abstracts
	$(RUN)/python recipes/benchmarks/domain_adaptation.py --data $(DATA)
	$(RUN)/python recipes/benchmarks/readme.py

STUDY := $(RUN)/python recipes/benchmarks/quality.py --workers 2
QUALITY := $(STUDY) --data $(DATA)
FOUR_SETS := medical_abstracts clothing_reviews cuad_clauses medquad_info_type
REVIEWS := --methods plain "l2sp 0.01" "l2sp 0.03" "l2sp 0.1" auto
TASKS := build/few_classes
FEW := $(RUN)/python recipes/benchmarks/few_classes.py --output $(TASKS)
OF_FEW := $(STUDY) --data $(TASKS) --shots 8 --sets cuad_clauses_4 medquad_info_type_4 medical_abstracts_3 \
	clothing_reviews_2 clinical_notes_3 contract_clauses_3

results-quality: $(VENV)/.dev ## Compare methods and strengths, few labels: make results-quality DATA=FOLDER (a day)
	$(QUALITY) --shots 8 16 --sets $(FOUR_SETS)
	$(QUALITY) --shots 0 --sets $(FOUR_SETS) --methods plain auto
	$(QUALITY) --shots 64 --sets $(filter-out cuad_clauses,$(FOUR_SETS)) --methods plain "l2sp 0.01" "l2sp 0.1" auto
	$(QUALITY) --shots 8 --sets wnut17 tiny_sentiment tiny_legal tiny_medical tiny_ner
	$(QUALITY) --shots 16 --sets ncbi_disease
	$(STUDY) --data recipes/data --shots 8 \
		--sets clinical_notes contract_clauses shop_reviews clinical_ner finance_ner \
		--methods plain "l2sp 0.01" "l2sp 0.1" "held-out slope" auto
	$(QUALITY) --shots 8 --sets tiny_sentiment clothing_reviews --seeds $(shell seq 6 16) $(REVIEWS)
	$(STUDY) --data recipes/data --shots 8 --sets shop_reviews --seeds $(shell seq 6 20) $(REVIEWS)
	rm -rf $(TASKS)
	$(FEW) --data $(DATA) --classes 4 --sets cuad_clauses medquad_info_type
	$(FEW) --data $(DATA) --classes 3 --sets medical_abstracts
	$(FEW) --data $(DATA) --classes 2 --sets clothing_reviews
	$(FEW) --data recipes/data --classes 3 --sets clinical_notes contract_clauses
	$(OF_FEW) --methods plain auto
	$(OF_FEW) --seeds 1 2 --methods "l2sp 0.03" "l2sp 0.3"
	$(RUN)/python recipes/benchmarks/readme.py

clean: ## Remove the environment and caches
	rm -rf $(VENV) $(FLOOR) $(RELEASE) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
