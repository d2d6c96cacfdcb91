"""Distil a data set: squeeze teachers, synthesize images, relabel, package, evaluate.

    accelerate launch recipes/prism.py                                    # the embedded default: digits, minutes on a CPU
    accelerate launch recipes/prism.py RECIPE.yaml synthesis.ipc=5 relabel.batch_size=25
    accelerate launch recipes/prism.py RECIPE.yaml --dry-run              # the plan; touches no tensor and no network
    accelerate launch recipes/prism.py RECIPE.yaml --stage evaluate       # one stage, from what the earlier ones left
    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        recipes/prism.py RECIPE.yaml                                      # two processes: GPUs, or CPU without one
    accelerate launch recipes/prism.py RECIPE.yaml --push-to-hub ORG/NAME # share it; private unless --public

    accelerate launch recipes/prism.py RECIPE.yaml --status               # what is done, running, failed, left

The same command goes on where an interrupted run stopped, with any number of processes.
"""

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

# Python puts this folder first on its path, where our evaluate.py would hide the package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from prism_hf.cli.options import add_common, add_target, quiet, run_command, split_overrides
from prism_hf.errors import RecipeError
from prism_hf.recipe.describe import describe_plan
from prism_hf.recipe.plan import STAGES, TRACKERS
from prism_hf.recipe.schema import Recipe
from prism_hf.recipe.yaml_file import load_recipe

if TYPE_CHECKING:
    from prism_hf.hub.repository import Target
    from prism_hf.run.context import Run

DEFAULT = Path(__file__).parent / "digits" / "prism_ipc10.yaml"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="RECIPE.yaml | key=value", help="a recipe, and overrides")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/<recipe name>")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="where squeezed teachers are kept")
    parser.add_argument("--stage", choices=STAGES, help="run one stage only")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument(
        "--status", nargs="?", const=True, metavar="DIR", help="print what a run has done, does and has left, and stop"
    )
    parser.add_argument("--fresh", action="store_true", help="move what is in the output folder aside and start again")
    parser.add_argument(
        "--allow-partial", action="store_true", help="package the finished images although some jobs failed"
    )
    parser.add_argument("--log-with", metavar="|".join(TRACKERS), help="record losses, verifier accuracy and pictures")
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="publish the data set in one commit; REPO is made if not there"
    )
    add_target(parser)
    add_common(parser)
    args = parser.parse_intermixed_args(argv)
    if args.push_to_hub is None and (args.public or args.revision != "main" or args.create_pr or args.replace):
        parser.error("--public, --revision, --create-pr and --replace belong to --push-to-hub REPO")
    if args.push_to_hub is not None and args.stage in ("squeeze", "synthesize", "relabel"):
        parser.error(f"--stage {args.stage} leaves no data set to push; leave out --stage, or push after --stage package")
    return args


def main(args: argparse.Namespace) -> None:
    if isinstance(args.status, str) and not args.words:
        print_status(Path(args.status))
        return
    paths, overrides = split_overrides(args.words)
    if len(paths) > 1:
        raise RecipeError(f"expected one recipe, got {', '.join(paths)}; overrides are written key=value")
    recipe = load_recipe(paths[0] if paths else DEFAULT, overrides)
    if args.dry_run:
        sys.stdout.write(describe_plan(recipe) + "\n")
        return
    folder = args.output or Path("outputs") / recipe.name
    if args.status:
        print_status(folder)
        return
    distil(recipe, folder, args)


def print_status(folder: Path) -> None:
    from prism_hf.run.status import status_text, survey

    sys.stdout.write(status_text(survey(folder)) + "\n")


def distil(recipe: Recipe, folder: Path, args: argparse.Namespace) -> None:
    quiet()
    from prism_hf.hub.push import check_here, check_target, reserve
    from prism_hf.hub.repository import Target
    from prism_hf.run.context import Run, make_accelerator
    from prism_hf.run.folder import check_folder, claimed_together
    from prism_hf.run.preflight import check, check_stage, record_inputs
    from prism_hf.run.trackers import start_trackers
    from prism_hf.run.stages import run_stages
    from prism_hf.runtime.lock import check_free
    from prism_hf.runtime.logs import log_file

    # Teachers are shared between recipes in outputs/teachers; a named output keeps everything inside itself.
    teachers = args.teachers or (folder / "teachers" if args.output else Path("outputs") / "teachers")
    check_folder(folder, recipe, fresh=args.fresh)
    if os.environ.get("RANK", "0") == "0":  # the others would find the folder held by the first
        check_free(folder)
    target = None
    if args.push_to_hub is not None:
        target = Target(
            args.push_to_hub,
            public=args.public,
            revision=args.revision,
            create_pr=args.create_pr,
            replace_other=args.replace,
        )
        check_here(target)
    accelerator = make_accelerator(folder, log_with=args.log_with, threads=args.threads)
    run = Run(recipe, folder, teachers, accelerator, args.checkpoint_every, args.allow_partial)
    if target is not None and accelerator.is_main_process:
        target = check_target(target, recipe.name)
    if args.stage:
        check_stage(run, args.stage, fresh=args.fresh)
    check(run, fresh=args.fresh)
    # From here on something is written.
    with ExitStack() as stack:
        if accelerator.is_main_process:
            if target is not None:
                reserve(target)
        left_behind = stack.enter_context(claimed_together(run, fresh=args.fresh))
        stack.enter_context(log_file(folder, accelerator.process_index))
        if accelerator.is_main_process:
            record_inputs(run)
            run.say(
                f"{recipe.name} (fingerprint {recipe.fingerprint()}) in {folder}, {accelerator.num_processes} process(es)"
            )
            if left_behind is not None:
                run.say(left_behind)
        start_trackers(run)
        run_stages(run, [args.stage] if args.stage else STAGES)
        accelerator.end_training()
        if accelerator.is_main_process:
            print_result(run, target)


def print_result(run: "Run", target: "Target | None") -> None:
    from prism_hf.evaluation.report import summary
    from prism_hf.hub.bundle import bundle_of
    from prism_hf.hub.push import publish

    report = run.folder / "report.json"
    if report.is_file():
        sys.stdout.write(summary(json.loads(report.read_text(encoding="utf-8"))) + "\n")
    if run.dataset.is_dir():
        sys.stdout.write(f"data set: {run.dataset}\n")
    if target is not None:
        sys.stdout.write(f"{publish(bundle_of(run.dataset), target).url}\n")


if __name__ == "__main__":
    sys.exit(run_command(main, parse()))
