"""Distill datasets, evaluate and compare them, share and check them.

`prism-hf COMMAND --help` explains a command. `distill`, `squeeze`, `evaluate` and `compare` also run on several processes:
`accelerate launch ... -m prism_hf COMMAND ...`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from . import compare, distill, evaluate, export, push, squeeze, status, verify
from .options import add_debug, run_command

COMMANDS = {
    "distill": distill,
    "squeeze": squeeze,
    "evaluate": evaluate,
    "compare": compare,
    "status": status,
    "push": push,
    "verify": verify,
    "export": export,
}
"""Each module describes its command in its docstring, and has `add_options(parser)` and `run(args)`."""


def parse(
    argv: Sequence[str] | None = None, *, prog: str | None = None, default_recipe: Path | None = None
) -> argparse.Namespace:
    """The options of a command line; `run` is the function of its command.

    Args:
        argv: Words after the program's name; default: those of this process.
        prog: What the user types in place of `prism-hf COMMAND`, for help and for the record of a comparison.
        default_recipe: Recipe of `distill` where none is named.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("prism-hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"prism-hf {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    parsers = {}
    for name, module in COMMANDS.items():
        description = module.__doc__ or ""
        parsers[name] = command = subparsers.add_parser(
            name,
            prog=prog or f"prism-hf {name}",
            help=description.partition("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_options(command)
        add_debug(command)
        command.set_defaults(run=module.run, parser=command, argv=words[1:], default_recipe=default_recipe)
    if words and words[0] in parsers:
        # Not by the parser above: recipes, overrides and options may stand in any order.
        return parsers[words[0]].parse_intermixed_args(words[1:])
    return parser.parse_args(words)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, default_recipe: Path | None = None) -> int:
    """Run a command line, see `parse`; returns its exit code."""
    args = parse(argv, prog=prog, default_recipe=default_recipe)
    return run_command(args.run, args)
