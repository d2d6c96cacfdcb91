"""Check that a code change does not change any byte of the tables.

    python benchmarks/same_bytes.py                         # run this checkout and compare with the recorded hashes
    python benchmarks/same_bytes.py --root OTHER --record   # run another checkout and record its hashes

The script makes five small runs on digits from scratch: PRISM per slot, PRISM per iteration from noise, SRe2L, G-VBSM and
random real images. It compares the SHA-256 of each Parquet file of dataset and control, and the scores of the students.
The hashes are valid for one version of torch on one kind of CPU. On another machine, record them again from the old commit.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "same_bytes.json"
DIGITS = (
    "data.source=digits", "data.num_classes=10", "data.size=16", "data.channels=1",
    "squeeze.epochs=1", "squeeze.batch_size=128", "squeeze.seed=0", "teachers.logit=squeeze:test_byobnet",
    "teachers.verifier=squeeze:test_efficientnet", "relabel.epochs=4", "relabel.batch_size=10",
    "relabel.teachers=[squeeze:test_byobnet,squeeze:test_resnet]", "evaluation.student=test_byobnet",
    "evaluation.full_data_epochs=0", "evaluation.batch_size=10", "evaluation.seeds=[0]",
)  # fmt: skip
FEW = ("synthesis.iterations=12", "synthesis.ipc=3", "teachers.bn_pool=[squeeze:test_resnet]")
BATCHES = ("synthesis.slots_per_batch=1", "synthesis.batch_size=10")
RUNS = {
    "prism per slot": ("digits/prism_ipc10", (*DIGITS, *FEW, *BATCHES)),
    "prism per iteration from noise": (
        "digits/prism_noise_ipc10", (*DIGITS, *FEW, *BATCHES, "teachers.selection=per_iteration", "synthesis.lr=0.05"),
    ),
    "sre2l": ("digits/sre2l_ipc10", (*DIGITS, *FEW, *BATCHES, "teachers.bn_pool=[]")),
    "gvbsm": ("fashion/gvbsm_ipc10", (*DIGITS, *FEW, "synthesis.batch_size=12")),
    "random": ("fashion/random_ipc10", (*DIGITS, "synthesis.ipc=3")),
}  # fmt: skip


def run(root: Path, folder: Path, teachers: Path, recipe: str, overrides: tuple[str, ...]) -> dict[str, object]:
    """Make one dataset with the code in `root`; return its hashes and scores."""
    env = os.environ | {
        "PYTHONPATH": str(root / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1",
        "HF_HOME": str(folder.parent / "hf"),
    }  # fmt: skip
    options = [str(root / "recipes" / f"{recipe}.yaml"), *overrides, "--output", str(folder), "--teachers", str(teachers)]
    done = subprocess.run(
        [sys.executable, str(root / "recipes" / "prism.py"), *options, "--threads", "1"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{recipe}: the run failed\n{done.stderr[-3000:]}")
    tables = sorted(path for name in ("dataset", "control") for path in (folder / name).rglob("*.parquet"))
    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["evaluation"]["rows"]
    return {
        "tables": {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in tables},
        "top1": {f"{row['images']}, {row['labels']} labels": row["top1"] for row in rows},
    }


def main() -> None:
    """Compare hashes and scores with the recorded ones, or record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose code is run")
    parser.add_argument("--record", action="store_true", help="write the hashes instead of comparing them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: Path(folder) / name.replace(" ", "-") for name in RUNS}
        results = {
            name: run(args.root.resolve(), folders[name], Path(folder) / "teachers", *arguments)
            for name, arguments in RUNS.items()
        }
    if args.record:
        import machine

        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=args.root, capture_output=True, text=True, check=True)
        command = f"python benchmarks/same_bytes.py --root CHECKOUT --record  # of commit {commit.stdout.strip()[:12]}"
        facts = {"command": command, **machine.facts(), "runs": results}
        RECORD.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["runs"]
    for name, facts in results.items():
        same = "identical" if facts == recorded[name] else "DIFFERENT"
        sys.stdout.write(f"{name}: {len(facts['tables'])} tables, {len(facts['top1'])} scores: {same}\n")  # type: ignore[arg-type]
    sys.exit(results != recorded)


if __name__ == "__main__":
    main()
