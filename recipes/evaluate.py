"""Train students on a distilled data set, a folder or a Hub id, and print the honest table.

    accelerate launch recipes/evaluate.py DATASET [--student NAME] [--test DATA[:SPLIT]] [--seeds N] [evaluation.K=V ...]

Students see only what the data set contains: images, labels, views. The test data are the recipe's unless named. The
random-real rows appear when the real training data and the teachers can be reached (--teachers DIR for squeezed ones).
"""

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

# Python puts this folder first on its path, where our evaluate.py would hide the package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from prism_hf.command import add_common, quiet, run_command, split_overrides
from prism_hf.errors import DataError, PrismError, RecipeError, StageError, TeacherError
from prism_hf.recipe import Recipe, to_dict
from prism_hf.recipe_file import load_recipe, override_recipe, public_recipe


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
    from prism_hf.data import load_test_split
    from prism_hf.evaluation import Contest
    from prism_hf.packaging import versions
    from prism_hf.reading import DistilledDataset, load_distilled
    from prism_hf.report import summary
    from prism_hf.run import Run, make_accelerator
    from prism_hf.stages import Stages, evaluate_contest
    from prism_hf.storage import write_json
    from prism_hf.teachers import Teacher
    from prism_hf.training import check_network

    accelerator = make_accelerator(threads=args.threads)
    with accelerator.main_process_first():
        distilled = load_distilled(words[0], revision=args.revision)
    if distilled.recipe is None:
        raise DataError(f"{words[0]!r} has no recipe.yaml, which names the test data and the protocol")
    recipe = protocol(run_recipe(Path(words[0]), distilled.recipe), args, overrides)
    check_network(
        recipe.evaluation.student,
        num_classes=len(distilled.class_names),
        channels=recipe.data.channels,
        size=distilled.images_uint8.shape[-1],
    )
    folder = args.output or Path("outputs") / "evaluate" / recipe.name
    beside = Path(words[0]).parent / "teachers"
    teachers = args.teachers or (beside if beside.is_dir() else Path("outputs") / "teachers")
    # One place per set of images: another data set of the same name must not find this one's control or scores.
    place = folder / distilled.content
    run = Run(recipe, place, teachers, accelerator)
    stages, left_out = Stages(run), {}

    def or_left_out(row: str, error: PrismError) -> None:
        left_out[row] = f"not yet run: {error}"

    train = test = None
    try:
        train, test = stages.data.train, stages.data.test
    except DataError as error:
        if args.test is None:
            raise
        or_left_out("random real", error)
        or_left_out("all real", error)
    if args.test is not None:
        source, split = args.test, "test"
        if ":" in source and not Path(source).exists():
            source, _, split = source.rpartition(":")
        test = load_test_split(recipe.data, source, split, distilled.class_names)
    assert test is not None

    control: DistilledDataset | None = None
    verifier: Teacher | None = None
    network: Teacher | None = None
    if train is not None:
        try:
            stages.build_control()
            with accelerator.main_process_first():
                control = load_distilled(run.control)
        except (TeacherError, StageError, DataError) as error:
            or_left_out("random real", error)
        try:
            judge = recipe.teachers.verifier or recipe.teachers.logit
            network = stages.teachers([judge])[judge]
            verifier = network if recipe.teachers.verifier else None
        except (TeacherError, StageError) as error:
            or_left_out("verifier and similarity", error)
    if train is not None and not recipe.evaluation.full_data_epochs:
        left_out["all real"] = "not yet run: evaluation.full_data_epochs is 0"
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
    key = json.dumps([settings, test.content, to_dict(recipe)["relabel"], "" if train is None else train.content])
    scores = run.work / f"students-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    evaluation = evaluate_contest(run, contest, scores, verifier=verifier, network=network)
    if accelerator.is_main_process:
        report = {
            "recipe": recipe.name,
            "dataset": words[0],
            "test": args.test or recipe.data.source,
            "evaluation": evaluation.as_dict(),
            "settings": to_dict(recipe)["evaluation"],
            "hardware": run.hardware,
            "versions": versions(),
        }
        write_json(folder / "report.json", report)
        sys.stdout.write(summary(report) + f"\nreport: {folder / 'report.json'}\n")


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
