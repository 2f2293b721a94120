# The whole development surface. Every target makes what it needs; nothing outside .venv and .cache is touched.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export TRANSLOAD_CACHE ?= $(CURDIR)/.cache

.PHONY: install demo test check bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml ci/install
	ci/install "$(PYTHON)" "$(VENV)"
	touch $@

demo: install
	ci/demo "$(VENV)"

test: install
	ci/test "$(VENV)"

check: install
	ci/check "$(VENV)"

clean:
	rm -rf $(VENV) .cache build dist
