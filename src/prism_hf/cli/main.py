"""Distill image datasets, evaluate and compare them, and publish and verify them.

`prism-hf COMMAND --help` explains a command. `prism-hf recipes` lists the recipes that come with the package.
`prism-hf digits/prism_ipc10` is short for `prism-hf distill digits/prism_ipc10`. The commands `distill`, `squeeze`,
`evaluate` and `compare` can use several processes: `accelerate launch ... -m prism_hf COMMAND ...`.
"""

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from .compare import compare
from .distill import distill
from .evaluate import evaluate
from .export import export
from .options import run_command
from .push import push
from .recipes import recipes
from .squeeze import squeeze
from .status import status
from .verify import verify

COMMANDS = (distill, recipes, squeeze, evaluate, compare, status, push, verify, export)
"""Each function adds the options of its command to a parser and returns the code to run. Its docstring is the help."""


def parse(
    argv: Sequence[str] | None = None, *, prog: str | None = None, default_recipe: Path | None = None
) -> argparse.Namespace:
    """Parse a command line, by default that of this process. The attribute `run` of the result runs the command.

    `prog` replaces `prism-hf COMMAND` in the help; `default_recipe` is for `distill` if the command line has no recipe.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].isalpha() and words[0] not in ("-h", "--help", "--version"):
        words.insert(0, "distill")  # a recipe, an override or an option; command names have only letters
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("prism-hf", description=__doc__, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"prism-hf {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add_options in COMMANDS:
        name, description = add_options.__name__, inspect.getdoc(add_options) or ""
        help_ = description.partition("\n")[0]
        command = subparsers.add_parser(
            name, prog=prog or f"prism-hf {name}", help=help_, description=description, formatter_class=formatter
        )
        run = add_options(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run, parser=command, argv=words[1:], default_recipe=default_recipe)
        if words[:1] == [name]:
            # Not with the parser above, so that recipes, overrides and options may come in any order.
            return command.parse_intermixed_args(words[1:])
    return parser.parse_args(words)


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    default_recipe: Path | None = None,
    is_command_line: bool | None = None,
) -> int:
    """Run a command line (see `parse`) and return its exit code.

    `is_command_line` says whether this process was started to run it, so that more processes may be started in the same
    way; by default, whether `argv` is left out.
    """
    args = parse(argv, prog=prog, default_recipe=default_recipe)
    args.is_command_line = argv is None if is_command_line is None else is_command_line
    return run_command(args.run, args)
