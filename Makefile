.PHONY: style quality test test-slow cards

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
	pytest -m "slow or not slow"

cards:
	python benchmarks/render.py
