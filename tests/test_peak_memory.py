"""Peak memory: it must not grow with ten times the images or epochs.

The tests measure anonymous memory, because the kernel can drop pages of mapped files at any time. To cover another stage,
add an entry to `CASES`. Naive code must fail it, so the images are large compared to the memory of the libraries.
"""

import os
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pipeline import PYTHON, add_card, quiet_env, small_set

LIMIT = 1.05
IPC = (30, 300)
STATUS = Path("/proc/self/status")

pytestmark = pytest.mark.skipif(
    not STATUS.is_file() or "RssAnon" not in STATUS.read_text(), reason="no RssAnon in /proc/self/status"
)

CASES = {
    "train": """
import dataclasses, sys
import torch
from prism_hf.dataset.reader import load_distilled
from prism_hf.evaluation.students import train_student

torch.set_num_threads(1)
data = load_distilled(sys.argv[1])
settings = dataclasses.replace(data.recipe.evaluation, student="test_byobnet", epochs=1, batch_size=20)
train_student(data, settings, labels="soft", seed=0, device=torch.device("cpu"))
""",
    "read": """
import sys
from prism_hf.dataset.reader import load_distilled

data = load_distilled(sys.argv[1])
assert data.num_epochs in (20, 200)
for epoch in range(data.num_epochs):
    data.epoch(epoch)
""",
    "relabel and package": """
import sys
from pathlib import Path

import torch
from pipeline import run_in, tiny
from torch import nn

from prism_hf.images.source import SourceData
from prism_hf.models.teacher import Teacher
from prism_hf.run.artifacts import ImageSet
from prism_hf.run.context import Loaded
from prism_hf.run.package import package_set
from prism_hf.run.relabel import label


class Noise:
    \"""Images that no format can compress.\"""

    content = "noise"

    def images(self, rows):
        return torch.randint(256, (len(rows), 3, 32, 32), dtype=torch.uint8)

    def rows_by_class(self, num_classes):
        return [[]] * num_classes


folder = Path(sys.argv[2])
ipc = int(sys.argv[2].rpartition("/")[2].strip("-")) // 15
words = (
    "data.num_classes=1000", "data.size=32", "data.channels=3", "teachers.logit=t", "teachers.bn_pool=[]",
    f"synthesis.ipc={ipc}", "relabel.teachers=[t]", "relabel.epochs=1", "relabel.batch_size=100",
)
network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000)).requires_grad_(False)
teacher = Teacher("t", network, (0.5,) * 3, (0.5,) * 3, 32, 1000, "t", "mit", None, "0", None)
data = SourceData(Noise(), Noise(), tuple(map(str, range(1000))), None)
run = run_in(folder, folder, *words, loaded=Loaded({tiny(*words).data: data}, {("t", None): teacher}))
images = ImageSet("random_real", tuple((c, s, -1, 0) for c in range(1000) for s in range(ipc)), "key")
label(run, [images])
package_set(run, images)
assert (run.control / "README.md").is_file()
""",
    "verify and export": """
import sys
from prism_hf.dataset.export import export
from prism_hf.dataset.provenance import verify

assert verify(sys.argv[1]).differences == ()
for layout in ("imagefolder", "rethinkdc"):
    export(sys.argv[1], sys.argv[2] + layout, format=layout)
""",
}


def peak_anonymous(code, *words, cache):
    """Return the highest RssAnon, in bytes, of a new Python process that runs `code` with `words` as its arguments.

    It is read from another process, so that the interpreter lock cannot hide a peak. The plain allocators return freed
    memory at once; others keep it for a while, and the number would be random.
    """
    # As in benchmarks/memory.py: freed memory is returned, so that the peak counts only memory in use.
    plain = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    plain |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "HF_DATASETS_CACHE": str(cache)}
    plain["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), quiet_env()["PYTHONPATH"]])  # for pipeline.py
    process = subprocess.Popen([PYTHON, "-c", code, *map(str, words)], env=quiet_env() | plain)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        lines = (line.split() for line in status.read_text().splitlines())
        peak = max([peak, *(int(line[1]) * 1024 for line in lines if line[0] == "RssAnon:")])
        time.sleep(0.002)
    assert process.returncode == 0
    return peak


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Return two datasets that differ only in their number of images."""
    folders = []
    for ipc in IPC:
        folder = tmp_path_factory.mktemp("memory") / "set"
        recipe, names, *_ = small_set(folder, channels=3, size=64, classes=10, ipc=ipc, epochs=1)
        add_card(folder, recipe, names)
        folders.append(folder)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("case", ["train", "relabel and package", "verify and export"])
def test_ten_times_the_images_need_no_more_memory(sets, tmp_path, case):
    small, large = (
        peak_anonymous(CASES[case], folder, tmp_path / f"{ipc}-", cache=tmp_path / f"cache-{ipc}")
        for folder, ipc in zip(sets, IPC, strict=True)
    )
    assert large <= LIMIT * small, f"{small / 1e6:.0f} MB became {large / 1e6:.0f} MB"


@pytest.mark.slow
def test_ten_times_the_epochs_need_no_more_memory(tmp_path):
    peaks = []
    for epochs in (20, 200):
        folder = tmp_path / f"{epochs}"
        small_set(folder, size=8, classes=100, ipc=10, epochs=1)
        (path,) = (folder / "views").iterdir()
        epoch = pq.read_table(path)
        with pq.ParquetWriter(path, epoch.schema) as writer:
            for _ in range(epochs):
                writer.write_table(epoch)
        peaks.append(peak_anonymous(CASES["read"], folder, cache=tmp_path / "cache"))
    small, large = peaks
    assert large <= LIMIT * small, f"{small / 1e6:.0f} MB became {large / 1e6:.0f} MB"
