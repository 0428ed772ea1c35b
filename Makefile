# Every target sets up .venv by itself (about a minute the first time; again when the stamp's inputs change).
PYTHON ?= python3
WORKERS ?= 2
SECONDS ?= 60
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := $(BIN)/python

# The machine's own thread settings stay out of timings and tests: one thread unless a command says otherwise.
export OMP_NUM_THREADS ?= 1
export KINETO_LOG_LEVEL ?= 6

.PHONY: help venv demo test check format fuzz bench matrix results accuracy zoo docs wheel clean

help:
	@echo "make demo     train a small net on scikit-learn's digits, mask it, export it, compare"
	@echo "make test     run the tests"
	@echo "make check    ruff (lint, format) and mypy"
	@echo "make fuzz     random networks for SECONDS=60, masked against exported; failures go to fuzz-failures/"
	@echo "make bench    pruned models timed against the unpruned one and the floor: two models, a minute or two"
	@echo "make docs     the documentation as a site, in build/site"
	@echo "make matrix   every network x every mask (long)"
	@echo "make zoo      every model of torchvision, timm and transformers (hours), written to docs/coverage.md"
	@echo "make accuracy top-1 of trained networks, masked in every way (hours; resumes), written to docs/accuracy"
	@echo "make results  accuracy and latency on real trained networks, written to docs/results.md"

# A half-made environment is started afresh: only the stamp says that it is whole.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[zoo,demo,onnx,reproduce,ray,docs,dev]"
	touch $@

venv: $(STAMP)

demo: $(STAMP)
	$(RUN) -m demo.demo

test: $(STAMP)
	$(RUN) -m pytest -n $(WORKERS) -m "not matrix"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(STAMP)
	$(RUN) -m benchmarks.fuzz --seconds $(SECONDS) --seed $(SEED)

bench: $(STAMP)
	$(BIN)/upscale bench resnet18 mobilenet_v2 --seconds 10 --out benchmarks/out/bench.csv \
		--plot benchmarks/out/bench.png --markdown benchmarks/out/speed.md

matrix: $(STAMP)
	$(RUN) -m benchmarks.matrix

zoo: $(STAMP)
	-$(BIN)/upscale zoo --out benchmarks/out/coverage.csv --markdown docs/coverage.md

accuracy: $(STAMP)
	$(BIN)/upscale reproduce --methods unconstrained,constrained,contiguous --importance l2 --amounts .1,.25,.5 \
		--images all --out docs/accuracy
	$(BIN)/upscale reproduce --methods unconstrained,constrained,contiguous --importance l2 --out docs/accuracy
	$(BIN)/upscale reproduce --out docs/accuracy
	$(RUN) -m benchmarks.repair --nets resnet20 resnet56 densenet40
	$(RUN) -m benchmarks.repair --nets resnet20 resnet56 densenet40 --masks global --amounts --flops 0.7 0.5
	$(RUN) -m benchmarks.repair --nets resnet20 resnet56 --amounts 0.5 --masks global --methods unconstrained --blockwise
	$(RUN) -m benchmarks.repair --nets mobilenet_v2 mobilenetv1_100 --amounts 0.1 0.25 --methods unconstrained
	$(RUN) -m benchmarks.repair --nets mobilenet_v2 --amounts 0.25 --methods unconstrained --imagenet unseen

results: $(STAMP)
	$(RUN) -m benchmarks.results

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet

wheel: $(STAMP)
	$(RUN) -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
