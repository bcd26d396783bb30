# One command each: everything a target needs, it makes. `make help` lists them.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NATIVE := $(shell find kernels comm placement offload -type f 2>/dev/null) CMakeLists.txt
PROTOS := $(wildcard proto/moeserve/pb/*.proto)

# The build happens in $(VENV) itself, with the pinned tools: nothing unpinned is ever fetched.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
BUILD_TOOLS := scikit-build-core nanobind cmake ninja
# The version whose CPU build every platform of ours has; the library itself accepts a range.
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all test-rare fuzz clients check sanitize bench docs proto lock hooks clean
.PHONY: distclean ascend-schemas

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv, install the pinned dependencies, build the native half

demo: $(STAMP) ## serve the shipped model, ask it over gRPC, print a story and a sum; the same of a cluster
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/cluster_demo.py

test: $(STAMP) ## run the tests but the long ones (ARGS="tests/comm -k name" to choose from all)
	$(BIN)/pytest $(if $(ARGS),$(ARGS),-m "not long and not rare")

# One more than cores, each file of tests in one of them: what is long also waits for processes.
WORKERS := $(shell n=$$(nproc); echo $$((n < 16 ? n + 1 : 16)))
test-all: $(STAMP) ## run every test but rare ones, as continuous integration does
	PYTHONPATH=tests/tools $(BIN)/pytest -p cpu_time -n $(WORKERS) --dist loadfile -m "not rare" $(ARGS)

test-rare: $(STAMP) ## run what repeats at length what other tests show (minutes)
	$(BIN)/pytest -m rare $(ARGS)

TIMES := 50
fuzz: $(STAMP) ## look for inputs that break something, TIMES=50 as many as continuous integration
	FUZZ_EXAMPLES=$(TIMES) $(BIN)/pytest tests/fuzz $(ARGS)

CLIENTS := build/clients
clients: $(STAMP) ## run real clients against a server, each in an environment of its own
	mkdir -p $(CLIENTS)
	CLIENT_ENVIRONMENTS=$(CLIENTS) $(BIN)/pytest tests/clients $(ARGS)

ASCEND := build/ascend
TORCH_NPU := torch_npu==2.13.0
ascend-schemas: $(STAMP) ## compare the Ascend backend with the wheel of torch_npu, without CANN (44 MB)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: -d $(ASCEND) '$(TORCH_NPU)'
	ASCEND_WHEEL=$$(ls $(CURDIR)/$(ASCEND)/torch_npu-*.whl) $(BIN)/pytest tests/kernels/wheel $(ARGS)

DOCS = README.md CONTRIBUTING.md SECURITY.md bench/README.md launch/README.md kernels/cpu/README.md \
  $(filter-out docs/settings.md,$(wildcard docs/*.md))  # which is generated

check: $(STAMP) ## lint, format, types, layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mdformat --check $(DOCS)
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layout.py

# The interpreter is not built with the sanitizers, so their runtime comes first; its own memory,
# which it keeps on purpose, is not reported.
SANITIZED := build/sanitized
sanitize: $(STAMP) ## run the native tests under AddressSanitizer and UBSan (minutes)
	$(BIN)/python -m venv --without-pip $(SANITIZED)
	echo "$(CURDIR)/$(wildcard $(VENV)/lib/python*/site-packages)" \
	  > $(SANITIZED)/lib/$(notdir $(wildcard $(VENV)/lib/python*))/site-packages/base.pth
	PATH="$(CURDIR)/$(BIN):$$PATH" $(SANITIZED)/bin/python -m pip install --quiet \
	  --no-build-isolation --no-deps --force-reinstall -C build-dir=$(SANITIZED)/cmake \
	  -C cmake.define.MOESERVE_SANITIZE=ON .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	  MOESERVE_REQUIRE_NATIVE=1 $(SANITIZED)/bin/python -P -m pytest -p no:cacheprovider \
	  --timeout 1200 --ignore tests/kernels/test_select.py tests/kernels $(ARGS)

bench: $(STAMP) ## measure the kernels on this machine
	$(BIN)/python bench/kernels.py

docs: $(STAMP) ## regenerate docs/settings.md from the settings
	$(BIN)/python -m moeserve.config.reference > docs/settings.md

proto: $(STAMP) ## regenerate moeserve/pb from proto/
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. \
	  --grpc_python_out=. $(PROTOS)

lock: | $(BIN)/python ## resolve constraints.txt anew, in a fresh environment
	rm -rf build/lock && $(BIN)/python -m venv build/lock
	build/lock/bin/pip install --quiet $(BUILD_TOOLS)
	build/lock/bin/pip install --quiet --no-build-isolation '.[dev]' '$(TORCH)'
	{ sed -n '/^#/p' constraints.txt; build/lock/bin/pip freeze --all --exclude moeserve \
	  --exclude pip | sed 's/+.*//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

hooks: $(STAMP) ## run `make check` on the changed files before every commit
	$(BIN)/pre-commit install

clean: ## remove what was built, keep .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMP)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# PYTHON=... chooses another interpreter; it is checked the same way.
$(BIN)/python:
	@py=$$(PYTHON="$(PYTHON)" sh .ci/find-python) && echo "creating $(VENV) with $$py" \
	  && "$$py" -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo "installing the pinned dependencies and building the native half (minutes, once)"
	$(PIP) $(BUILD_TOOLS)
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
