"""The command distill: run a complete recipe."""

import argparse
import sys
from pathlib import Path

from ..recipe import STAGES, TRACKERS, describe_plan
from ..run.folder import check_at_once
from ..runtime import in_processes, is_first_process
from .options import (
    NO_CONTROL,
    Command,
    add_compute,
    add_target,
    part,
    processes,
    push_options,
    quiet,
    read_recipe,
    teachers_folder,
)
from .status import print_status


def distill(parser: argparse.ArgumentParser) -> Command:
    r"""Distill a dataset: run all stages of a recipe.

        %(prog)s digits/prism_ipc10                            # a shipped recipe, into outputs/<recipe name>
        %(prog)s RECIPE.yaml synthesis.ipc=5 --output DIR      # override a value, choose the folder
        %(prog)s RECIPE.yaml --dry-run                         # print the plan; loads and downloads nothing
        %(prog)s RECIPE.yaml --stage evaluate                  # run one stage; needs the earlier ones
        %(prog)s RECIPE.yaml --push-to-hub ORG/NAME            # publish it; private unless --public

    To use two processes, on two GPUs or on the CPU:

        accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
            -m prism_hf distill RECIPE.yaml

    Machines without a shared folder each do a part of the images in a folder of their own; then one takes over all:

        %(prog)s RECIPE.yaml --output DIR --stage synthesize --part 2/3     # on the second of three machines
        %(prog)s RECIPE.yaml --output DIR --merge OTHER_DIR OTHER_DIR       # after copying their folders here

    The stages are squeeze (train teachers), synthesize (optimize images), relabel (make soft labels), package, and
    evaluate (train students). Run the same command again, with any number of processes, to resume an interrupted run.
    """
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE | key=value", help="a YAML file or a shipped recipe, and overrides"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="output folder; default: outputs/<recipe name>")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="folder of squeezed teachers")
    parser.add_argument("--stage", choices=STAGES, help="run only this stage")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--status", nargs="?", const=True, metavar="DIR", help="print the status of a run and stop")
    parser.add_argument("--fresh", action="store_true", help="move an existing run aside and start over")
    parser.add_argument("--no-control", dest="control", action="store_false", help=NO_CONTROL)
    parser.add_argument("--allow-partial", action="store_true", help="package the finished images even if some jobs failed")
    parser.add_argument("--part", type=part, metavar="I/N", help="do only part I of N; with --stage synthesize or relabel")
    merged = "output folders of other machines, whose finished work is taken over first"
    parser.add_argument("--merge", type=Path, nargs="+", default=(), metavar="DIR", help=merged)
    compiled = "on: run the teachers of synthesis through torch.compile; auto (default): replay CUDA graphs on a GPU"
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help=compiled)
    parser.add_argument("--log-with", metavar="|".join(TRACKERS), help="log losses, verifier accuracy and images")
    parser.add_argument("--push-to-hub", dest="repo", metavar="REPO", help="publish the dataset; creates REPO if missing")
    add_target(parser)
    add_compute(parser)
    return _distill


def _distill(args: argparse.Namespace) -> None:
    if args.repo is None and (args.public or args.revision != "main" or args.create_pr or args.replace):
        args.parser.error("--public, --revision, --create-pr and --replace require --push-to-hub REPO")
    if isinstance(args.status, str) and not args.words:
        print_status(Path(args.status))
        return
    recipe = read_recipe(args.words, args.default_recipe)
    folder = args.output or Path("outputs") / recipe.name
    if args.dry_run:
        sys.stdout.write(describe_plan(recipe, control=args.control) + "\n")
        return
    if args.status:
        print_status(folder)
        return
    teachers = teachers_folder(args, folder)
    check_at_once(recipe, folder, teachers, fresh=args.fresh)
    quiet()
    from ..hub import Target
    from ..run.distill import distill

    with in_processes(processes(args, recipe.data.size, folder / "work")):
        result = distill(
            recipe,
            folder,
            teachers=teachers,
            stage=args.stage,
            fresh=args.fresh,
            allow_partial=args.allow_partial,
            control=args.control,
            part=args.part,
            merge=args.merge,
            push_to_hub=None if args.repo is None else Target(args.repo, **push_options(args)),
            log_with=args.log_with,
            threads=args.threads,
            compile=args.compile,
            checkpoint_s=args.checkpoint_every,
        )
    if is_first_process():
        made = (result.table, result.dataset and f"dataset: {result.dataset}", result.url)
        sys.stdout.writelines(f"{line}\n" for line in made if line)
