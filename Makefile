# Each target does its own set-up: a .venv in this folder, with the versions of constraints.txt.
#   make repro                         fetch the bundled sample, run the whole pipeline
#   make test                          the library's notebooks, and the tests, on all cores (JOBS=1: on one)
#   make bench                         speed beside other libraries (SIZE=full: for a GPU)
#   make lab                           JupyterLab on nbs/
#   make repro PYTHON=python3.12       another interpreter for the set-up
# The folder may have spaces and accents in its path: what make treats as names of files is relative.
PYTHON ?= python3
SIZE   ?= quick
# processes that test, one thread each: as many as cores, but no more than eight, each of which takes a gigabyte
JOBS   ?= $(shell n=`nproc`; echo $$((n < 8 ? n : 8)))
# encoders that run side by side in `make repro`, threads shared out; 0: as many as cores, at most four
SIDE   ?= 0
VENV   := .venv
STAMP  := $(VENV)/.set-up
HERE   := $(CURDIR)/$(VENV)
export HERE
export VIRTUAL_ENV := $(HERE)
export PATH := $(HERE)/bin:$(PATH)
# an interpreter by its path, which may have spaces, or a command of several words
WORDS  := $(if $(shell command -v "$(PYTHON)" 2>/dev/null),"$(PYTHON)",$(PYTHON))
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help setup repro test bench lab readme params clean

help: ## these lines
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

setup: $(STAMP) ## .venv with pinned versions, the package installed editable, and all that development needs

$(STAMP): EXTRAS = dev
$(STAMP)-pipeline: EXTRAS = pipeline,natural
$(STAMP)-notebooks: EXTRAS = notebooks,natural
SETUPS = $(STAMP) $(STAMP)-pipeline $(STAMP)-notebooks

$(SETUPS): settings.ini setup.py pyproject.toml constraints.txt
	@case "$$HERE" in *[\"\`\$$\\:]*) \
	  echo "The path of this folder holds one of \" \` \$$ \\ : which set-up cannot quote everywhere. Move it, and try again: $$HERE" >&2; exit 1;; esac
	@test -x $(VENV)/bin/python || $(WORDS) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "sdmae needs Python 3.11 or newer; \`$(PYTHON)\` is `$(WORDS) --version 2>&1`. Choose another: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
	test -x $(VENV)/bin/python || $(WORDS) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@ $(if $(findstring dev,$(EXTRAS)),$(SETUPS)) $(if $(findstring notebooks,$(EXTRAS)),$(STAMP)-pipeline) # it holds the smaller ones

repro: $(STAMP)-pipeline ## fetch the bundled sample and run the pipeline
	@python -m sdmae.made || dvc config --local core.no_scm true
	dvc pull data.dvc
	python -m sdmae.pipeline repro --jobs $(SIDE)
	@echo && echo "Scores: sdmae compare   curves: dvc plots show   did a change move a number: git add dvc.lock metrics, commit, dvc metrics diff"

test: setup ## the library's notebooks and the tests: also that notebooks, library, README and params.yaml agree
	OMP_NUM_THREADS=1 nbdev_test --path nbs --skip_folder_re '^[_.]' --skip_file_re '^([_.0-9]|speed|growth)' --n_workers $(JOBS) --do_print
	pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

bench: setup ## speed beside other libraries, and cost as work grows; SIZE=full for a GPU
	python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	for page in speed growth; do \
	  python -m sdmae.pipeline run nbs/bench/$$page.ipynb reports/bench/$(SIZE)/$$page.ipynb -p size $(SIZE) -p metrics nbs/bench/results/$(SIZE)_$$page.json && \
	  python -m sdmae.pipeline html reports/bench/$(SIZE)/$$page.ipynb reports/bench/$(SIZE)/$$page.html || exit 1; \
	done
	@echo && echo "The benchmark: reports/bench/$(SIZE)/speed.html and growth.html   (numbers: nbs/bench/results)"

# saved notebooks are cleaned, so that a one-line edit is a one-line diff; nothing is asked of the internet
LAB = --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter --LabApp.news_url=None \
      --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(if $(filter 0,$(shell id -u)),--allow-root)

lab: $(STAMP)-notebooks ## JupyterLab on nbs/
	cd nbs && jupyter lab $(LAB)

readme: setup ## README.md from nbs/index.ipynb
	python -m sdmae.pipeline readme

params: setup ## params.yaml from conf/, after an edit there
	python -m sdmae.params

clean: ## stripped notebooks and caches; runs, reports and data stay
	rm -rf build _proc _docs dvc_plots .pytest_cache
