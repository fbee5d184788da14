# make lab | demo | test | lint | types | unit | notebooks | browser | clean. README.md says what each is for.
#   PYTHON=python3.12   the interpreter .venv is built from (default: the first Python >= 3.11 that is found)
#   CPU=1               on Linux without a GPU: torch's CPU build (about 0.2 GB instead of 3 GB)

VENV := .venv
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -p no:cacheprovider -rs
PIP_FLAGS := $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)
# In a terminal pip shows its progress bars; a log gets warnings and errors only.
INSTALL = quiet=--quiet; [ -t 1 ] && quiet=; \
    $(PY) -m pip install $$quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
SETTINGS := $(VENV)/share/jupyter/lab/settings
QUIET := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}

.PHONY: lab demo test lint types unit notebooks browser clean
.NOTPARALLEL:

# Threads of OpenMP that wait in a busy loop take the cores that a browser on the same machine needs: with Chromium beside
# it the bundled model lost nine tenths of its speed. Waiting in the loop only briefly costs a seventh on an idle machine.
lab notebooks browser: export GOMP_SPINCOUNT := 1000

# As root JupyterLab wants to be told so; without a display it prints its address instead of opening a browser.
# The token stays on, the server listens on this machine only, asks nobody for news or updates, and does not ask whether it
# may.
lab: $(INSTALLED)
	@mkdir -p $(SETTINGS); echo '$(QUIET)' > $(SETTINGS)/overrides.json; \
	set -- --ServerApp.ip=127.0.0.1 --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb --LabApp.news_url=None \
	    --LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate; \
	if [ "$$(id -u)" = 0 ]; then set -- "$$@" --allow-root; fi; \
	if [ "$$(uname)" = Linux ] && [ -z "$$DISPLAY$$WAYLAND_DISPLAY" ]; then \
	    echo "No display here: JupyterLab prints its address below; open it in a browser."; \
	    set -- "$$@" --no-browser; \
	fi; \
	exec $(PY) -m jupyterlab "$$@"

demo: $(INSTALLED)
	@$(PY) -m workbench.demo

# Every part runs even where an earlier one failed; the unit tests come last, so that theirs are the closing lines.
test: $(INSTALLED_TEST)
	@failed=; \
	for part in lint types notebooks browser unit; do \
	    echo "== make $$part"; \
	    $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; \
	done; \
	if [ -n "$$failed" ]; then echo "Failed:$$failed"; exit 1; fi

lint: $(INSTALLED_TEST)
	$(PY) -m ruff check

types: $(INSTALLED_TEST)
	$(PY) -m mypy

# tests/gpu skips itself where there is no CUDA device.
unit: $(INSTALLED_TEST)
	$(PYTEST) --numprocesses logical --maxprocesses 4 --dist worksteal tests/unit tests/gpu

notebooks: $(INSTALLED_TEST)
	$(PYTEST) --nbval notebooks

browser: $(INSTALLED_TEST)
	$(PYTEST) tests/browser

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(PY):
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "Building $(VENV) with $$("$$python" --version) ($$(command -v "$$python"))"; \
	        if "$$python" -m venv $(VENV) && $(PY) -m pip --version >/dev/null; then exit 0; fi; \
	        rm -rf $(VENV); \
	        echo "$$python cannot build environments; Debian and Ubuntu keep that part in the package python3-venv" >&2; \
	    fi; \
	done; \
	echo "InferLab needs Python 3.11 or newer with the venv module, and found none:" \
	    "install one, or name it: make lab PYTHON=/path/to/python3.12" >&2; \
	exit 1

$(INSTALLED): pyproject.toml constraints.txt | $(PY)
	@echo "Installing InferLab into $(VENV): some minutes the first time"
	@$(INSTALL) -e .
	@touch $@

$(INSTALLED_TEST): pyproject.toml constraints.txt | $(PY)
	@echo "Installing InferLab and what its tests need into $(VENV): some minutes the first time"
	@$(INSTALL) -e '.[test]'
	@touch $@ $(INSTALLED)
