# Both main targets do all their own set-up in .venv and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRITON := $(VENV)/.triton
QUANTIZED := $(VENV)/quantized
CHROMIUM := $(VENV)/chromium
CPP_TESTS := $(addprefix tests/operators/test_,attention.py attention_options.py operands.py scoring.py selection.py) tests/router/test_router.py
# tests run on one thread each, so two processes share two cores; a file's tests stay together, as its fixtures are made once
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# quantised weights and caches; beside the environment, as transformers and peft look for these packages on their own
QUANTIZERS := bitsandbytes==0.50.2 torchao==0.18.0 optimum-quanto==0.2.7 ninja==1.13.2

# the ends of the supported range of Transformers, beside the environment, which has the newest but one; a folder each, kept between targets
ENDS := 5.17.0 5.24.0
GPU_MACHINE := $(VENV)/gpu-machine
GPU_PACKAGES := peft==0.21.2 accelerate==1.15.0 requests==2.34.2 pytest==9.2.0 pytest-timeout==2.4.0 pytest-xdist==3.8.0
OVERLAYS := $(addprefix $(VENV)/transformers-,$(ENDS))
BESIDE_5.17.0 := huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
VERSION_TESTS := $(addprefix tests/,architectures/test_transformers_versions.py attention/test_cache_summaries.py models/test_generation.py)
SAVING_TESTS := $(addprefix tests/,models/test_sparse_models.py attention/test_cache_kinds.py attention/test_padding_masks.py models/test_hub.py)
# one model type of each kind: plain, an argument of its own for the cache, sliding windows, experts, two-sided, time series
KINDS := llama or gpt_neox or gemma2 or qwen3_moe or modernbert or patchtst

.PHONY: demo test docs dist test-full test-versions test-versions-ends test-quantized test-processors test-sanitizers test-interpreter test-aot test-browser lint quality clean

demo: $(STAMP)  ## the main job on real weights and text: runs/demo/report.html
	$(BIN)/hf-sparse-attn run recipes/demo.yaml

test: $(STAMP) lint  ## lint, types and all tests
	$(PYTEST) -m "not slow and not gpu"

test-full: $(TRITON) $(GPU_MACHINE) lint test-processors test-sanitizers test-interpreter test-quantized test-versions test-browser  ## everything, with the slow tests: two hours on two cores
	$(PYTEST)
	$(PYTEST) --confcutdir tests/aot --timeout 2000 tests/aot
	for python in $(BIN)/python $(GPU_MACHINE)/bin/python; do $$python -m pytest --confcutdir tests/interpreter -m slow tests/interpreter || exit 1; done

test-quantized: $(QUANTIZED)  ## sparse attention in bitsandbytes, torchao and quanto models and caches
	PYTHONPATH=$(CURDIR)/$(QUANTIZED) $(BIN)/python -m pytest -k "quantised and not hqq" tests/models/test_heads_and_pipelines.py tests/attention/test_cache_kinds.py

test-versions: $(OVERLAYS)  ## every architecture, caches, generation and saving under each end of the supported Transformers and the pinned one
	for folder in $(OVERLAYS) $(VENV)/none; do \
		PYTHONPATH=$(CURDIR)/$$folder $(PYTEST) -m compat && PYTHONPATH=$(CURDIR)/$$folder $(PYTEST) -m "not compat" $(VERSION_TESTS) $(SAVING_TESTS) || exit 1; \
	done

test-versions-ends: $(OVERLAYS)  ## the part of it that differs most between versions, under each end: a few minutes
	for folder in $(OVERLAYS); do \
		PYTHONPATH=$(CURDIR)/$$folder $(PYTEST) $(VERSION_TESTS) && \
		PYTHONPATH=$(CURDIR)/$$folder $(PYTEST) -k "(stock_checkpoint or cached_decoding) and ($(KINDS))" tests/architectures/test_supported_types.py || exit 1; \
	done

# the kernels are compiled for the processor at hand: here for older ones too
test-processors: $(STAMP)  ## the C++ kernels without bfloat16 instructions, and without AVX-512
	@grep -qw avx512f /proc/cpuinfo || echo "this processor has no AVX-512: the kernels compiled for it are not tested"
	! grep -qw avx512f /proc/cpuinfo || HF_SPARSE_ATTN_CPU=avx512 $(PYTEST) -k cpp $(CPP_TESTS)
	HF_SPARSE_ATTN_CPU=avx2 $(PYTEST) -k cpp $(CPP_TESTS)

# torch is not instrumented: the runtime has to be there before it, and its leaks are its own; without libstdc++ no exception is caught
SANITIZE = HF_SPARSE_ATTN_SANITIZE=1 OMP_NUM_THREADS=2 UBSAN_OPTIONS=print_stacktrace=1 \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	LD_PRELOAD="$(foreach name,libasan.so libubsan.so libstdc++.so.6,$(shell g++ -print-file-name=$(name)))"
test-sanitizers: $(STAMP)  ## the C++ kernels' tests and 2,400 random calls under AddressSanitizer and UndefinedBehaviorSanitizer
	$(SANITIZE) CXX=g++ $(BIN)/python -m pytest -k "cpp or operator" --timeout 3600 $(CPP_TESTS)
	$(SANITIZE) CXX=g++ $(BIN)/python tests/sanitizers/fuzz_kernels.py --cases 2400

# each in a process of its own: Triton reads TRITON_INTERPRET once, when it is imported
test-interpreter: $(TRITON)  ## the Triton kernels on CPU tensors
	$(PYTEST) --confcutdir tests/interpreter -m "not slow" tests/interpreter

test-aot: $(TRITON)  ## the Triton kernels compiled for four GPUs, none needed
	$(PYTEST) --confcutdir tests/aot -m "not slow" tests/aot

test-browser: $(STAMP) $(CHROMIUM)  ## every kind of HTML report in Chromium, on a wide screen and on a phone's
	$(BIN)/python -m pytest -m "slow or not slow" tests/experiments/test_reports_in_a_browser.py tests/industry/test_health_page.py tests/industry/test_pilot_page.py

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror kernels/torch-ext/hf_sparse_attn_kernels/cpp_kernels/source/*

docs: $(STAMP)  ## the pages of docs/ as a site in build/docs; generated pages must be up to date
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m mkdocs build --strict --quiet --config-file docs/builder/mkdocs.yml

dist: $(STAMP)  ## sdist and wheel of the last commit in dist/, built twice in clean clones and compared
	$(BIN)/python .ci/dist.py

quality: $(STAMP)  ## full-size quality figures: runs/quality/report.html (needs apt-get)
	$(BIN)/hf-sparse-attn run recipes/quality.yaml

# torch comes first and alone: an unpinned torch, pulled in by another package, would be the multi-gigabyte CUDA build
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

$(TRITON): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,docs,triton]'
	touch $@

$(QUANTIZED): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target $@ $(QUANTIZERS)
	touch $@

$(VENV)/transformers-%: $(STAMP)
	rm -rf $@ $@.part
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $@.part transformers==$* $(BESIDE_$*)
	PYTHONPATH=$@.part $(BIN)/python -c "import transformers; assert transformers.__version__ == '$*'"
	mv $@.part $@

# what a machine with a GPU may have: torch with CUDA, which brings its Triton, and the oldest Transformers; 5 GB
$(GPU_MACHINE): $(STAMP)
	rm -rf $@ && $(PYTHON) -m venv $@
	$@/bin/python -m pip install --disable-pip-version-check torch==2.11.0 'numpy<2.4' transformers==5.17.0 $(BESIDE_5.17.0) $(GPU_PACKAGES)

# Debian's, with the libraries that this machine lacks: unpacked here, nothing is installed
$(CHROMIUM):
	rm -rf $@ $@.part && mkdir -p $@.part/archives/partial
	test $$(id -u) != 0 || apt-get --quiet update
	apt-get --quiet --yes --no-install-recommends --download-only -o Debug::NoLocking=1 -o APT::Sandbox::User=root \
		-o Dir::Cache::archives=$(CURDIR)/$@.part/archives install chromium-headless-shell
	for package in $@.part/archives/*.deb; do dpkg-deb --extract $$package $@.part || exit 1; done
	rm -r $@.part/archives && mv $@.part $@

clean:
	rm -rf $(VENV) build dist *.egg-info
