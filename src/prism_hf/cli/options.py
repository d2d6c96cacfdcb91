"""Options and behavior that commands share: recipes and overrides, quiet libraries, errors in one line."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import PrismError, RecipeError, StoppedError
from ..recipe import Recipe, load_recipe
from ..runtime import EVERY_S, leave_at_once, stopping_cleanly

Command = Callable[[argparse.Namespace], int | None]
"""What runs a command: its options -> its exit code; `None` is 0."""


def run_command(command: Command, args: argparse.Namespace) -> int:
    """Run a command; an error of ours is one line on stderr and exit code 2, with a traceback only for `--debug`."""
    try:
        with stopping_cleanly():
            return command(args) or 0
    except (StoppedError, KeyboardInterrupt):
        leave_at_once()  # the line about a signal is on the terminal already
        sys.stderr.write("interrupted: finished work is kept; run the same command again to resume\n")
        return 130
    except PrismError as error:
        if args.debug:
            raise
        # Words of a hostile file may hold codes for the terminal.
        text = "".join(letter if letter.isprintable() else "\ufffd" for letter in str(error))
        sys.stderr.write(f"{type(error).__name__}: {text}\n")
        return 2


def quiet() -> None:
    """Our log lines, without the progress bars and notices of the libraries below."""
    # Imported here: a command that only reads a recipe does not wait for them.
    import datasets
    import huggingface_hub
    import transformers

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("prism_hf").setLevel(logging.INFO)
    logging.getLogger("timm").setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]


def add_compute(parser: argparse.ArgumentParser) -> None:
    """Options of every command that computes."""
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads per process; default: all cores shared")
    every = f"keep the state of long jobs this often; default: {EVERY_S:g}"
    parser.add_argument("--checkpoint-every", type=_seconds, default=EVERY_S, metavar="SECONDS", help=every)


def add_target(parser: argparse.ArgumentParser) -> None:
    """Options of a push to the Hub."""
    visible = parser.add_mutually_exclusive_group()
    visible.add_argument("--private", dest="public", action="store_false", help="only you and your organization (default)")
    visible.add_argument("--public", action="store_true", help="everybody can read it")
    parser.add_argument("--revision", metavar="BRANCH", default="main", help="push to a branch, created if missing")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    parser.add_argument("--replace", action="store_true", help="publish even over something else that the repo holds")
    parser.set_defaults(public=False)


def push_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_target`, as a `Target` takes them."""
    return {"public": args.public, "revision": args.revision, "create_pr": args.create_pr, "replace_other": args.replace}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 86400:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected seconds, 0 to 86400, got {text!r}")


def teachers_folder(args: argparse.Namespace, output: Path) -> Path:
    """Where squeezed teachers are kept: recipes in outputs/ share them, a named output keeps everything inside itself."""
    return Path(args.teachers or (output / "teachers" if args.output else "outputs/teachers"))


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positional words -> (paths, `dotted.key=value` overrides)."""
    overrides = [word for word in words if "=" in word and not os.path.exists(word)]  # Path.exists raises at long words
    return [word for word in words if word not in overrides], overrides


def read_recipe(words: Sequence[str], default: Path | None = None) -> Recipe:
    """The one recipe among positional words, with its overrides; `default` where none is named."""
    paths, overrides = split_overrides(words)
    if not paths and default is not None:
        return load_recipe(default, overrides)
    if len(paths) != 1:
        raise RecipeError(f"expected one recipe, got {', '.join(paths) or 'none'}; overrides are written key=value")
    return load_recipe(paths[0], overrides)
