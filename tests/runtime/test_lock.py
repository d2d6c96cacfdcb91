import os
import signal
import socket
import subprocess

import pytest
from pipeline import PYTHON, mtimes, one_line, quiet_env

from prism_hf.errors import OutputError
from prism_hf.runtime.lock import HOLDER, LOCK, check_free, holder_of, holder_text, is_held, locked
from prism_hf.runtime.store import write_bytes

HOLD = """
import sys
from pathlib import Path
from prism_hf.runtime.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that locks a folder until it reads a line."""
    process = subprocess.Popen(
        [PYTHON, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=quiet_env(),
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_error_for_a_second_process_names_host_and_process_of_the_first(other, tmp_path):
    before = mtimes(tmp_path)
    with pytest.raises(OutputError) as error, locked(tmp_path / "run", patience_s=0.1):
        pytest.fail("both processes hold the lock")
    text = one_line(error)
    assert f"process {other.pid} on {socket.gethostname()}, since " in text
    assert "--output DIR" in text
    assert mtimes(tmp_path).keys() == before.keys()
    assert holder_of(tmp_path / "run")["pid"] == other.pid


def test_a_lock_that_is_released_soon_is_waited_for(other, tmp_path):
    other.stdin.write("\n")
    other.stdin.flush()
    with locked(tmp_path / "run", patience_s=120) as killed:
        assert killed is None
        assert holder_of(tmp_path / "run")["pid"] == os.getpid()


def test_the_lock_of_a_killed_process_is_taken_over_and_its_holder_is_reported(other, tmp_path):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert not is_held(tmp_path / "run")
    with locked(tmp_path / "run") as killed:
        assert killed["pid"] == other.pid
        assert f"process {other.pid} on " in holder_text(killed)
    with locked(tmp_path / "run") as killed:
        assert killed is None


def test_an_error_releases_the_folder(tmp_path):
    with pytest.raises(OutputError), locked(tmp_path):
        write_bytes(tmp_path / HOLDER / "below", b"x")
    assert not is_held(tmp_path)
    assert not (tmp_path / HOLDER).exists()


def test_a_query_changes_nothing(other, tmp_path):
    assert not is_held(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    before = mtimes(tmp_path)
    assert is_held(tmp_path / "run")
    assert mtimes(tmp_path).keys() == before.keys()
    other.communicate("\n")
    left = mtimes(tmp_path)
    assert not is_held(tmp_path / "run")
    assert mtimes(tmp_path) == left
    assert {p.rpartition("/")[2] for p in left} <= {LOCK}


def test_a_folder_that_cannot_be_locked_gives_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError) as error, locked(tmp_path / "file" / "below"):
        pass
    assert str(tmp_path / "file" / "below") in one_line(error)


def test_an_unreadable_holder_is_reported_as_another_process(tmp_path):
    for text in ("", "[]", "{"):
        (tmp_path / HOLDER).write_text(text)
        assert holder_of(tmp_path) is None
    assert holder_text(None) == "another process"


def test_an_early_check_also_refuses_and_writes_nothing(tmp_path):
    folder = tmp_path / "run"
    check_free(folder, patience_s=0)
    assert not folder.exists()
    with locked(folder):
        before = mtimes(folder)
        with pytest.raises(OutputError, match=f"process {os.getpid()} on"):
            check_free(folder, patience_s=0.3)
        assert mtimes(folder) == before
    check_free(folder, patience_s=0)
