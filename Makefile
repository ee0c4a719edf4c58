.PHONY: check test format

check:  ## lint, types, layers
	ruff check .
	ruff format --check .
	mypy
	lint-imports

test:
	python -m pytest

format:
	ruff check --fix .
	ruff format .
