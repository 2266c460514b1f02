# Every target does its own set-up. PYTHON is any Python 3.11.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup series test book notebooks compare bench images kaggle lint clean

setup: $(READY)

$(READY): requirements.txt constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: put python3.11 on PATH or call make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

series: setup          ## the three notebooks offline, then the book with what they showed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/promptrec series --out runs/local
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/build_book.py --notebooks runs/local/notebooks --out runs/local/book
	@echo "book: runs/local/book/_build/html/index.html"

test: setup            ## lint and every test, one process a core
	$(BIN)/ruff check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n auto --dist loadfile

book: setup            ## the book from the committed notebooks, warnings are errors
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/build_book.py

notebooks: setup       ## run the series and commit-ready notebooks/*.ipynb from it
	rm -rf runs/local
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/promptrec series --out runs/local
	cp runs/local/notebooks/*.ipynb notebooks/
	rm -rf runs/local/adapter-keras
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/run_notebook.py notebooks/2-fine-tune-tpu.py notebooks/beyond/*.py

compare: setup         ## every method on one split, three seeds; under an hour on two cores, resumable
	test -f runs/local/training_data.csv || PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/promptrec series --part 1-generate-data
	$(BIN)/promptrec compare runs/local/training_data.csv --out runs/compare
	$(BIN)/python scripts/draw_comparison.py runs/compare/results.json

bench: setup           ## the benchmarks; make bench TEST=triples.jsonl TRAIN=more.jsonl PROMPTS=prompts.txt
	$(BIN)/python benchmarks/mean_prompt.py $(PROMPTS)
	$(if $(TEST),$(BIN)/python benchmarks/recover.py $(TEST) --train $(TRAIN))

images: setup          ## redraw the diagrams
	$(BIN)/python images/draw.py

kaggle: setup          ## data set, kernels and standalone notebooks in build/kaggle: make kaggle OWNER=your-kaggle-name
	$(BIN)/python scripts/build_kaggle.py $(if $(OWNER),--owner $(OWNER))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf runs build _build
