PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
# The peers that the benchmarks run want other versions of our dependencies.
BENCH_VENV := .venv-bench
BENCH_INSTALLED := $(BENCH_VENV)/installed
PEER_VENV := .venv-img2dataset
PEER_INSTALLED := $(PEER_VENV)/installed
BENCHMARKS := lane_plan loader precompute random_normals registering
TESTS := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# What `make demo` runs; more steps train longer, another name keeps the runs apart.
EXPERIMENT := +experiment=emoji
# `make gpu` takes the torch of $(PYTHON); WHEELS is a folder of packages that are not beside it.
GPU_SITE := build/gpu-site
OUT ?= build/gpu

.PHONY: demo test coverage campaign bench gpu lint clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[demo,test]'
	touch $@

demo: $(INSTALLED)
	$(PY) -m trainer.pack $(EXPERIMENT)
	$(PY) -m trainer.precompute $(EXPERIMENT)
	$(PY) -m trainer $(EXPERIMENT)
	$(PY) -m trainer.evaluate $(EXPERIMENT)
	$(PY) -m trainer.report runs/emoji/demo
	@echo "samples:  $$(ls runs/emoji/demo/samples/step_*.png | tail -n 1)"
	@echo "report:   runs/emoji/demo/report.html"
	@echo "metrics:  runs/emoji/demo/metrics.jsonl"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

test: lint
	$(PY) $(TESTS)

coverage: $(INSTALLED)
	$(VENV)/bin/coverage run $(TESTS)
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report --skip-covered --sort=cover

campaign: $(INSTALLED)
	$(PY) -m pytest -m campaign

$(BENCH_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

# img2dataset wants an older webdataset.
$(PEER_INSTALLED):
	$(PYTHON) -m venv $(PEER_VENV)
	$(PEER_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'img2dataset>=1.47'
	touch $@

bench: $(BENCH_INSTALLED) $(PEER_INSTALLED)
	set -e; for name in $(BENCHMARKS); do $(BENCH_VENV)/bin/python -m tests.benchmarks.$$name; done
	$(BENCH_VENV)/bin/python -m tests.benchmarks.pack $(PEER_VENV)/bin/img2dataset

gpu:
ifdef WHEELS
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $(GPU_SITE) $(WHEELS)/*.whl
endif
	PYTHONPATH=$(GPU_SITE) $(PYTHON) -m tests.benchmarks.gpu --out $(OUT) $(if $(GPUS),--gpus $(GPUS))

clean:
	rm -rf $(VENV) $(BENCH_VENV) build *.egg-info
