# The same few verbs for people and for CI. Needs make, Python 3.11 or later and a package index; nothing else.
# ARGS passes options on: make test ARGS="-k gate", make bench ARGS="--num-runs 20".

# The first interpreter that runs and is new enough; a name on the PATH may be a shim that leads nowhere.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
ARGS ?=
FUZZ_SECONDS ?= 300
# What is installed beside the package; CI asks for all that it needs at once, which saves pip two more looks.
EXTRAS ?= dev
# One thread a process: with two, the tiny models of the tests spend more time on sharing the work than on doing it.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
# A process per core, whole files each, so that a module's fixtures are made once; ARGS="-n 0" stays in one process.
SPREAD := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# What depends on other people's code most: models, hooks, caches, adapters, the Trainer, checkpoints, the web, the shell.
CORE := $(addprefix tests/, anatomy units execution test_models.py test_attach.py test_generation.py test_device_map.py \
	test_checkpoint.py test_network.py training/test_passes.py training/test_training.py training/test_saved.py serving \
	cli/test_cli.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo fetch llm test fuzz check format docs notebooks reasoner bench wheel lowest rehearse clean

help: ## list the verbs
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(INSTALLED) ## create .venv and install microglia with its pinned development tools
	@echo "setup: .venv is ready"

# The stamp is written last, so that an interrupted installation is taken up again. -qq keeps errors and drops an
# index's warnings.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "setup: no Python 3.11 or later found; install one or say make setup PYTHON=/path/to/python" >&2; exit 1; }
	@echo "setup: installing into .venv with $(PYTHON) (a minute or two the first time)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: setup ## train agents on the embedded reasoner and show dense against pruned; MODEL=smollm2 for a pretrained one
ifdef MODEL
	@$(MAKE) --no-print-directory llm
else
	@echo "demo: microglia demo $(ARGS)"
	@$(BIN)/microglia demo $(ARGS)
endif

fetch: setup ## fetch pretrained models into the cache: make fetch MODEL="smollm2 qwen2.5-coder-0.5b"
	@echo "fetch: scripts/fetch_models.py $(LLM)"
	@$(BIN)/python scripts/fetch_models.py $(LLM)

# The whole way on a pretrained model in few steps: it shows that everything works, not what pruning is worth.
LLM := $(or $(MODEL),smollm2)
LLM_RUN := runs/llm/$(LLM)
LLM_DATA := --dataset prompts
llm: fetch ## fetch a pretrained model, train agents on it for a few steps, judge them and ask it; MODEL=smollm2
	@echo "llm: microglia train, evaluate, generate with $(LLM), in $(LLM_RUN)"
	@$(BIN)/microglia train --model $(LLM) $(LLM_DATA) --keep-ratio 0.8 --max-steps 8 --batch-size 4 --limit 32 --eval-limit 8 --continuation-tokens 48 --output-dir $(LLM_RUN)
	@$(BIN)/microglia evaluate --model-path $(LLM_RUN) $(LLM_DATA) --limit 8 --max-new-tokens 48 --output-dir $(LLM_RUN)/judged
	@$(BIN)/microglia generate "What is the capital of France?" --model-path $(LLM_RUN) --keep-ratio 0.9 --max-new-tokens 48

test: setup ## run the tests, a process per core; warnings are errors
	@echo "test: pytest -q $(SPREAD) $(ARGS)"
	@$(PYTEST) $(SPREAD) $(ARGS)

# Each round draws anew; the first find ends it. What is printed becomes an @example of the test that it broke.
fuzz: setup ## search for inputs that break the property tests, for FUZZ_SECONDS (300)
	@echo "fuzz: pytest -q --hypothesis-profile search tests/fuzz $(ARGS), for $(FUZZ_SECONDS) seconds"
	@end=$$(($$(date +%s) + $(FUZZ_SECONDS))); while [ $$(date +%s) -lt $$end ]; do \
		$(PYTEST) --hypothesis-profile search tests/fuzz $(ARGS) || exit 1; done

check: setup ## formatting, lint and types, changing nothing
	@echo "check: ruff format, ruff check, mypy"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

format: setup ## format the code and apply the safe lint fixes
	@echo "format: ruff check --fix, ruff format"
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

docs: setup ## build the documentation into build/docs; warnings are errors
	@echo "docs: mkdocs build --strict"
	@$(BIN)/python -c 'import mkdocs, material, mkdocstrings' 2>/dev/null || $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

notebooks: setup ## run the notebooks offline in small mode; make notebooks ARGS=--save keeps what they print
	@echo "notebooks: scripts/run_notebooks.py --small $(ARGS)"
	@$(BIN)/python -c 'import nbclient, nbformat, ipykernel' 2>/dev/null || $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[notebooks]"
	@$(BIN)/python scripts/run_notebooks.py --small $(ARGS)

reasoner: setup ## train the embedded reasoner again from scratch (long)
	@echo "reasoner: scripts/train_reasoner.py $(ARGS)"
	@$(BIN)/python scripts/train_reasoner.py $(ARGS)

bench: setup ## measure latency and memory, dense against pruned
	@echo "bench: microglia benchmark $(ARGS)"
	@$(BIN)/microglia benchmark $(ARGS)

# Run from elsewhere and offline, in an environment that knows the wheel and what it asks for, nothing else.
wheel: setup ## build the wheel, install it in an empty environment and let it answer from there
	@echo "wheel: building and installing in build/wheel (a minute or two)"
	@rm -rf build/wheel
	@$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps -w build/wheel .
	@$(BIN)/python -m venv build/wheel/env
	@build/wheel/env/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt build/wheel/*.whl
	@cd / && env -u PYTHONPATH $(CURDIR)/build/wheel/env/bin/microglia --version
	@cd / && env -u PYTHONPATH HF_HUB_OFFLINE=1 $(CURDIR)/build/wheel/env/bin/python -c "from microglia import MicrogliaPruningSystem; \
		print(MicrogliaPruningSystem().generate('Tom has 3 apples and buys 4 more. How many apples does Tom have?', 40))"
	@cd / && env -u PYTHONPATH $(CURDIR)/build/wheel/env/bin/python -c "from importlib.resources import files; \
		assert all((files('microglia.report') / name).is_file() for name in ('page.html', 'page.css')), 'the wheel lacks the page'; \
		assert files('microglia.tasks').joinpath('shipped.jsonl').is_file(), 'the wheel lacks the prompts'"

# The newest versions are those of constraints.txt, which `make test` tests with.
LOWEST := build/lowest/.installed
$(LOWEST): pyproject.toml constraints.txt scripts/lowest_versions.py
	@echo "lowest: installing the lowest versions of pyproject.toml in build/lowest"
	@rm -rf build/lowest
	@"$(PYTHON)" -m venv build/lowest
	@$(BIN)/python scripts/lowest_versions.py > build/lowest/constraints.txt
	@build/lowest/bin/python -m pip install -qq --disable-pip-version-check -c build/lowest/constraints.txt -e ".[serve,cpu]" pytest pytest-xdist hypothesis openai httpx2 jsonschema
	@touch $@

lowest: setup $(LOWEST) ## test the core with the lowest versions that pyproject.toml allows
	@echo "lowest: pytest -q $(CORE)"
	@OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -q -m "not slow" $(SPREAD) $(CORE) $(ARGS)

# What runs on a GPU runs here first, with the versions that are there. REHEARSAL may be an environment that has them.
REHEARSAL ?= build/rehearsal
REHEARSED := $(addprefix tests/, bench benchmark signals execution/captured execution/test_execution_for.py \
	execution/test_compact.py execution/test_units.py)
$(REHEARSAL)/.installed: bench/versions.txt
	@echo "rehearse: installing bench/versions.txt in $(REHEARSAL) (several gigabytes)"
	@rm -rf $(REHEARSAL)
	@for p in python3.12 python3.13 python3.11 "$(PYTHON)"; do \
		"$$p" -m venv $(REHEARSAL) >/dev/null 2>&1 && break; done
	@$(REHEARSAL)/bin/python -m pip install -qq --disable-pip-version-check -r bench/versions.txt
	@touch $@

rehearse: $(REHEARSAL)/.installed ## the GPU's benchmark on a CPU, and the tests below it, with that machine's versions
	@echo "rehearse: bench/gpu.py --tiny; pytest -q $(REHEARSED) $(ARGS)"
	@OMP_NUM_THREADS=1 $(REHEARSAL)/bin/python bench/gpu.py --tiny
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(REHEARSAL)/bin/python -m pytest -q -m "not slow" $(SPREAD) $(REHEARSED) $(ARGS)

clean: ## remove .venv, caches and build products; runs and checkpoints stay
	@echo "clean: removing .venv, caches and build products"
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
