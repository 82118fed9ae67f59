PYTHON ?= python3

.PHONY: setup test demo

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

test: setup
	.venv/bin/python -m pytest tests

demo: setup
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash runs/demo.sh
