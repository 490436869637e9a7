# Every target sets up what it needs in .venv first; a fresh machine wants Python 3.11-3.13 and make.
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo plan-example install test lint format bench bench-switch bench-serve bench-handover bench-coldstart \
  bench-restart bench-ingest bench-lora bench-lora-serve bench-demo-quality bench-soak bench-observe bench-load bench-wire \
  bench-compare bench-compile fuzz gpu-check gpu-compare docs-models docs-demo docs-policy docs-configuration docs-observability \
  docs-benchmarks clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

demo: $(STAMP)  ## a family of models served on a quarter of the memory: table, timeline, contact sheet
	@$(BIN)/understudy-demo run --out demo-out

plan-example: $(STAMP)  ## how much GPU memory the shipped example trace needs: table and plan.png
	@$(BIN)/understudyd plan daemon/understudyd/simulate/example.csv.gz --gpu a100-80 --host-pool all \
	  --utilisation 85% --plot plan.png

install: $(STAMP)  ## everything into .venv: activate it with . .venv/bin/activate

test: $(STAMP)  ## the whole test suite
	@$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff and strict type checks
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(STAMP)  ## rewrite the sources in the house style
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# PEERS_PYTHON=/path/to/python names one that has the extra `peers`, if .venv has not.
bench: $(STAMP)  ## the benchmarks in a quarter of an hour: benchmarks/results, docs/benchmarks.md
	@$(BIN)/python -m benchmarks.report $(if $(PEERS_PYTHON),--peers-python $(PEERS_PYTHON))

bench-switch: $(STAMP)  ## bind and visible switch at real size
	@$(BIN)/python -m benchmarks.switch --json

bench-serve: $(STAMP)  ## 200 models, room for 20
	@$(BIN)/python -m benchmarks.serve --json

bench-handover: $(STAMP)  ## loads against plain reads, host tier, loaders killed again and again
	@$(BIN)/python -m benchmarks.handover --json

bench-load: $(STAMP)  ## a load beside raw reads and what others load with (.[peers])
	@$(BIN)/python -m benchmarks.load --json

bench-compile: $(STAMP)  ## a step compiled and not, what compiling takes, with and without its cache
	@$(BIN)/python -m benchmarks.compile --json

bench-wire: $(STAMP)  ## what the daemon adds to a request, and takes from the stage
	@$(BIN)/python -m benchmarks.wire --json

bench-compare: $(STAMP)  ## one workload through the daemon and through what people run today
	@$(BIN)/python -m benchmarks.compare --json

bench-coldstart: $(STAMP)  ## from nothing to the first image
	@$(BIN)/python -m benchmarks.coldstart --json

bench-restart: $(STAMP)  ## kill -9 under load: to the first image, cold and warm
	@$(BIN)/python -m benchmarks.restart --json

bench-ingest: $(STAMP)  ## a scan of 200 models, a single-file checkpoint of real size
	@$(BIN)/python -m benchmarks.ingest --json

bench-lora: $(STAMP)  ## a LoRA folded, beside diffusers' load, fuse and unfuse
	@$(BIN)/python -m benchmarks.lora --json

bench-lora-serve: $(STAMP)  ## 300 adapters over 3 bases, room for 20 overlays
	@$(BIN)/python -m benchmarks.lora_serve --json

bench-observe: $(STAMP)  ## what timeline and metrics cost
	@$(BIN)/python -m benchmarks.observe --json

bench-soak: $(STAMP)  ## two minutes of everything at once, and much of it wrong
	@$(BIN)/python -m benchmarks.soak --json

fuzz: $(STAMP)  ## a million hostile frames beside a client that gets every answer
	@$(BIN)/python -m benchmarks.fuzz --json

bench-demo-quality: $(STAMP)  ## how many of the demo family's pictures show what was asked for
	@$(BIN)/python -m benchmarks.demo_quality --json

# Not in .venv: a GPU machine has its own torch. Choose the Python that holds it: make gpu-check PYTHON=...
gpu-check:  ## everything that needs a real GPU, in under ten minutes; without one it says so
	@PYTHONPATH=client:daemon$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) -m benchmarks.gpu --out gpu-check.json \
	  --results benchmarks/results

gpu-compare:  ## twenty real-size models on a GPU: the daemon beside what people run today, in half an hour
	@PYTHONPATH=client:daemon$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) -m benchmarks.gpu --only compare \
	  --limit-s 1800 --out gpu-compare.json --results benchmarks/results

docs-models: $(STAMP)  ## docs/models.md, from the table of pipeline kinds that the tests serve
	@PYTHONPATH=tests $(BIN)/python -m zoo.document docs/models.md

docs-demo: $(STAMP)  ## the pictures in docs/images: what the demo drew
	@$(BIN)/understudy-demo run --out demo-out
	@cp demo-out/contact-sheet.png demo-out/timeline.png docs/images

docs-policy: $(STAMP)  ## the pictures of docs/policy.md, from the shipped example trace
	@$(BIN)/understudyd plan daemon/understudyd/simulate/example.csv.gz --gpu a100-80 --host-pool all \
	  --utilisation 85% --plot docs/policy-plan.png
	@$(BIN)/understudyd simulate daemon/understudyd/simulate/example.csv.gz --host-pool all --utilisation 85% \
	  --plot docs/policy-waits.png

docs-configuration: $(STAMP)  ## docs/configuration.md, from the configuration's own types
	@$(BIN)/python -m understudyd.config_reference docs/configuration.md

docs-observability: $(STAMP)  ## the example scrape and the picture of docs/observability.md, from a short run
	@$(BIN)/python -m benchmarks.observe --document docs/observability.md

docs-benchmarks: $(STAMP)  ## docs/benchmarks.md, its pictures and the README's figures, from the results that there are
	@$(BIN)/python -m benchmarks.report --render

clean:  ## forget the virtual environment and what the demo made
	rm -rf $(VENV) demo-out

# torch first and alone, so that no other package's requirement chooses its build.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Understudy needs Python 3.11 to 3.13; say: make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[daemon,demo,bench,test,lint]'
	@touch $@
