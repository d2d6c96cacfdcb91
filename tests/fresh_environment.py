"""A fresh virtual environment that has the dependencies of this one, but not prism-hf."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


def fresh_environment(folder: Path) -> dict[str, str]:
    """Make a virtual environment in a folder; returns the variables with which its programs come first."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    for old in site.glob("setuptools*"):  # the one that Python 3.11 brings is older than the dependencies ask for
        shutil.rmtree(old)
    # Not as a site folder: the .pth file there that leads to this checkout is not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # Programs of the dependencies, for this Python: `accelerate launch` and `hf` start it by name.
    for program in ("accelerate", "hf"):
        text = f"#!{folder}/bin/python\n" + Path(sysconfig.get_path("scripts"), program).read_text().partition("\n")[2]
        (folder / "bin" / program).write_text(text)
        (folder / "bin" / program).chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return kept | offline | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}
