"""Entry point of `python -m prism_hf COMMAND ...` and `accelerate launch -m prism_hf COMMAND ...`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
