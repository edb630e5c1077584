# make lab: Jupyter at the lesson table.   make test: everything is checked.   make demo: fine-tune on a file of this repository.
# make mutants: every solution with one small thing changed, judged by its lesson's tests (minutes; make test takes a sample).
# make bench: beside PEFT and bitsandbytes, some minutes.   make soak: a long trial of what must never break, an hour.
# make compare: every method on a task, in about three minutes; OPTIONS="--text my.txt" for your own.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: lab test mutants demo compare bench soak notebooks

# Markdown opens rendered, not as source; as root (in a container) Jupyter wants to be told that this is meant.
lab: .venv/ready
	$(BIN)/jupyter lab --ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root) \
		--LabApp.default_url="/lab/tree/README.md" $(LAB_OPTIONS)

# Two workers; tests/conftest.py gives each torch one thread, or they would wait for each other. What takes longest begins first.
test: .venv/peers
	$(BIN)/python -m pytest tests/test_answers.py tests/test_lessons.py tests/test_checker.py notebooks tests --nbval-lax -q -n 2 --dist loadfile --no-loadscope-reorder --durations=8

mutants: .venv/ready
	$(BIN)/python -m lessons.mutants $(OPTIONS)

demo: .venv/ready
	$(BIN)/python -m minilora finetune --text minilora/data.py --steps 150 --out runs/demo --force

compare: .venv/ready
	$(BIN)/python -m minilora compare --quick $(OPTIONS)

bench: .venv/peers
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py $(OPTIONS)

soak: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py $(OPTIONS)

notebooks: .venv/ready
	$(BIN)/python notebooks/execute.py

.venv/ready: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one by: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt -c constraints.txt
	mkdir -p .venv/share/jupyter/lab/settings
	cp notebooks/jupyterlab.json .venv/share/jupyter/lab/settings/overrides.json
	touch $@

.venv/peers: .venv/ready requirements-peers.txt
	$(BIN)/python -m pip install -q -r requirements-peers.txt -c constraints.txt
	touch $@
