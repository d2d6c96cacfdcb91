"""The command distill: a recipe as a whole."""

import argparse
import sys
from pathlib import Path

from ..recipe import STAGES, TRACKERS, describe_plan
from ..runtime import is_first_process
from .options import Command, add_compute, add_target, push_options, quiet, read_recipe, teachers_folder
from .status import print_status


def distill(parser: argparse.ArgumentParser) -> Command:
    r"""Run a recipe: from real data to a distilled dataset.

        %(prog)s digits/prism_ipc10                            # a shipped recipe, into outputs/<recipe name>
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
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE | key=value", help="a YAML file or a shipped name, and overrides"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/<recipe name>")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="where squeezed teachers are kept")
    parser.add_argument("--stage", choices=STAGES, help="run one stage only")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--status", nargs="?", const=True, metavar="DIR", help="print the state of a run and stop")
    parser.add_argument("--fresh", action="store_true", help="move what is in the output folder aside and start again")
    parser.add_argument("--allow-partial", action="store_true", help="package what is finished although some jobs failed")
    parser.add_argument("--log-with", metavar="|".join(TRACKERS), help="record losses, verifier accuracy and pictures")
    parser.add_argument("--push-to-hub", dest="repo", metavar="REPO", help="publish the dataset; creates REPO if missing")
    add_target(parser)
    add_compute(parser)
    return _distill


def _distill(args: argparse.Namespace) -> None:
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
    from ..hub import Target
    from ..run.distill import distill

    result = distill(
        recipe,
        folder,
        teachers=teachers_folder(args, folder),
        stage=args.stage,
        fresh=args.fresh,
        allow_partial=args.allow_partial,
        push_to_hub=None if args.repo is None else Target(args.repo, **push_options(args)),
        log_with=args.log_with,
        threads=args.threads,
        checkpoint_s=args.checkpoint_every,
    )
    if is_first_process():
        made = (result.table, result.dataset and f"dataset: {result.dataset}", result.url)
        sys.stdout.writelines(f"{line}\n" for line in made if line)
