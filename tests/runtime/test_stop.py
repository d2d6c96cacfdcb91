"""Each test starts a separate process, which signals end."""

import os
import signal
import subprocess
import textwrap

import psutil
import pytest
from each import diagonal, product, rest_slow
from pipeline import PYTHON, quiet_env

from prism_hf.runtime.stop import raise_if_stopped, stop_wanted

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
TIMEOUT = 120
BLOCKED = {
    "a lock": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "a socket": "import socket; a, b = socket.socketpair(); a.recv(1)",
    "a C call": """
        import ctypes
        while True:
            ctypes.CDLL(None).sleep(600)
    """,
    "a finally": """
        import time
        try:
            while not stop_wanted():
                time.sleep(0.01)
        finally:
            while True:
                time.sleep(1)
    """,
}
CLEAN = """
    import time
    try:
        while True:
            raise_if_stopped()
            time.sleep(0.01)
    finally:
        print("put away", flush=True)
"""


def program(work):
    lines = [
        "import argparse, os, sys",
        "from prism_hf.cli.options import run_command",
        "from prism_hf.runtime.stop import raise_if_stopped, stop_wanted",
        "def main(args):",
        "    print('ready', os.getpid(), flush=True)",
        textwrap.indent(textwrap.dedent(work), "    "),
        "sys.exit(run_command(main, argparse.Namespace(debug=False)))",
    ]
    return "\n".join(lines)


def default_signals():
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def start(code, *words, prepare=default_signals, env=()):
    return subprocess.Popen(
        [PYTHON, "-c", code, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet_env() | dict(env),
        preexec_fn=prepare,  # noqa: PLW1509
    )  # fmt: skip


def ready(process):
    """Wait until the work has begun, and return the pid of the worker."""
    word, pid = process.stdout.readline().split()
    assert word == "ready"
    return int(pid)


@pytest.mark.parametrize(("where", "number"), rest_slow(product(BLOCKED, SIGNALS), diagonal(BLOCKED, SIGNALS)))
def test_a_process_that_does_not_check_for_a_stop_ends_with_one_line(where, number):
    process = start(program(BLOCKED[where]))
    ready(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number
    (line,) = err.split("\n")[1:-1]
    assert line.startswith(f"{number.name}: ")
    assert "run the same command again to resume" in line


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_loop_that_checks_for_a_stop_ends_cleanly(number):
    process = start(program(CLEAN))
    ready(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number
    assert out == "put away\n"
    assert err.count("\n") == 2
    assert "Traceback" not in err


def test_an_ignored_signal_stays_ignored():
    """`nohup` starts a run so that closing the terminal does not end it."""
    work = "import time\nsys.stdin.readline()\nprint('done' if not stop_wanted() else 'stopped')"
    process = start(program(work), prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    ready(process)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate("\n", timeout=TIMEOUT)
    assert (process.returncode, out, err) == (0, "done\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("how", ["&", "nohup &"])
def test_a_run_in_the_background_can_be_stopped(how, number):
    """A shell that is not interactive starts background commands with SIGINT ignored."""
    command = "nohup " if how.startswith("nohup") else ""
    process = subprocess.Popen(
        ["sh", "-c", f'{command}"$@" & wait $!; echo "exit $?"', "sh", PYTHON, "-c", program(CLEAN)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet_env(),
    )  # fmt: skip
    os.kill(ready(process), number)
    out, err = process.communicate(timeout=TIMEOUT)
    assert out.endswith(f"put away\nexit {128 + number}\n")
    assert f"{number.name}: finished work is kept" in err


def test_a_launcher_that_ignores_ctrl_c_is_named_at_the_start(tmp_path):
    script = tmp_path / "accelerate"
    script.write_text(PARENT)
    launcher = subprocess.Popen(
        ["sh", "-c", '"$@" & wait $!', "sh", PYTHON, str(script), program(CLEAN)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet_env(),
    )  # fmt: skip
    worker = ready(launcher)
    assert launcher.stderr.readline().endswith(f"to stop: kill -INT {worker}\n")
    os.kill(worker, signal.SIGINT)
    assert launcher.stdout.readline() == "put away\n"
    psutil.Process(launcher.pid).children()[0].kill()
    launcher.communicate(timeout=TIMEOUT)


def test_only_the_first_process_prints_the_message():
    process = start(program(CLEAN), env={"RANK": "1"}.items())
    ready(process)
    process.terminate()
    _, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (143, "")


def test_handlers_are_restored_and_no_stop_is_requested_initially():
    work = """
    import signal
    from prism_hf.runtime.stop import stopping_cleanly
    """
    code = program(work).replace("sys.exit(", "before = [__import__('signal').getsignal(n) for n in (2, 15, 1)]\nrun = (")
    code += "\nassert [__import__('signal').getsignal(n) for n in (2, 15, 1)] == before\nprint('same')"
    out, err = start(code).communicate(timeout=TIMEOUT)
    assert out.endswith("same\n"), err
    assert not stop_wanted()
    raise_if_stopped()


LAUNCHERS = ["bin/accelerate", "bin/torchrun", "accelerate/commands/launch.py"]
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=sys.stdin)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "place", rest_slow(["bin/accelerate", "bin/torchrun", "accelerate/commands/launch.py"], ["bin/accelerate"])
)
def test_the_end_of_the_launcher_ends_its_process(place, tmp_path):
    script = tmp_path / place
    script.parent.mkdir(parents=True)
    script.write_text(PARENT)
    launcher = subprocess.Popen(
        [PYTHON, str(script), program(BLOCKED["a lock"])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ready(launcher)
    launcher.kill()
    # Returns when no process holds the pipes anymore.
    _, err = launcher.communicate(timeout=TIMEOUT)
    assert "the launcher has ended: finished work is kept" in err


def test_the_end_of_another_parent_ends_nothing():
    """Not even the end of a parent with the word in its path or in its arguments."""
    work = """
    import time
    sys.stdin.readline()
    for _ in range(30):
        time.sleep(0.1)
        raise_if_stopped()
    print("done", flush=True)
    """
    shell = start(PARENT, program(work), "/home/accelerate/notes.txt")
    child = ready(shell)
    shell.kill()
    shell.wait(timeout=TIMEOUT)
    assert os.getpgid(child) > 0, "the process is alive"
    out, err = shell.communicate("\n", timeout=TIMEOUT)
    assert (out, err) == ("done\n", "")
