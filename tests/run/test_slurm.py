"""The Slurm script, with programs in place of Slurm's and the launcher that show what they are called with."""

import os
import subprocess

import pytest
from pipeline import ROOT

SCRIPT = ROOT / "recipes" / "slurm" / "prism.sbatch"
PROGRAMS = {
    "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> "$LOG"; fi',
    "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id "$@" || exit $?; done',
    "accelerate": 'echo "accelerate $@" >> "$LOG"; exit "${CODE:-0}"',
}


def run(tmp_path, **more):
    for name, body in PROGRAMS.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    log = tmp_path / "log"
    log.write_text("")
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "41"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)} | more
    words = ["bash", str(SCRIPT), "RECIPE.yaml", "--output", "a folder"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    return done.returncode, log.read_text().splitlines()


def test_one_launcher_per_machine_with_the_same_address(tmp_path):
    code, lines = run(tmp_path)
    assert code == 0
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert f"--num_machines 2 --num_processes 16 --machine_rank {rank} --main_process_ip node7" in line
        assert "--main_process_port 20041" in line
        assert line.endswith("recipes/prism.py RECIPE.yaml --output a folder")


@pytest.mark.parametrize(
    ("code", "restarts", "queued"), [("1", "0", True), ("75", "2", True), ("2", "0", False), ("1", "3", False)]
)
def test_a_lost_run_is_queued_again_and_a_wrong_recipe_is_not(tmp_path, code, restarts, queued):
    found, lines = run(tmp_path, CODE=code, SLURM_RESTART_COUNT=restarts)
    assert found == int(code)
    assert ("requeue 41" in lines) == queued
