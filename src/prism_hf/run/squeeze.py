"""The stage squeeze: train the `squeeze:` teachers that do not exist yet."""

from functools import partial

from ..evaluation import remarks_on
from ..models import (
    check_squeezed,
    clear_scratch,
    is_squeezed,
    read_squeezed,
    squeeze_operations,
    squeeze_steps,
    squeeze_teacher,
    teacher_folder,
)
from ..runtime import Progress, sound_or_aside, write_json
from .artifacts import SQUEEZED
from .context import Run


def squeeze(run: Run) -> None:
    """Train every `squeeze:` teacher of the recipe that is not trained yet, and save it in the folder of teachers."""

    def train(name: str, progress: Progress) -> None:
        device, every_s = run.accelerator.device, run.checkpoint_s
        root, at_step = run.teachers_root, progress.reach
        squeeze_teacher(name, run.recipe, run.data, root, device=device, every_s=every_s, at_step=at_step)

    names = run.recipe.squeezed_teachers
    steps = squeeze_steps(run.recipe, run.data) if names else 1
    is_done, size, cost = partial(_is_trained, run), (lambda _: steps), partial(squeeze_operations, run.recipe)
    run.share("squeeze", names, is_done=is_done, do=train, unit="teacher", size=size, cost=cost, steps="step")
    scores = run.squeezed_top1
    for name, top1 in scores.items():
        run.say(f"squeeze: {name} has {100 * top1:.1f} % top-1 accuracy on the test data")
    classes, count = run.recipe.data.num_classes, len(run.data.test) if scores else 0
    for remark in remarks_on(scores, run.recipe.teachers.verifier, (), classes=classes, count=count):
        run.say(f"warning: {remark} Raise squeeze.epochs, or check the data.")
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
