"""Train students on a distilled data set, a folder or a Hub id, and print the honest table.

    accelerate launch recipes/evaluate.py DATASET [--student NAME] [--test DATA[:SPLIT]] [--seeds N] [evaluation.K=V ...]

Students see only what the data set contains: images, labels, views. The test data are the recipe's unless named. The
random-real rows appear when the real training data and the teachers can be reached (--teachers DIR for squeezed ones).
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

# Python puts this folder first on its path, where our evaluate.py would hide the package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from prism_hf.cli.options import add_common, quiet, run_command, split_overrides
from prism_hf.errors import DataError, RecipeError, StageError, TeacherError
from prism_hf.recipe.schema import Recipe, to_dict
from prism_hf.recipe.yaml_file import load_recipe, override_recipe, public_recipe

if TYPE_CHECKING:
    from prism_hf.dataset.reader import DistilledDataset
    from prism_hf.images.source import ImageSplit, SourceData
    from prism_hf.models.teacher import Teacher
    from prism_hf.run.context import Run
    from prism_hf.run.stages import Stages


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="DATASET | evaluation.key=value", help="a folder or a Hub id")
    parser.add_argument("--revision", help="of a Hub data set")
    parser.add_argument("--student", metavar="NAME", help="timm architecture, or transformers:MODEL_TYPE")
    parser.add_argument("--test", metavar="DATA[:SPLIT]", help="test data: Hub id or folder; split `test` if not named")
    parser.add_argument("--seeds", type=int, metavar="N", help="students per row")
    where = "squeezed teachers; default: those beside DATASET, or outputs/teachers"
    parser.add_argument("--teachers", type=Path, metavar="DIR", help=where)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/evaluate/<recipe name>")
    add_common(parser)
    return parser.parse_intermixed_args(argv)


def protocol(recipe: Recipe, args: argparse.Namespace, overrides: list[str]) -> Recipe:
    """The recipe in the data set, with the protocol changed as asked; what made the images stays."""
    wrong = [o for o in overrides if not o.startswith("evaluation.")]
    if wrong:
        raise RecipeError(f"override {wrong[0]!r}: only evaluation.* can change for images that exist already")
    if args.seeds is not None:
        if args.seeds < 1:
            raise RecipeError(f"--seeds is {args.seeds}; expected at least 1")
        overrides = [*overrides, f"evaluation.seeds={list(range(args.seeds))}"]
    if args.student is not None:
        overrides = [*overrides, f"evaluation.student={json.dumps(args.student)}"]
    return override_recipe(recipe, overrides)


def main(args: argparse.Namespace) -> None:
    words, overrides = split_overrides(args.words)
    if len(words) != 1:
        raise RecipeError(f"expected one data set, got {len(words)}; protocol changes are written evaluation.key=value")
    quiet()
    from prism_hf.dataset.reader import load_distilled
    from prism_hf.models.build import check_network
    from prism_hf.run.context import Run, check_place, held, make_accelerator

    if args.output is not None:
        check_place(args.output, "--output")
    accelerator = make_accelerator(threads=args.threads)
    with accelerator.main_process_first():
        distilled = load_distilled(words[0], revision=args.revision)
    if distilled.recipe is None:
        raise DataError(f"{words[0]!r} has no recipe.yaml, which names the test data and the protocol")
    recipe = protocol(run_recipe(Path(words[0]), distilled.recipe), args, overrides)
    channels, size = distilled.images_uint8.shape[1], distilled.images_uint8.shape[-1]
    check_network(recipe.evaluation.student, num_classes=len(distilled.class_names), channels=channels, size=size)
    folder = args.output or Path("outputs") / "evaluate" / recipe.name
    # Beside the data set, or in the comparison that its run is part of.
    places = [place / "teachers" for place in Path(words[0]).parents[:4]]
    beside = next((place for place in places if place.is_dir()), Path("outputs") / "teachers")
    teachers = args.teachers or beside
    left_out: dict[str, str] = {}
    data, test = real_parts(args, recipe, distilled.class_names, left_out)
    # One place for all that control and scores depend on: another data set of the same name must not find them.
    place = folder / digest(distilled.content, "" if data is None else data.train.content)
    run = Run(recipe, place, teachers, accelerator, args.checkpoint_every)
    with held(run):
        score_all(run, distilled, data, test, left_out, words[0], args, folder / "report.json")


def score_all(
    run: "Run",
    distilled: "DistilledDataset",
    data: "SourceData | None",
    test: "ImageSplit",
    left_out: dict[str, str],
    source: str,
    args: argparse.Namespace,
    path: Path,
) -> None:
    """Train the students, write the report to `path`, print the table."""
    from prism_hf.dataset.provenance import versions
    from prism_hf.evaluation.report import summary
    from prism_hf.evaluation.students import Keep
    from prism_hf.models.folder import scored_on, source_facts
    from prism_hf.run.scores import Contest, evaluate_contest
    from prism_hf.run.stages import Stages
    from prism_hf.runtime.store import write_json

    recipe, stages = run.recipe, Stages(run)
    train = None if data is None else data.train
    control = None if train is None else find_control(stages, distilled, left_out)
    network = None if train is None else find_judge(stages, left_out)
    contest = Contest(
        distilled=distilled,
        control=control,
        train=train,
        test=test,
        settings=recipe.evaluation,
        view=recipe.relabel.view,
        left_out=left_out,
    )
    settings = to_dict(replace(recipe, evaluation=replace(recipe.evaluation, seeds=(0,))))["evaluation"]
    protocol_key = digest(json.dumps(settings), test.content)
    keep = Keep(
        run.folder / f"student-{protocol_key}",
        source_facts(recipe, data),
        scored_on(tested_recipe(recipe, args.test)),
        dataset_id=None if Path(source).is_dir() else source,
    )
    verifier = network if recipe.teachers.verifier else None
    scores = run.work / f"students-{protocol_key}"
    evaluation = evaluate_contest(run, contest, scores, verifier=verifier, network=network, keep=keep)
    if recipe.method == "random":
        evaluation = evaluation.of_random_images()
    if run.accelerator.is_main_process:
        report = {
            "recipe": recipe.name,
            "dataset": source,
            "test": args.test or recipe.data.source,
            "evaluation": evaluation.as_dict(),
            "settings": to_dict(recipe)["evaluation"],
            "hardware": run.hardware,
            "versions": versions(),
        }
        write_json(path, report)
        sys.stdout.write(summary(report) + f"\nreport: {path}\n")
        if keep.folder.is_dir():
            sys.stdout.write(f"student: {keep.folder}\n")


def real_parts(
    args: argparse.Namespace, recipe: Recipe, class_names: Sequence[str], left_out: dict[str, str]
) -> tuple["SourceData | None", "ImageSplit"]:
    """The real data, where they can be reached, and the test part that was asked for."""
    from prism_hf.images.source import load_source, load_test_split

    data = test = None
    try:
        data = load_source(recipe.data)
        test = data.test
        if not recipe.evaluation.full_data_epochs:
            left_out["all real"] = "not yet run: evaluation.full_data_epochs is 0"
    except DataError as error:
        if args.test is None:
            raise
        left_out |= {row: f"not yet run: {error}" for row in ("random real", "all real")}
    if args.test is not None:
        test = load_test_split(recipe.data, *named_test(args.test), class_names)
    assert test is not None
    return data, test


def named_test(text: str) -> tuple[str, str]:
    """Source and split of DATA[:SPLIT]."""
    source, split = text, "test"
    if ":" in source and not Path(source).exists():
        source, _, split = source.rpartition(":")
    return source, split


def tested_recipe(recipe: Recipe, test: str | None) -> Recipe:
    """The recipe with the test data that were asked for."""
    if test is None:
        return recipe
    source, split = named_test(test)
    return replace(recipe, data=replace(recipe.data, source=source, test_split=split, validation_fraction=0.0))


def find_control(stages: "Stages", distilled: "DistilledDataset", left_out: dict[str, str]) -> "DistilledDataset | None":
    """Random real images labelled by the very teachers that labelled the data set, or the reason why there are none."""
    from prism_hf.dataset.reader import load_distilled
    from prism_hf.evaluation.report import NO_CONTROL

    if stages.recipe.method == "random":
        left_out["random real"] = NO_CONTROL
        return None
    try:
        public = public_recipe(stages.recipe).relabel.teachers
        loaded = stages.teachers(stages.recipe.relabel.teachers)
        for name, teacher in zip(public, loaded.values(), strict=True):
            if distilled.teacher_weights.get(name) != teacher.weights_sha256:
                raise TeacherError(f"teacher {name!r} here has other weights than the one that labelled the data set")
        stages.build_control()
        with stages.run.accelerator.main_process_first():
            return load_distilled(stages.run.control)
    except (TeacherError, StageError, DataError) as error:
        left_out["random real"] = f"not yet run: {error}"
        return None


def find_judge(stages: "Stages", left_out: dict[str, str]) -> "Teacher | None":
    """The network that judges images and measures their similarity, where it can be reached."""
    judge = stages.recipe.teachers.verifier or stages.recipe.teachers.logit
    try:
        return stages.teachers([judge])[judge]
    except (TeacherError, StageError) as error:
        left_out["verifier and similarity"] = f"not yet run: {error}"
        return None


def digest(*parts: str) -> str:
    """Sixteen hex digits that name a combination of parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def run_recipe(dataset: Path, shipped: Recipe) -> Recipe:
    """The recipe that made a data set: beside its folder it still names local data by their full path."""
    private = dataset.parent / "recipe.yaml"
    if dataset.is_dir() and private.is_file():
        recipe = load_recipe(private)
        if public_recipe(recipe) == shipped:
            return recipe
    return shipped


if __name__ == "__main__":
    sys.exit(run_command(main, parse()))
