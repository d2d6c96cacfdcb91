"""Clean stop of a run within seconds, on Ctrl-C, SIGTERM, or the death of the launcher.

A thread receives the signals, since the main thread may be inside a library call for hours (a barrier, a long
kernel). Loops check `stop_wanted` at each step, save their state, and return. A process that takes too long is ended.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..errors import StoppedError

GRACE_S = 3.0
"""Seconds for the main thread to save its state. Users are promised five in total; the rest is for a busy machine."""
EVERY_S = 120.0  # between two checkpoints of a long job: the most that a stop may lose
_LAUNCHER_CHECK_S = 0.3
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun")
_LAUNCHER_MODULES = ("accelerate.commands", "torch.distributed")
_LAUNCHER_FILES = ("accelerate/commands/launch.py", "torch/distributed/run.py")
STARTED_BY = "PRISM_HF_STARTED_BY"
"""Environment variable with the process id of the first process, in those that it has started."""
_HOW_TO_RESUME = "finished work is kept; run the same command again to resume"

_wanted, _told = threading.Event(), threading.Event()
_finished = threading.Event()
_exit_code, _first_at = 0, 0.0


def is_first_process() -> bool:
    """Return whether this process speaks for the whole launch. Works before the processes have connected."""
    return os.environ.get("RANK", "0") == "0"


def stop_wanted() -> bool:
    """Return whether the program was asked to stop."""
    return _wanted.is_set()


def raise_if_stopped() -> None:
    """Raise a `StoppedError` if the program was asked to stop."""
    if stop_wanted():
        raise StoppedError(_HOW_TO_RESUME)


def leave_at_once() -> None:
    """End the process if it was asked to stop: everything is saved by now, and Python's own exit can take seconds."""
    if _exit_code:
        _told.wait(1.0)  # another thread writes the line about the stop
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(_exit_code)


@contextlib.contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Make signals set `stop_wanted` in the block, and end the process if it does not react. Main thread only."""
    global _exit_code, _finished
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _wanted.clear()
    _told.clear()
    _exit_code = 0
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # `nohup` ignores SIGHUP on purpose. A shell that starts a command with & ignores SIGINT only because the terminal's
    # Ctrl-C is not for that command; `kill -INT` is.
    ignored = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    handled = [number for number in _SIGNALS if number not in ignored or number == signal.SIGINT]
    # The handlers do nothing: the thread that reads the wake-up socket does their work.
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    finished = _finished = threading.Event()
    threading.Thread(target=_watch_signals, args=(reader,), daemon=True).start()
    # Checked here, not in the thread: the launcher may die before the thread runs.
    if _is_launcher(parent := os.getppid()) or os.environ.get(STARTED_BY) == str(parent):
        if is_first_process() and _ignores_ctrl_c(parent):
            sys.stderr.write(f"the launcher runs in the background and ignores SIGINT; to stop: kill -INT {os.getpid()}\n")
        threading.Thread(target=_watch_launcher, args=(parent, finished), daemon=True).start()
    try:
        yield
    finally:
        finished.set()
        signal.set_wakeup_fd(old_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()


def _watch_signals(reader: socket.socket) -> None:
    """Stop on the first signal. A second Ctrl-C ends the process at once."""
    while data := reader.recv(16):
        for number in data:
            if number not in _SIGNALS:
                continue
            # One Ctrl-C may reach a process twice: from the terminal, and from a launcher that forwards it.
            if _wanted.is_set() and number == signal.SIGINT and time.monotonic() - _first_at > 1:
                os._exit(128 + number)
            stop(signal.Signals(number).name, 128 + number)
    reader.close()


def stop(reason: str, code: int) -> None:
    """Ask the program to stop, with this exit code. Loops save their state; a process that takes too long is ended."""
    global _exit_code, _first_at
    if _wanted.is_set():
        return
    _exit_code, _first_at = code, time.monotonic()
    _wanted.set()
    threading.Thread(target=_end, args=(code, _finished), daemon=True).start()
    if is_first_process():
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            sys.stderr.write(f"\n{reason}: {_HOW_TO_RESUME}\n")
            sys.stderr.flush()
    _told.set()


def _end(code: int, finished: threading.Event) -> None:
    """End a process that is still inside a library call. Files are always complete, so none is damaged."""
    if not finished.wait(GRACE_S):
        os._exit(code)


def _watch_launcher(parent: int, finished: threading.Event) -> None:
    """Stop when the launcher ends: otherwise, a killed `accelerate launch` would leave its processes running."""
    while not finished.wait(_LAUNCHER_CHECK_S):
        if os.getppid() != parent:
            stop("the launcher has ended", 128 + signal.SIGTERM)
            return


def _is_launcher(pid: int) -> bool:
    """Return whether a process is a launcher, by the words of its command: a path may contain one of them by chance."""
    try:
        words = psutil.Process(pid).cmdline()[:4]
    except psutil.Error:
        return False
    names = any(Path(word).name in _LAUNCHERS for word in words)
    return names or any(word.startswith(_LAUNCHER_MODULES) or word.endswith(_LAUNCHER_FILES) for word in words)


def _ignores_ctrl_c(pid: int) -> bool:
    """Return whether a process ignores SIGINT, as far as Linux says so."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigIgn:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGINT - 1) & 1)
    return False
