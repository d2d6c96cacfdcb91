"""Options and behavior that commands share: recipes and overrides, quiet libraries, one-line errors."""

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
from ..run.threads import recorded_threads
from ..runtime import EVERY_S, best_processes, leave_at_once, stopping_cleanly

NO_CONTROL = "make no random real images to compare with, which saves half of the relabeling"
Command = Callable[[argparse.Namespace], int | None]
"""A function that runs a command: options -> exit code; `None` means 0."""


def run_command(command: Command, args: argparse.Namespace) -> int:
    """Run a command and return its exit code. A `PrismError` is printed as one line, or raised again with `--debug`."""
    try:
        with stopping_cleanly():
            return command(args) or 0
    except (StoppedError, KeyboardInterrupt):
        leave_at_once()  # exits if a signal came, whose message is already on the terminal
        sys.stderr.write("interrupted: finished work is kept; run the same command again to resume\n")
        return 130
    except PrismError as error:
        if args.debug:
            raise
        # Text from an untrusted file may contain terminal escape codes.
        text = "".join(letter if letter.isprintable() else "\ufffd" for letter in str(error))
        sys.stderr.write(f"{type(error).__name__}: {text}\n")
        return 2


def quiet() -> None:
    """Show our log lines, and hide progress bars and notices of other libraries."""
    # Imported here, so that commands that only read a recipe start quickly.
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
    """Add the options of every command that computes."""
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads per process; default: cores/processes")
    several = "processes on this machine; default: one per core for images up to 64 pixels on a CPU, else one"
    parser.add_argument("--processes", type=_positive, metavar="N", help=several)
    every = f"seconds between checkpoints of long jobs; default: {EVERY_S:g}"
    parser.add_argument("--checkpoint-every", type=_seconds, default=EVERY_S, metavar="SECONDS", help=every)


def processes(args: argparse.Namespace, size: int | None, work: Path | None) -> int:
    """Return the number of processes for images of `size` pixels, after earlier launches in `work`, if both are known."""
    if args.processes is not None or args.threads is not None or size is None or not args.is_command_line:
        return args.processes or 1
    return best_processes(size, None if work is None else recorded_threads(work))


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the options of a push to the Hub."""
    visible = parser.add_mutually_exclusive_group()
    visible.add_argument("--private", dest="public", action="store_false", help="use a private repo (default)")
    visible.add_argument("--public", action="store_true", help="make the repo public")
    parser.add_argument("--revision", metavar="BRANCH", default="main", help="branch to push to; created if missing")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    parser.add_argument("--replace", action="store_true", help="publish even if the repo contains something else")
    parser.set_defaults(public=False)


def push_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_target` as keyword arguments of `Target`."""
    return {"public": args.public, "revision": args.revision, "create_pr": args.create_pr, "replace_other": args.replace}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 86400:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 to 86400, got {text!r}")


def part(text: str) -> tuple[int, int]:
    """Read `I/N`: part I of N."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected I/N such as 2/3, got {text!r}")
    return int(number), int(count)


def teachers_folder(args: argparse.Namespace, output: Path) -> Path:
    """Return the folder of squeezed teachers: shared in outputs/ by default, or inside the folder given by --output."""
    return Path(args.teachers or (output / "teachers" if args.output else "outputs/teachers"))


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split positional words into paths and `dotted.key=value` overrides."""
    overrides = [word for word in words if "=" in word and not os.path.exists(word)]  # Path.exists raises for long words
    return [word for word in words if word not in overrides], overrides


def read_recipe(words: Sequence[str], default: Path | None = None) -> Recipe:
    """Load the one recipe among positional words, or `default` if there is none, with its overrides."""
    paths, overrides = split_overrides(words)
    if not paths and default is not None:
        return load_recipe(default, overrides)
    if len(paths) != 1:
        raise RecipeError(f"expected one recipe, got {', '.join(paths) or 'none'}; write overrides as key=value")
    return load_recipe(paths[0], overrides)
