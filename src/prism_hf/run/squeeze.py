"""The stage squeeze: train the `squeeze:` teachers that do not exist yet."""

from ..models import check_squeezed, clear_scratch, is_squeezed, read_squeezed, squeeze_teacher, teacher_folder
from ..runtime import Progress, sound_or_aside, write_json
from .artifacts import SQUEEZED
from .context import Run


def squeeze(run: Run) -> None:
    """Train every `squeeze:` teacher of the recipe that is not trained yet, and save it in the folder of teachers."""

    def train(name: str, progress: Progress) -> None:
        device, every_s = run.accelerator.device, run.checkpoint_s
        squeeze_teacher(name, run.recipe, run.data, run.teachers_root, device=device, every_s=every_s)

    names = run.recipe.squeezed_teachers
    run.share("squeeze", names, is_done=lambda name: _is_trained(run, name), do=train, unit="teacher")
    scores = run.squeezed_top1
    for name, top1 in scores.items():
        run.say(f"squeeze: {name} has {100 * top1:.1f} % top-1 accuracy on the test data")
    if run.accelerator.is_main_process:
        write_json(run.work / SQUEEZED, scores)  # for `prism-hf status`: teachers may be in any folder


def _is_trained(run: Run, name: str) -> bool:
    """Return whether a teacher is complete and was trained on the current data. A damaged one is set aside."""
    folder = teacher_folder(name, run.recipe, run.teachers_root)
    if not is_squeezed(folder) or sound_or_aside(folder, lambda: check_squeezed(folder)) is None:
        return False
    read_squeezed(folder, run.data)
    clear_scratch(folder)
    return True
