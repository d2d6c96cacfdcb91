"""A new virtual environment with the dependencies of this one, but without prism-hf."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

IN_TESTS = ("PYTHONPATH", "OMP_NUM_THREADS")
"""Variables of the tests that a user does not have. One core per process stays: two test workers share the machine."""


def fresh_environment(folder: Path) -> dict[str, str]:
    """Create a virtual environment in a folder; return environment variables that put its programs first."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    for old in site.glob("setuptools*"):  # Python 3.11 ships one that is too old for the dependencies
        shutil.rmtree(old)
    # Do not add it as a site folder: its own .pth file, which points to this checkout, must not be read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # Copy `accelerate` and `hf` with a shebang for this Python, so that they can be started by name.
    for program in ("accelerate", "hf"):
        text = f"#!{folder}/bin/python\n" + Path(sysconfig.get_path("scripts"), program).read_text().partition("\n")[2]
        (folder / "bin" / program).write_text(text)
        (folder / "bin" / program).chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in IN_TESTS}
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return kept | offline | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}
