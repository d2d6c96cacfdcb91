r"""Run a recipe: from real data to a distilled dataset.

    %(prog)s RECIPE.yaml                                   # into outputs/<recipe name>
    %(prog)s RECIPE.yaml synthesis.ipc=5 --output DIR      # any override, any folder
    %(prog)s RECIPE.yaml --dry-run                         # the plan; touches no tensor and no network
    %(prog)s RECIPE.yaml --stage evaluate                  # one stage, from what the earlier ones left
    %(prog)s RECIPE.yaml --push-to-hub ORG/NAME            # share it; private unless --public

On two processes, GPUs or else CPU cores:

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        -m prism_hf distill RECIPE.yaml

The stages are squeeze (train teachers), synthesize (images), relabel, package and evaluate (train students). The same
command resumes an interrupted run, with any number of processes.
"""

import argparse
import sys
from pathlib import Path

from ..recipe import STAGES, TRACKERS, describe_plan
from ..runtime import is_first_process
from .options import add_compute, add_target, quiet, read_recipe, target_of, teachers_folder
from .status import print_status


def add_options(parser: argparse.ArgumentParser) -> None:
    """Recipe, folders, stages, trackers, and where to publish."""
    parser.add_argument("words", nargs="*", metavar="RECIPE.yaml | key=value", help="a recipe, and overrides")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/<recipe name>")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="where squeezed teachers are kept")
    parser.add_argument("--stage", choices=STAGES, help="run one stage only")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    status = "print what a run has done, is doing and still has to do, and stop"
    parser.add_argument("--status", nargs="?", const=True, metavar="DIR", help=status)
    parser.add_argument("--fresh", action="store_true", help="move what is in the output folder aside and start again")
    partial = "package the finished images although some jobs failed"
    parser.add_argument("--allow-partial", action="store_true", help=partial)
    parser.add_argument("--log-with", metavar="|".join(TRACKERS), help="record losses, verifier accuracy and pictures")
    publish = "publish the dataset in one commit; REPO is created if it does not exist"
    parser.add_argument("--push-to-hub", dest="repo", metavar="REPO", help=publish)
    add_target(parser)
    add_compute(parser)


def run(args: argparse.Namespace) -> None:
    """Distill, or print the plan or the state of a run."""
    if args.repo is None and (args.public or args.revision != "main" or args.create_pr or args.replace):
        args.parser.error("--public, --revision, --create-pr and --replace belong to --push-to-hub REPO")
    if isinstance(args.status, str) and not args.words:
        print_status(Path(args.status))
        return
    recipe = read_recipe(args.words, args.default_recipe)
    folder = args.output or Path("outputs") / recipe.name
    if args.dry_run:
        sys.stdout.write(describe_plan(recipe) + "\n")
        return
    if args.status:
        print_status(folder)
        return
    quiet()
    from ..evaluation import summary
    from ..run.distill import distill

    result = distill(
        recipe,
        folder,
        teachers=teachers_folder(args, folder),
        stage=args.stage,
        fresh=args.fresh,
        allow_partial=args.allow_partial,
        push_to_hub=None if args.repo is None else target_of(args.repo, args),
        log_with=args.log_with,
        threads=args.threads,
        checkpoint_s=args.checkpoint_every,
    )
    if is_first_process():
        if result.report is not None:
            sys.stdout.write(f"{summary(result.report)}\n")
        if result.dataset is not None:
            sys.stdout.write(f"dataset: {result.dataset}\n")
        if result.url is not None:
            sys.stdout.write(f"{result.url}\n")
