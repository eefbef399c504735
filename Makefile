# make demo, make test and the others do their own set-up: a virtual environment in $(VENV) and the engine, built.
# Needs Python >= 3.10 (PYTHON=python3.12 picks another one) and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
FUZZ_SEED ?= 0
FUZZ_SECONDS ?= 60
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' 2>/dev/null)

.PHONY: help demo test bench bench-short lint sanitize fuzz docs clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    train two very deep networks on digits, in one pass each'
	@echo 'make test    run the tests'
	@echo 'make bench   time the library and its peers, on chosen work and over a map of shapes (under 15 minutes)'
	@echo 'make bench-short  a part of the map, against eager layers (under 3 minutes)'
	@echo 'make lint    ruff, mypy and clang-format'
	@echo 'make sanitize  the tests of the engine under ASan and UBSan (gcc)'
	@echo 'make fuzz    random calls of the public API, good and bad (FUZZ_SECONDS=60 FUZZ_SEED=0)'
	@echo 'make docs    build the docs site in build/site'
	@echo 'make clean   remove what was built'

demo: $(READY)
	$(BIN)/python -m narrowdeep.commands.demo

# A process a core, each with one thread: with more they would wait for one another.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --quiet --benchmark-json=bench.json --benchmark-columns=min,rounds
	$(BIN)/python -m benchmarks.report bench.json --plot bench.png
	$(BIN)/python -m benchmarks.map --json map.json --plot map.png

bench-short: $(READY)
	$(BIN)/python -m benchmarks.map --short --json map.json --plot map.png

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

# A copy of the package with its own engine comes first on the path. Leaks of the interpreter are not ours; opcheck
# compiles and the references of test_chain.py are Python: minutes here, and test_spans.py runs the same kernels. The
# scalar kernels are slow here: random calls must do. What is larger than memory must raise as it does without ASan.
SANITIZERS = address,undefined
SANITIZED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 NARROWDEEP_SANITIZE=$(SANITIZERS)
SANITIZED_TESTS = -k 'not scalar and not avx512 and not opcheck and not is_the_reference'
VECTORS = $(if $(filter aarch64 arm64,$(shell uname -m)),neon,avx2)
sanitize: $(READY)
	NARROWDEEP_SANITIZE=$(SANITIZERS) \
	$(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize
	$(SANITIZED) NARROWDEEP_ISA=$(VECTORS) PYTHONPATH=build/sanitize \
	$(BIN)/python -m pytest --quiet -o 'pythonpath=build/sanitize .' $(SANITIZED_TESTS) \
	$(addprefix tests/ops/test_,spans.py chain.py conv.py gram.py)
	cd build/sanitize && for isa in $(VECTORS) scalar; do \
	$(SANITIZED) NARROWDEEP_ISA=$$isa PYTHONPATH='$(CURDIR)' \
	'$(abspath $(BIN))/python' -m tests.fuzz --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) || exit 1; done

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[docs]'
	touch $@

clean:
	rm -rf build dist narrowdeep.egg-info narrowdeep/*.so $(READY) $(VENV)/.docs

# The environment's own torch is built against: hence no build isolation.
$(READY): pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'setuptools>=77' ninja 'torch>=2.10'
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[tests,download]'
	touch $@
