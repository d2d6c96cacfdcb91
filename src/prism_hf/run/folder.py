"""The output folder of a run: whose it is, who holds it, and what an earlier launch left in it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import OutputError, RecipeError
from ..recipe import Recipe, differing_keys, dump_recipe, load_recipe
from ..runtime import DRAFT, HOLDER, LOCK, clear_drafts, holder_text, locked, restore_swapped, set_aside, write_bytes
from .context import Run

PARTS = ("dataset", "control", "student")
"""Folders of a run that people use."""


def check_folder(folder: Path, recipe: Recipe, *, fresh: bool = False) -> None:
    """Find out whether `folder` is, or can become, the output of `recipe`; writes nothing.

    With `fresh`, a run that is there will be moved aside, whatever its recipe. The error names the keys that differ.
    """
    check_place(folder, "--output")
    if (folder / "recipe.yaml").is_file():
        if not fresh:
            _check_recipe(folder, recipe)
        return
    # What a launch leaves that was killed before it had written its recipe.
    ours = (LOCK, HOLDER)
    if folder.is_dir() and any(path.name not in ours and not path.name.startswith(DRAFT) for path in folder.iterdir()):
        raise OutputError(f"output {str(folder)!r} is not empty and holds no run; use another folder (--output DIR)")


def check_place(folder: Path, option: str) -> None:
    """Find out whether `folder` is a folder, or could be one; the `OutputError` names the option that changes it."""
    try:
        is_file = any(path.exists() and not path.is_dir() for path in (folder, *folder.parents))
    except OSError as error:  # a name that is too long
        raise OutputError(
            f"{str(folder)!r} cannot be a folder ({error.strerror}); give another one with {option}"
        ) from error
    if is_file:
        raise OutputError(f"{str(folder)!r} is a file, or below one; give a folder with {option}")


def _check_recipe(folder: Path, recipe: Recipe) -> None:
    try:
        theirs = load_recipe(folder / "recipe.yaml")
    except RecipeError as error:
        raise OutputError(
            f"output {str(folder)!r} holds a recipe that cannot be read ({error}); use --output, or --fresh to move it "
            "aside"
        ) from error
    if theirs.fingerprint() != recipe.fingerprint():
        keys = ", ".join(differing_keys(theirs, recipe))
        raise OutputError(
            f"output {str(folder)!r} belongs to another recipe; these keys differ: {keys}. Use another folder (--output "
            "DIR), or --fresh to move this one aside"
        )


def is_of_another(folder: Path, recipe: Recipe) -> bool:
    """Whether a run of another recipe is in `folder`, or one whose recipe cannot be read."""
    if not (folder / "recipe.yaml").is_file():
        return False
    try:
        _check_recipe(folder, recipe)
    except OutputError:
        return True
    return False


@contextmanager
def claimed(folder: Path, recipe: Recipe, *, fresh: bool = False) -> Iterator[str | None]:
    """Make `folder` the output of `recipe`, or find that it is already, and hold it for the length of the block.

    With `fresh`, a run that is there is moved aside, whatever its recipe; nothing is deleted. Yields a line about what an
    earlier launch left, or `None`; raises as `check_folder`.
    """
    # Before the lock: a folder that is not ours stays as it is.
    check_folder(folder, recipe, fresh=fresh)
    line = None
    if fresh and (folder / "recipe.yaml").is_file():
        with locked(folder):
            aside = set_aside(folder)
        # The lock's own files went along; they mean nothing there.
        (aside / LOCK).unlink(missing_ok=True)
        (aside / HOLDER).unlink(missing_ok=True)
        line = f"the old run was moved to {aside}"
    with locked(folder) as killed:
        check_folder(folder, recipe)
        for name in PARTS:
            restore_swapped(folder / name)
        # Not below DIR/teachers: other runs may be at work there.
        drafts = clear_drafts(folder, deep=False) + sum(clear_drafts(folder / name) for name in ("work", *PARTS))
        if not (folder / "recipe.yaml").is_file():
            write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
        if killed is not None:
            removed = f" ({drafts} drafts removed)" if drafts else ""
            line = f"{holder_text(killed)}, ended without a word; going on{removed}"
        yield line


@contextmanager
def claimed_together(run: Run, *, fresh: bool = False) -> Iterator[str | None]:
    """Hold the folder of a run for all processes: the first one claims it and gets the line, the others wait for it."""
    with ExitStack() as stack:
        line = None
        if run.accelerator.is_main_process:
            line = stack.enter_context(claimed(run.folder, run.recipe, fresh=fresh))
        run.accelerator.wait_for_everyone()
        yield line


@contextmanager
def held_together(run: Run) -> Iterator[None]:
    """Hold a folder that has no recipe of its own, for all processes; an `OutputError` if another launch holds it."""
    with ExitStack() as stack:
        if run.accelerator.is_main_process:
            stack.enter_context(locked(run.folder))
            clear_drafts(run.folder)
        run.accelerator.wait_for_everyone()
        yield
