"""Several output folders of one run: each machine does its part in its own folder, and one folder takes over the rest."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..dataset import IMAGES, VIEWS
from ..errors import DamagedError, OutputError, StageError
from ..recipe import plan_jobs
from ..runtime import Artifact, count_text, is_finished, read_proof, unfinished
from .context import Run
from .folder import check_same_recipe
from .relabel import image_sets


def check_folders(run: Run, folders: Sequence[Path]) -> None:
    """Raise an `OutputError` if a folder is not another folder of the same recipe. Writes nothing."""
    for folder in folders:
        if not (folder / "recipe.yaml").is_file():
            raise OutputError(f"--merge {str(folder)!r} does not contain a run; give output folders of the same recipe")
        if folder.resolve() == run.folder.resolve():
            raise OutputError(f"--merge {str(folder)!r} is the output folder itself; name the others")
        check_same_recipe(folder, run.recipe, "--merge")


def merge(run: Run, folders: Sequence[Path]) -> None:
    """Copy the finished images and label shards that this folder lacks from the other folders of the run.

    Raises:
        StageError: A file was made from other data or teachers, is damaged, or differs from the one that is here.
    """
    jobs = plan_jobs(run.recipe)
    _take_all(run, [run.artifacts.job(job) for job in jobs], folders, "job")
    if unfinished(run.accelerator, jobs, lambda job: run.artifacts.job(job).is_whole()):
        return  # labels are made once all images are there
    sets = image_sets(run)
    for table, unit in ((IMAGES, "image shard"), (VIEWS, "view shard")):
        shards = [run.artifacts.shard(*task) for task in run.artifacts.shard_tasks(sets, table)]
        _take_all(run, shards, folders, unit, same=table == VIEWS)


def _take_all(run: Run, files: Sequence[Artifact], folders: Sequence[Path], unit: str, *, same: bool = True) -> None:
    """Copy what is missing. With `same`, files that are in two folders must be equal.

    Every machine labels all images itself, and other hardware may round those labels in another way: ours are kept.
    """
    if run.accelerator.is_main_process:
        pairs = [(file, folder / "work" / file.path.relative_to(run.work)) for file in files for folder in folders]
        taken = sum(_take(file, path, same=same) for file, path in pairs)
        run.say(f"merge: took over {count_text(taken, unit)}")
    run.accelerator.wait_for_everyone()


def _take(mine: Artifact, path: Path, *, same: bool) -> bool:
    """Copy a finished file of another folder, unless it is here already. Return whether it was copied."""
    if not is_finished(path):
        return False
    try:
        proof = Artifact(path, mine.key).check()
    except DamagedError as error:
        raise StageError(f"cannot merge: {error}; merge folders of one recipe, data and set of teachers") from error
    if not mine.is_whole():
        mine.write(lambda draft: shutil.copyfile(path, draft), proof.notes)
        return True
    if same and read_proof(mine.path).sha256 != proof.sha256:
        raise StageError(
            f"cannot merge: {path} and {mine.path} are the same part of the run but differ, since other hardware rounds "
            "differently; remove one of them and its .seal, or give each machine its own part (--part)"
        )
    return False
