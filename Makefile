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

# Use OSV: this fails if the service does not respond. The other service passes packages that it cannot find.
audit:
	pip-audit --vulnerability-service osv --skip-editable --progress-spinner off
