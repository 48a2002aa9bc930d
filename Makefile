# Everything runs in .venv, which `install` makes with uv: the machine's own, or one fetched into .uv for that.
# With TORCH=VERSION it is .venv-VERSION, and has that torch in place of the one that mosaicml admits.
UV := $(or $(shell command -v uv),.uv/bin/uv)
TORCH :=
NEWEST := 2.14.1
VENV := .venv$(TORCH:%=-%)
PYTHON := $(VENV)/bin/python
RUN := runs/quickstart
# A file's tests share what they train, so a file is one process's work; tests/conftest.py puts the longest files first.
PYTEST := $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25
export OMP_NUM_THREADS ?= 1
# With it, each process that imports Composer would compile thousands of files again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart test test-slow test-nightly test-newest bench lint
.DELETE_ON_ERROR:

install: $(VENV)/installed
.uv/bin/uv:
	python3 -m venv .uv || { echo 'make: python3 -m venv does not work here; on Debian: apt install python3-venv'; exit 2; }
	.uv/bin/pip install --quiet uv
$(VENV)/installed: pyproject.toml | $(filter .uv/bin/uv,$(UV))
	test -x $(PYTHON) || $(UV) venv --quiet --python 3.11 $(VENV)
ifdef TORCH
	# First the torchvision that belongs to this torch; then what both go over, of whatever else asks for others.
	$(UV) pip install --quiet --python $(VENV) torch==$(TORCH) torchvision
	printf 'torch==%s\ntorchvision\n' $(TORCH) > $(VENV)/override.txt
endif
	$(UV) pip install --quiet --python $(VENV) $(TORCH:%=--override $(VENV)/override.txt) pip --editable '.[dev]'
	# Last, so that the command "composer" is this project's, and not that of mosaicml, which has one of that name.
	$(UV) pip install --quiet --python $(VENV) --no-deps --reinstall-package sit-composer --editable .
	touch $@

quickstart: install
	$(PYTHON) convert/to_mds.py digits --out $(RUN)/shards
	$(VENV)/bin/composer -n 1 sit_composer/train.py yamls/quickstart.yaml
	$(PYTHON) -m sit_composer.sample $(RUN)/checkpoints --out $(RUN)/samples --npz $(RUN)/samples.npz \
	    --classes 0,1,2,3,4,5,6,7,8,9 --per-class 50 --cfg-scale 1.5 --batch-size 100
	$(PYTHON) tests/helpers/judge_digits.py $(RUN)/samples.npz --at-least 95
	@echo $(RUN)/samples/grid.png

test: install
	$(PYTEST) -m 'not slow and not nightly'
test-slow: install
	$(PYTEST) -m 'slow and not nightly'
test-nightly: install
	$(PYTEST) -m nightly
test-newest: install # the newest torch that torchvision follows, in its own environment, and checkpoints from and to .venv's
	OTHER_TORCH=$(VENV) $(MAKE) test test-slow test-nightly TORCH=$(NEWEST)
bench: install # the benchmarks that need no clone of another repository, no other environment, no GPU and no hours
	$(PYTHON) tests/benchmarks/crop.py
	$(PYTHON) tests/benchmarks/convert.py --latents 0
	$(PYTHON) tests/benchmarks/loader.py --workers 2
	$(PYTHON) tests/benchmarks/step.py
	$(PYTHON) tests/benchmarks/optimizers.py
	$(PYTHON) tests/benchmarks/sampling.py --bf16 --solvers "ODE heun" "SDE Euler"
	$(PYTHON) tests/benchmarks/growth.py --out runs/growth
	$(PYTHON) tests/benchmarks/growth_loader.py --out runs/growth_loader --seconds 1
lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint Dockerfile
