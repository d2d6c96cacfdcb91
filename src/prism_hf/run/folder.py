"""The output folder of a run: the recipe it belongs to, the launch that holds it, and leftovers of earlier launches.

Loads no torch, so that a command can check its folders and its source at once.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError, RecipeError
from ..recipe import NO_IMAGES, Recipe, differing_keys, dump_recipe, load_recipe
from ..runtime import (
    DRAFT,
    HOLDER,
    LOCK,
    clear_drafts,
    folder_or_hub_id,
    holder_text,
    locked,
    restore_swapped,
    set_aside,
    write_bytes,
)

if TYPE_CHECKING:
    from .context import Run

PARTS = ("dataset", "control", "student")
"""Folders of a run that are meant for users."""


def check_at_once(recipe: Recipe, folder: Path, teachers: Path, *, fresh: bool = False) -> None:
    """Check the source and the folders of a run, before torch is loaded. Writes nothing."""
    check_source(recipe.data.source, "data.source")
    check_folder(folder, recipe, fresh=fresh)
    check_place(teachers, "--teachers")


def check_source(source: str, name: str) -> None:
    """Raise a `DataError` if a source is not `digits`, a folder, or a Hub id. The message names what has set it."""
    if source not in ("digits", NO_IMAGES):
        folder_or_hub_id(source, f"{name} {source!r}", give="`digits`, a Hub id or the path of a folder")


def check_folder(folder: Path, recipe: Recipe, *, fresh: bool = False) -> None:
    """Raise an `OutputError` if `folder` is not and cannot become the output of `recipe`. Writes nothing.

    With `fresh`, a run of any recipe is accepted, since it will be moved aside. The error names the keys that differ.
    """
    check_place(folder, "--output")
    if (folder / "recipe.yaml").is_file():
        if not fresh:
            _check_recipe(folder, recipe)
        return
    # A launch that was killed before it wrote its recipe leaves only these files and drafts.
    ours = (LOCK, HOLDER)
    if folder.is_dir() and any(path.name not in ours and not path.name.startswith(DRAFT) for path in folder.iterdir()):
        raise OutputError(f"output {str(folder)!r} is not empty and does not contain a run; use another one (--output DIR)")


def check_place(folder: Path, option: str) -> None:
    """Raise an `OutputError` if `folder` is not and cannot become a folder. The message names the option that sets it."""
    try:
        is_file = any(path.exists() and not path.is_dir() for path in (folder, *folder.parents))
    except OSError as error:  # a name that is too long
        raise OutputError(
            f"{str(folder)!r} cannot be used as a folder ({error.strerror}); choose another one with {option}"
        ) from error
    if is_file:
        raise OutputError(f"{str(folder)!r} is a file, or inside one; choose a folder with {option}")


def _check_recipe(folder: Path, recipe: Recipe) -> None:
    remedy = "se another folder (--output DIR), or --fresh to move this one aside"
    check_same_recipe(folder, recipe, "output", unreadable=f"; u{remedy}", other=f". U{remedy}")


def check_same_recipe(folder: Path, recipe: Recipe, what: str, *, unreadable: str = "", other: str = "") -> None:
    """Raise an `OutputError` if a folder has a run of another recipe. `unreadable` and `other` end the messages."""
    try:
        theirs = load_recipe(folder / "recipe.yaml")
    except RecipeError as error:
        raise OutputError(f"{what} {str(folder)!r} contains a recipe that cannot be read ({error}){unreadable}") from error
    if theirs.fingerprint() != recipe.fingerprint():
        keys = ", ".join(differing_keys(theirs, recipe))
        raise OutputError(f"{what} {str(folder)!r} belongs to another recipe; these keys differ: {keys}{other}")


def is_of_another(folder: Path, recipe: Recipe) -> bool:
    """Return whether `folder` contains a run of another recipe, or a run whose recipe cannot be read."""
    if not (folder / "recipe.yaml").is_file():
        return False
    try:
        _check_recipe(folder, recipe)
    except OutputError:
        return True
    return False


@contextmanager
def claimed(folder: Path, recipe: Recipe, *, fresh: bool = False) -> Iterator[str | None]:
    """Claim `folder` as the output of `recipe`, unless it already is, and hold it for the duration of the block.

    With `fresh`, an existing run of any recipe is moved aside; nothing is deleted. Yields a log line about leftovers of an
    earlier launch, or `None`. Raises the errors of `check_folder`.
    """
    # Check before locking, so that a folder that is not ours stays unchanged.
    check_folder(folder, recipe, fresh=fresh)
    line = None
    if fresh and (folder / "recipe.yaml").is_file():
        with locked(folder):
            aside = set_aside(folder)
        # The lock's own files were moved too. They have no meaning there.
        (aside / LOCK).unlink(missing_ok=True)
        (aside / HOLDER).unlink(missing_ok=True)
        line = f"the old run was moved to {aside}"
    with locked(folder) as killed:
        check_folder(folder, recipe)
        for name in PARTS:
            restore_swapped(folder / name)
        # Not inside DIR/teachers, where other runs may be writing.
        drafts = clear_drafts(folder, deep=False) + sum(clear_drafts(folder / name) for name in ("work", *PARTS))
        if not (folder / "recipe.yaml").is_file():
            write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
        if killed is not None:
            removed = f" ({drafts} drafts removed)" if drafts else ""
            line = f"{holder_text(killed)}, ended without cleaning up; resuming{removed}"
        yield line


@contextmanager
def claimed_together(run: "Run", *, fresh: bool = False) -> Iterator[str | None]:
    """Hold the folder of a run for all processes. The first one claims it and yields the line; the others wait."""
    with ExitStack() as stack:
        line = None
        if run.accelerator.is_main_process:
            line = stack.enter_context(claimed(run.folder, run.recipe, fresh=fresh))
        run.accelerator.wait_for_everyone()
        yield line


@contextmanager
def held_together(run: "Run") -> Iterator[None]:
    """Hold a folder without a recipe for all processes, or raise an `OutputError` if another launch holds it."""
    with ExitStack() as stack:
        if run.accelerator.is_main_process:
            stack.enter_context(locked(run.folder))
            clear_drafts(run.folder)
        run.accelerator.wait_for_everyone()
        yield
