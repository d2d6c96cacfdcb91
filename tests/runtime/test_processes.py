"""A command that starts more processes of its own kind, run as a script."""

import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from prism_hf.runtime import processes
from prism_hf.runtime.processes import best_processes

HEAD = """
    import os, sys, time
    from pathlib import Path
    from prism_hf.runtime import in_processes, stopping_cleanly, raise_if_stopped
    folder, rank = Path(sys.argv[1]), lambda: os.environ.get("RANK")
    def wait():
        while True:
            raise_if_stopped()
            time.sleep(0.02)
"""


def script(tmp_path, body):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(HEAD) + textwrap.dedent(body))
    return [sys.executable, str(path), str(tmp_path)]


def run(tmp_path, body):
    return subprocess.run(script(tmp_path, body), capture_output=True, text=True, timeout=60, check=False)


def test_the_block_runs_once_in_every_process_and_all_know_their_place(tmp_path):
    done = run(
        tmp_path,
        """
        with in_processes(3):
            names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK")
            (folder / f"at-{rank()}").write_text(" ".join(os.environ[name] for name in names))
            print("only the first may print")
        (folder / f"after-{rank()}").touch()
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "only the first may print\n", "")
    for rank in range(3):
        assert (tmp_path / f"at-{rank}").read_text() == f"3 3 127.0.0.1 {rank}"
    assert sorted(path.name for path in tmp_path.glob("after-*")) == ["after-1", "after-2", "after-None"]


def test_one_process_is_just_the_block(tmp_path):
    done = run(tmp_path, 'with in_processes(1): (folder / f"at-{rank()}").touch()')
    assert done.returncode == 0
    assert (tmp_path / "at-None").exists()


def test_a_failure_of_another_process_is_told_and_stops_the_first(tmp_path):
    done = run(
        tmp_path,
        """
        with stopping_cleanly(), in_processes(2):
            if rank() == "1":
                sys.stderr.write("TeacherError: no such teacher\\n")
                sys.exit(2)
            time.sleep(60)  # as in a barrier
        """,
    )
    assert done.returncode == 2
    assert "TeacherError: no such teacher\n" in done.stderr
    assert "process 1 has ended: finished work is kept" in done.stderr


def test_an_error_of_all_processes_is_told_once(tmp_path):
    done = run(
        tmp_path,
        """
        with stopping_cleanly(), in_processes(2):
            sys.stderr.write("DataError: wrong\\n")
            sys.exit(2)
        """,
    )
    assert (done.returncode, done.stderr) == (2, "DataError: wrong\n")


@pytest.mark.parametrize("politely", [True, False])
def test_the_others_end_with_the_first(tmp_path, politely):
    body = """
        with stopping_cleanly(), in_processes(2):
            (folder / f"at-{rank()}").touch()
            wait()
    """
    first = subprocess.Popen(script(tmp_path, body), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (tmp_path / "at-1").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (other,) = psutil.Process(first.pid).children()
    first.terminate() if politely else first.kill()
    first.wait(20)
    assert psutil.wait_procs([other], timeout=20)[1] == []


def test_the_number_of_processes(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(processes, "_GPUS", ())
    monkeypatch.setattr(processes.joblib, "cpu_count", lambda: 6)
    monkeypatch.setattr(processes, "_BYTES_EACH", 1)
    assert [best_processes(32, threads) for threads in (None, 1, 2, 4, 6, 12)] == [6, 6, 3, 1, 1, 1]
    assert best_processes(64, None) == 6
    assert best_processes(65, None) == 1
    monkeypatch.setattr(processes, "_BYTES_EACH", psutil.virtual_memory().total)
    assert best_processes(32, None) == 1
    monkeypatch.setattr(processes, "_BYTES_EACH", 1)
    monkeypatch.setenv("RANK", "0")
    assert best_processes(32, None) == 1
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(processes, "_GPUS", ("null",))
    assert best_processes(32, None) == 1
