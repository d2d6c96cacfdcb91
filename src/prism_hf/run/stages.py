"""The stages of a run, in the order that it takes them; each takes what the last one left.

Every stage shares its independent tasks over the processes and skips what is finished, so a second launch resumes where
the first one stopped, with any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..recipe import STAGES
from ..runtime import raise_if_stopped, write_json
from .context import Run
from .evaluate import evaluate
from .package import package
from .relabel import relabel
from .squeeze import squeeze
from .synthesize import synthesize

_FUNCTIONS = {
    "squeeze": squeeze,
    "synthesize": synthesize,
    "relabel": relabel,
    "package": package,
    "evaluate": evaluate,
}


def run_stages(run: Run, wanted: Sequence[str] = STAGES) -> None:
    """Run the wanted stages, in order, and record how long each took."""
    for name in (stage for stage in STAGES if stage in wanted):
        run.say(f"stage {name}")
        with run.timed(name):
            _FUNCTIONS[name](run)
            run.accelerator.wait_for_everyone()
        raise_if_stopped()
    report = run.folder / "report.json"
    if run.accelerator.is_main_process and report.is_file():
        # Only now is the time of the last stage known.
        values = json.loads(report.read_text(encoding="utf-8"))
        write_json(report, values | {"wall_time_s": run.times()})
