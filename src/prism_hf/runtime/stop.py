"""The end of a run when somebody asks for it: Ctrl-C, SIGTERM, or the death of the launcher, each within seconds.

A signal is noticed by a thread, since the main thread may be inside a library call for hours (a barrier, a long
kernel). Loops ask `stop_wanted` at each step, keep what they have, and leave; whoever does not leave in time is ended.
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
"""Seconds that the main thread has to keep its state; a busy machine takes its time, and five is what is promised."""
EVERY_S = 120.0  # between two checkpoints of a long job: what a stop may lose at most
_LAUNCHER_CHECK_S = 0.3
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun")
_LAUNCHER_MODULES = ("accelerate.commands", "torch.distributed")
_LAUNCHER_FILES = ("accelerate/commands/launch.py", "torch/distributed/run.py")
_HOW_TO_RESUME = "what is finished is kept; the same command goes on where this run stopped"

_wanted, _told = threading.Event(), threading.Event()
_exit_code, _first_at = 0, 0.0


def is_first_process() -> bool:
    """Whether this process speaks for all of its launch; known before the processes meet."""
    return os.environ.get("RANK", "0") == "0"


def stop_wanted() -> bool:
    """Whether somebody asked the program to stop."""
    return _wanted.is_set()


def raise_if_stopped() -> None:
    """Leave the work with a `StoppedError` if somebody asked for it."""
    if stop_wanted():
        raise StoppedError(_HOW_TO_RESUME)


def leave_at_once() -> None:
    """End the process if somebody asked for it: everything is kept by now, and Python's own exit can take seconds."""
    if _exit_code:
        _told.wait(1.0)  # the line about it is another thread's
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(_exit_code)


@contextlib.contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Inside the block, signals set `stop_wanted`, and end the process if it takes no notice; for the main thread."""
    global _exit_code
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _wanted.clear()
    _told.clear()
    _exit_code = 0
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # The thread that reads the wake-up socket does the work of the handlers.
    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in heeded}
    old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    finished = threading.Event()
    threading.Thread(target=_watch_signals, args=(reader, finished), daemon=True).start()
    # Looked up here, not in the thread: the launcher may die before that has run.
    if _is_launcher(parent := os.getppid()):
        threading.Thread(target=_watch_launcher, args=(parent, finished), daemon=True).start()
    try:
        yield
    finally:
        finished.set()
        signal.set_wakeup_fd(old_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()


def _watch_signals(reader: socket.socket, finished: threading.Event) -> None:
    """Wait for the first signal; the second one ends the process at once."""
    while data := reader.recv(16):
        for number in data:
            if number not in _SIGNALS:
                continue
            # One Ctrl-C reaches a process more than once: from the terminal, and from a launcher that passes it on.
            if _wanted.is_set() and number == signal.SIGINT and time.monotonic() - _first_at > 1:
                os._exit(128 + number)
            _stop(signal.Signals(number).name, 128 + number, finished)
    reader.close()


def _stop(reason: str, code: int, finished: threading.Event) -> None:
    global _exit_code, _first_at
    if _wanted.is_set():
        return
    _exit_code, _first_at = code, time.monotonic()
    _wanted.set()
    threading.Thread(target=_end, args=(code, finished), daemon=True).start()
    if is_first_process():
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            sys.stderr.write(f"\n{reason}: {_HOW_TO_RESUME}\n")
            sys.stderr.flush()
    _told.set()


def _end(code: int, finished: threading.Event) -> None:
    """End a process that is still inside a library call; every file is whole at any moment, so nothing is lost."""
    if not finished.wait(GRACE_S):
        os._exit(code)


def _watch_launcher(parent: int, finished: threading.Event) -> None:
    """End with the launcher: `accelerate launch` that is killed would leave its processes behind, at work."""
    while not finished.wait(_LAUNCHER_CHECK_S):
        if os.getppid() != parent:
            _stop("the launcher has ended", 128 + signal.SIGTERM, finished)
            return


def _is_launcher(pid: int) -> bool:
    """By the words of its command, not by a path that happens to contain one of them."""
    try:
        words = psutil.Process(pid).cmdline()[:4]
    except psutil.Error:
        return False
    names = any(Path(word).name in _LAUNCHERS for word in words)
    return names or any(word.startswith(_LAUNCHER_MODULES) or word.endswith(_LAUNCHER_FILES) for word in words)
