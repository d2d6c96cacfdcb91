"""Distill a dataset: `prism-hf distill` as a script, for `accelerate launch recipes/prism.py`."""

import sys
from pathlib import Path

# Python puts this folder first on sys.path, where our evaluate.py would shadow the `evaluate` package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from prism_hf.cli.main import main

if __name__ == "__main__":
    recipe = Path(__file__).parent / "digits" / "prism_ipc10.yaml"
    sys.exit(
        main(
            ["distill", *sys.argv[1:]],
            prog="accelerate launch recipes/prism.py",
            is_command_line=True,
            default_recipe=recipe,
        )
    )
