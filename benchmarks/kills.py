"""Kill a run at random moments of every stage, restart it, and compare its bytes with those of an uninterrupted run.

    python benchmarks/kills.py --count 50 --output /a/folder        # about half an hour on two cores
    python benchmarks/kills.py --count 50 --output /a/folder --record benchmarks/results/kills.json

Every case is drawn from its own seed: recipe, number of processes, stage, moment within the stage, signal, and target.
After the last kill, a final launch with its own number of processes finishes the run.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
STAGES = ("squeeze", "synthesize", "relabel", "package", "evaluate")
SMALL = (
    "data.size=16", "synthesis.iterations=60", "synthesis.slots_per_batch=1", "synthesis.batch_size=10",
    "synthesis.ipc=3", "relabel.epochs=12", "relabel.batch_size=10", "squeeze.epochs=2", "squeeze.batch_size=64",
    "teachers.logit=squeeze:test_byobnet", "teachers.bn_pool=[squeeze:test_efficientnet]", "teachers.verifier=null",
    "relabel.teachers=[squeeze:test_byobnet,squeeze:test_efficientnet]", "evaluation.student=test_byobnet",
    "evaluation.full_data_epochs=1", "evaluation.batch_size=10", "evaluation.seeds=[0,1]",
)  # fmt: skip
RECIPES = {
    "prism, per slot": ("prism_ipc10.yaml", ()),
    "prism, per iteration, from noise": (
        "prism_noise_ipc10.yaml",
        ("teachers.selection=per_iteration", "packaging.image_format=jpeg"),
    ),
    "gvbsm": (
        "prism_noise_ipc10.yaml",
        (
            "teachers.selection=cycle", "teachers.extras=3", "teachers.draw_probability=0.5",
            "synthesis.batch_order=within_class", "synthesis.batch_size=6", "synthesis.bn_reduction=sum",
            "synthesis.momentum=0.4", "synthesis.conv={patch: 4, drop: 0.3}", "synthesis.densification={size: 8}",
        ),
    ),
    "sre2l": ("sre2l_ipc10.yaml", ("teachers.bn_pool=[]", "relabel.teachers=[squeeze:test_byobnet]")),
}  # fmt: skip
DRAWN = ("prism, per slot", "prism, per iteration, from noise", "sre2l")
"""Recipes that a seed draws from, as in benchmarks/results/kills.json; select any other with --recipe."""
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
PARTS = ("dataset", "control", "student", "work/jobs", "work/students")
"""Parts of a run that must be identical."""
LIMIT_S = 5.0
"""Time limit for every process to exit after SIGTERM or SIGINT."""


@dataclass
class Kill:
    """One kill and its outcome."""

    stage: str
    share: float
    signal: str
    whom: str
    processes: int
    hit: str | None = None
    seconds_to_end: float | None = None
    told_how_to_resume: bool | None = None


@dataclass
class Case:
    """A run that is killed one or more times and then finished."""

    seed: int
    recipe: str
    kills: list[Kill]
    last_processes: int
    problems: list[str] = field(default_factory=list)


def draw_case(seed: int, *, stage: str | None = None, recipe: str | None = None) -> Case:
    """Draw the case of a seed; `recipe`, and the stage of the first kill, can be set so that every stage is hit."""
    draw = random.Random(seed)
    kills = []
    for number in range(draw.choice((1, 1, 2))):
        processes = draw.choice((1, 1, 2))
        whom = draw.choice(
            ("workers", "launcher", "everybody") if processes == 1 else ("one worker", "launcher", "everybody")
        )
        chosen = stage if number == 0 and stage else draw.choice(STAGES)
        kills.append(Kill(chosen, draw.random(), draw.choice(SIGNALS), whom, processes))
    drawn = draw.choice(DRAWN)
    return Case(seed, recipe or drawn, kills, draw.choice((1, 2, 3)))


def environment() -> dict[str, str]:
    """Return an environment with one thread, no network and no progress bars, free of any outer launch."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_RANK"))}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def launch_command(recipe: str, folder: Path, processes: int, *extra: str) -> list[str]:
    """Return the command of a launch."""
    file, overrides = RECIPES[recipe]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q"]
    several = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    alone = ["--num_processes", "1"]
    launch += [*(several if processes > 1 else alone), "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", str(ROOT / "recipes" / "prism.py"), str(ROOT / "recipes" / "digits" / file)]
    return [*launch, *SMALL, *overrides, "--output", str(folder), "--threads", "1", "--checkpoint-every", "0.3", *extra]


def finish(recipe: str, folder: Path, processes: int) -> subprocess.CompletedProcess[str]:
    """Launch a run and wait until it ends, without interruption."""
    command = launch_command(recipe, folder, processes)
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=900)


def tree(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every output file and of the evaluation."""
    hashes = {}
    for part in PARTS:
        for path in sorted((folder / part).rglob("*")):
            if path.is_file() and not path.name.endswith(".seal") and ".aside-" not in path.name:
                name = path.relative_to(folder).as_posix()
                hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    hashes["evaluation"] = hashlib.sha256(json.dumps(report["evaluation"]).encode()).hexdigest()
    return hashes


def finished_files(folder: Path) -> dict[str, int]:
    """Return the modification time (ns) of every finished file, by its path in the folder."""
    seals = {p.with_name(p.name.removesuffix(".seal")) for p in (folder / "work").rglob("*.seal")}
    lasting = {p for p in seals if ".checkpoint" not in p.name and p.is_file()}
    teachers = set((folder / "teachers").glob("[!.]*/model.safetensors"))
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in lasting | teachers}


def stage_of(folder: Path) -> str | None:
    """Return the current stage of a run according to its log, or `None`."""
    log = folder / "logs" / "run.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    stages = [line.rpartition("stage ")[2] for line in lines if " INFO stage " in line]
    return stages[-1] if stages else None


def count_stages(folder: Path, stage: str) -> int:
    """Return how many launches have reached a stage."""
    log = folder / "logs" / "run.log"
    return log.read_text(encoding="utf-8").count(f" INFO stage {stage}\n") if log.is_file() else 0


def family(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the launcher's worker processes."""
    try:
        return [p for p in psutil.Process(launcher.pid).children(recursive=True) if "prism.py" in " ".join(p.cmdline())]
    except psutil.Error:
        return []


def listen() -> None:
    """Reset SIGINT in the new process: a background job of a shell ignores it, and child processes inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def strike(kill: Kill, case: Case, folder: Path, times: dict[str, float]) -> None:
    """Launch the run, kill it as the case specifies, and record the outcome."""
    error = folder.parent / f"{folder.name}.err"
    before = count_stages(folder, kill.stage)
    with open(error, "w", encoding="utf-8") as stderr:
        launcher = subprocess.Popen(
            launch_command(case.recipe, folder, kill.processes),
            env=environment(), stdout=subprocess.DEVNULL, stderr=stderr, text=True, start_new_session=True,
            preexec_fn=listen,
        )  # fmt: skip
        while launcher.poll() is None and count_stages(folder, kill.stage) == before:
            time.sleep(0.01)
        time.sleep(kill.share * times[kill.stage])
        kill.hit = stage_of(folder) if launcher.poll() is None else None
        workers = family(launcher)
        if kill.hit is not None:
            send(kill, launcher, workers)
            if kill.whom == "launcher":
                # How fast accelerate's launcher exits is not measured; the workers it leaves behind must exit.
                launcher.wait(60)
            started = time.monotonic()
            # After SIGKILL, or if one worker dies, the others exit only once they or the launcher notice.
            limit = LIMIT_S if kill.signal != "SIGKILL" and kill.whom != "one worker" else 60.0
            alive = psutil.wait_procs(workers, timeout=limit)[1]
            kill.seconds_to_end = round(time.monotonic() - started, 2)
            if alive:
                case.problems.append(f"{len(alive)} processes still alive {limit:g} s after {kill.signal} to {kill.whom}")
            for process in alive:
                process.kill()
        if launcher.poll() is None and kill.whom != "launcher":
            try:
                launcher.wait(60)
            except subprocess.TimeoutExpired:
                case.problems.append(f"the launcher is still alive 60 s after {kill.signal} to {kill.whom}")
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    text = error.read_text(encoding="utf-8")
    error.unlink()
    if kill.hit is not None and kill.signal != "SIGKILL" and kill.whom != "one worker":
        kill.told_how_to_resume = "run the same command again to resume" in text
        if not kill.told_how_to_resume:
            case.problems.append(f"no message on how to resume after {kill.signal} to {kill.whom}: {text[-300:]!r}")
    if kill.hit is None and launcher.returncode:
        case.problems.append(f"the launch failed before the kill: {text[-500:]!r}")


def send(kill: Kill, launcher: subprocess.Popen[str], workers: list[psutil.Process]) -> None:
    """Send the signal to the target of the kill."""
    number = signal.Signals[kill.signal]
    if kill.whom == "everybody":
        os.killpg(launcher.pid, number)
        return
    targets = {"launcher": [psutil.Process(launcher.pid)], "workers": workers, "one worker": workers[-1:]}[kill.whom]
    for process in targets:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass  # it has just finished


def run_case(case: Case, folder: Path, expected: dict[str, str], times: dict[str, float]) -> Case:
    """Kill the run as drawn, finish it, and compare it with the uninterrupted run."""
    for kill in case.kills:
        strike(kill, case, folder, times)
    kept = finished_files(folder)
    done = finish(case.recipe, folder, case.last_processes)
    if done.returncode:
        case.problems.append(f"the last launch exited with code {done.returncode}: {done.stderr[-800:]}")
        return case
    actual = tree(folder)
    differing = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
    if differing:
        case.problems.append(f"not the same bytes: {differing[:5]}")
    repeated = [name for name, moment in kept.items() if finished_files(folder).get(name) != moment]
    if repeated:
        case.problems.append(f"made twice: {repeated[:5]}")
    leftovers = [
        p.name for p in folder.rglob("*") if p.name.startswith(".draft-") or ".aside-" in p.name or "checkpoint" in p.name
    ]
    if leftovers:
        case.problems.append(f"left behind: {leftovers[:5]}")
    return case


def reference(recipe: str, folder: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Return the hashes and the stage times (s) of an uninterrupted run with one process."""
    done = finish(recipe, folder, 1)
    if done.returncode:
        raise SystemExit(f"the uninterrupted run of {recipe} failed: {done.stderr[-2000:]}")
    return tree(folder), json.loads((folder / "work" / "times.json").read_text(encoding="utf-8"))


def run_all(cases: list[Case], output: Path, *, at_once: int = 1) -> list[Case]:
    """Run every case and print a line for each."""
    used = dict.fromkeys(case.recipe for case in cases)
    references = {name: reference(name, output / f"reference-{i}") for i, name in enumerate(used)}

    def one(case: Case) -> None:
        folder = output / f"case-{case.seed:03d}"
        run_case(case, folder, *references[case.recipe])
        kills = "; ".join(f"{k.signal} to {k.whom} of {k.processes} in {k.hit or 'no stage'}" for k in case.kills)
        sys.stdout.write(f"{case.seed}: {case.recipe}: {kills}: {case.problems or 'identical bytes'}\n")
        sys.stdout.flush()
        if not case.problems:
            shutil.rmtree(folder)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, cases))
    return cases


def summary(cases: list[Case]) -> dict[str, object]:
    """Return the numbers for the docs."""
    kills = [kill for case in cases for kill in case.kills if kill.hit is not None]
    polite = [k.seconds_to_end or 0.0 for k in kills if k.signal != "SIGKILL" and k.whom != "one worker"]
    return {
        "cases": len(cases),
        "survived": sum(not case.problems for case in cases),
        "kills": len(kills),
        "by_stage": dict(Counter(k.hit for k in kills)),
        "by_signal": dict(Counter(k.signal for k in kills)),
        "by_whom": dict(Counter(k.whom for k in kills)),
        "by_recipe": dict(Counter(case.recipe for case in cases)),
        "last_processes": dict(Counter(str(case.last_processes) for case in cases)),
        "slowest_polite_end_s": max(polite, default=None),
        "slowest_end_after_one_dead_worker_s": max(
            (k.seconds_to_end or 0 for k in kills if k.whom == "one worker"), default=None
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--recipe", choices=RECIPES, help="default: drawn from " + "; ".join(DRAWN))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=1, help="number of cases to run in parallel")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    stages = [STAGES[i % len(STAGES)] for i in range(args.count)]
    cases = [draw_case(args.first + i, stage=stage, recipe=args.recipe) for i, stage in enumerate(stages)]
    run_all(cases, args.output, at_once=args.at_once)
    result = summary(cases)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if args.record:
        from machine import facts

        from prism_hf.runtime.store import write_json

        command = f"python benchmarks/kills.py --count {args.count} --first {args.first} --at-once {args.at_once}"
        command += f" --recipe {args.recipe}" if args.recipe else ""
        write_json(args.record, result | {"runs": [asdict(c) for c in cases], "command": command} | facts())
    sys.exit(any(case.problems for case in cases))


if __name__ == "__main__":
    main()
