.PHONY: style quality test test-slow cards audit

style:
	ruff format .
	ruff check --fix .

quality:
	ruff format --check .
	ruff check .
	mypy
	python benchmarks/render.py --check

test:
	pytest

test-slow:
	pytest -m slow

cards:
	python benchmarks/render.py

# OSV, since the other service passes what it cannot find: without an answer this fails.
audit:
	pip-audit --vulnerability-service osv --skip-editable --progress-spinner off
