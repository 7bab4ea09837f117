# `make demo` and `make test` set up what they need: a virtual environment in .venv, the build and the dependencies.
# To use another Python, with its own environments and wheel: make wheel PYTHON=python3.12 SUFFIX=-3.12
PYTHON ?= python3
SUFFIX ?=
VENV := .venv$(SUFFIX)
SECOND := .venv-second$(SUFFIX)
THIRD := .venv-third$(SUFFIX)
DIST := dist$(SUFFIX)
BUILD := build/wheel$(SUFFIX)
BIN := $(VENV)/bin
DEMO_ARGS ?=
BENCH_ARGS ?=
# LOCKED=1 sets up the development environment from requirements/lock.txt and checks the hash of every file.
LOCKED ?=
DEV := $(if $(LOCKED),--require-hashes -r requirements/lock.txt,-r requirements/dev.txt -c requirements/constraints.txt)
# The tests for compute-sanitizer. It is not meant for graphs, streams and compilers, and would take minutes for them.
SANITIZED ?= "test_prunes or test_product or test_linear or test_conv2d or many_dimensions"
# Under the other versions of torch, slow tests and tests that do not depend on torch's version run only for a release.
SECOND_ARGS ?= -m "not slow" $(addprefix --ignore=tests/test_,cuda_on_host.py fuzz_ops.py docs.py compress_nm.py statistics.py plot.py)
BENCHMARKS ?= prune_nm gradients auto train_step

CXX_FILES := $(shell find benchmarks cpp cuda examples tests -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

# FUZZ_RUNS: inputs of the kernel fuzzer, about 18 kernel calls each. FUZZ_EXAMPLES: cases of each test that fuzzes the
# ops, 20 op calls each.
FUZZ_RUNS ?= 1000000
FUZZ_EXAMPLES ?= 2000

.PHONY: all demo test test-all lint cpp-test sanitize fuzz fuzz-kernels fuzz-ops fuzz-threads memcheck cuda-sanitize wheel \
  sdist python-test second-test third-test install-test docs bench clean coverage coverage-python coverage-cpp reproducible \
  lock licences
all: test

# One wheel is built and repaired. All environments install this file.
WHEEL_INPUTS := $(shell find cpp cuda cmake python -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml README.md \
  .ci/repair-wheel

# Uses the wheel that `make test` built, if there is one. Otherwise builds only for this machine, and without CUDA if it
# has no GPU, because compiling the CUDA kernels takes minutes.
demo: $(if $(wildcard $(DIST)/built),$(VENV)/installed,$(VENV)/built-here)
	$(BIN)/python examples/digits.py $(DEMO_ARGS)

# Runs all tests that need no GPU. This takes hours.
test-all: test sanitize fuzz coverage reproducible

# Runs two jobs at a time, because tests often wait for a compiler or a process that they started.
test: lint
	+$(MAKE) -j2 cpp-test python-test second-test install-test

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --offline --quiet .github

# The build of the wheel includes the C++ tests, so the kernels are compiled once.
cpp-test: $(DIST)/built
	$(BIN)/cmake --build $(BUILD)
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure

# Runs the C++ tests, and the CUDA kernels on the host, under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/ready $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B build/sanitize -DSDGP_TESTS=ON -DSDGP_PYTHON=OFF \
	  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g1"
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  SDGP_SANITIZE="-fsanitize=address,undefined -fno-sanitize-recover=all -g1" \
	  $(BIN)/python -m pytest -q tests/test_cuda_on_host.py -k "not driver"

# Runs long versions of tests that take seconds in `make test`.
fuzz: fuzz-kernels fuzz-ops fuzz-threads memcheck

# Fuzzes the kernels with libFuzzer. Starts from the corpus in the repository and keeps new inputs in build/fuzz/corpus.
# Needs clang (Debian: apt-get install clang-22 libclang-rt-22-dev). -entropic=0 turns off the weights for rare inputs,
# which took half of the time.
CLANGXX ?= clang++-22
fuzz-kernels: $(VENV)/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B build/fuzz -DSDGP_TESTS=ON -DSDGP_PYTHON=OFF -DSDGP_FUZZER=ON \
	  -DCMAKE_CXX_COMPILER=$(CLANGXX) \
	  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -gline-tables-only"
	$(BIN)/cmake --build build/fuzz --target kernels_fuzz
	mkdir -p build/fuzz/corpus
	build/fuzz/tests/fuzz/kernels_fuzz -runs=$(FUZZ_RUNS) -max_len=256 -entropic=0 -print_final_stats=1 build/fuzz/corpus tests/fuzz/corpus

fuzz-ops: $(VENV)/installed
	SDGP_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -s tests/test_fuzz_ops.py

# Calls the kernels from eight threads under ThreadSanitizer.
fuzz-threads: $(VENV)/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B build/tsan -DSDGP_TESTS=ON -DSDGP_PYTHON=OFF \
	  -DCMAKE_CXX_FLAGS="-fsanitize=thread -g1"
	$(BIN)/cmake --build build/tsan --target threads_test
	$(BIN)/ctest --test-dir build/tsan --output-on-failure -R threads_test

# Runs a part of each C++ test under valgrind, which does not support AVX-512.
memcheck: cpp-test
	for isa in baseline avx2; do for test in kernels products threads; do SDGP_FORCE_ISA=$$isa SDGP_TEST_SHARE=40 \
	  valgrind --quiet --error-exitcode=1 --leak-check=full $(BUILD)/tests/cpp/$${test}_test || exit; done; done

# Runs GPU tests under compute-sanitizer. Needs a machine with a GPU and an environment with sdgp and pytest.
cuda-sanitize:
	for tool in memcheck racecheck; do REQUIRE_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
	  --error-exitcode 1 $(PYTHON) -m pytest -q -x -m cuda tests/test_cuda.py -k $(SANITIZED) || exit; done

# Each process uses one thread, except where a test asks for more: several suites run at a time, and OpenMP threads that
# wait for each other on a busy core take several times as long.
python-test second-test third-test: export OMP_NUM_THREADS = 1

python-test: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

second-test: $(SECOND)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(SECOND)/bin/python -m pytest $(SECOND_ARGS)

third-test: $(THIRD)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(THIRD)/bin/python -m pytest $(SECOND_ARGS)

install-test: $(VENV)/ready $(SECOND)/ready
	tests/install.sh $(VENV) $(SECOND)

# Builds the wheel for a release and tests it under three versions of torch: the newest, the oldest and one in between.
wheel: SECOND_ARGS =
wheel: python-test second-test third-test
	@ls -l $(DIST)/*.whl

sdist: $(VENV)/ready
	$(BIN)/python -m build --sdist --no-isolation --outdir $(DIST)

# Checks that two builds of the last commit, in two folders, give the same file.
reproducible: $(VENV)/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/reproducible

# Reports which lines of python/ and cpp/ the tests run. Fails below 95 %.
coverage: coverage-python coverage-cpp

coverage-python: $(VENV)/installed $(VENV)/tools
	mkdir -p build && $(BIN)/coverage erase
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/coverage run -m pytest -q -m "not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --show-missing --fail-under 95

coverage-cpp: $(VENV)/installed $(VENV)/tools
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/coverage-cpp

# Locks the newest version of every package, with the hashes of the public index.
lock: $(VENV)/tools
	$(BIN)/uv pip compile --quiet --upgrade --no-config --no-emit-index-url \
	  --generate-hashes --only-binary :all: --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --custom-compile-command "make lock" -c requirements/constraints.txt requirements/dev.txt requirements/tools.txt \
	  -o requirements/lock.txt

# Writes the licences of the packages that sdgp needs and uses, as installed here, to requirements/licences.md.
licences: $(VENV)/ready
	$(BIN)/python .ci/licences > requirements/licences.md

# Builds the documentation site in build/site.
docs: $(VENV)/ready
	$(BIN)/python docs/pages.py
	$(BIN)/zensical build --clean --strict

bench: $(VENV)/installed
	for subject in $(BENCHMARKS); do $(BIN)/python benchmarks/$$subject.py $(BENCH_ARGS) || exit; done

# The demo starts sooner without the tools for tests and documentation.
$(VENV)/demo-ready: requirements/demo.txt requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(LOCKED),$(DEV),-r requirements/demo.txt -c requirements/constraints.txt)
	touch $@

$(VENV)/ready: requirements/dev.txt requirements/demo.txt requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(DEV)
	touch $@

$(VENV)/tools: requirements/tools.txt $(VENV)/ready
	$(BIN)/pip install --quiet $(if $(LOCKED),--require-hashes -r requirements/lock.txt,-r requirements/tools.txt)
	touch $@

$(DIST)/built: $(VENV)/ready $(WHEEL_INPUTS)
	rm -rf $(DIST)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --wheel --no-isolation --outdir $(DIST)/as-built \
	  -C build-dir=$(BUILD) -C cmake.define.SDGP_TESTS=ON -C cmake.define.SDGP_WERROR=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/repair-wheel $(DIST)/as-built/*.whl $(DIST)
	touch $@

$(VENV)/built-here: $(VENV)/demo-ready $(WHEEL_INPUTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --no-deps --force-reinstall \
	  -C cmake.define.$(if $(shell nvidia-smi -L 2> /dev/null),CMAKE_CUDA_ARCHITECTURES=native,SDGP_CUDA=OFF) .
	touch $@

$(VENV)/installed: $(DIST)/built
	$(BIN)/pip install --quiet --force-reinstall --no-deps $(DIST)/*.whl
	touch $@

$(SECOND)/ready: CONSTRAINTS = requirements/constraints-second.txt
$(THIRD)/ready: CONSTRAINTS = requirements/constraints-third.txt
$(SECOND)/ready $(THIRD)/ready: %/ready: requirements/test.txt requirements/constraints-second.txt requirements/constraints-third.txt
	$(PYTHON) -m venv $*
	$*/bin/pip install --quiet torch -r requirements/test.txt -c $(CONSTRAINTS)
	touch $@

$(SECOND)/installed $(THIRD)/installed: %/installed: %/ready $(DIST)/built
	$*/bin/pip install --quiet --force-reinstall --no-deps $(DIST)/*.whl
	touch $@

clean:
	rm -rf build $(DIST) $(VENV) $(SECOND) $(THIRD)
