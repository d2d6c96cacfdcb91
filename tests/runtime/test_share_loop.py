"""The loop over tasks, with one process here and with two in a separate launch."""

import json
import os
import random
import socket
import subprocess
import time
from dataclasses import dataclass

import pytest
from pipeline import PYTHON, file_limit, quiet_env

from prism_hf.runtime import share_loop as module
from prism_hf.runtime.share_loop import Progress, deal, share, unfinished


@dataclass
class Alone:
    """An accelerator stub for one process, with only the parts that the loop uses."""

    process_index: int = 0
    num_processes: int = 1
    is_main_process: bool = True
    waited: int = 0

    def wait_for_everyone(self):
        self.waited += 1


def loop(folder, tasks, *, done=(), do=None, accelerator=None, **more):
    """Run the loop over tasks, which are numbers, and return those that were done, in order."""
    finished, order = set(done), []

    def work(task, progress):
        (do or (lambda *_: None))(task, progress)
        order.append(task)
        finished.add(task)

    words = {"is_done": finished.__contains__, "do": work, "unit": "job", "notes": folder} | more
    share(accelerator or Alone(), "synthesize", tasks, **words)
    return order


def read(folder):
    return json.loads((folder / "progress-0.json").read_text())


# -- which tasks ------------------------------------------------------------------------------------------------------


def test_finished_tasks_are_skipped_and_the_largest_come_first(tmp_path, caplog):
    accelerator = Alone()
    with caplog.at_level("INFO", "prism_hf"):
        order = loop(tmp_path, [3, 1, 4, 2, 5], done=[4], size=lambda task: task // 2, accelerator=accelerator)
    assert order == [5, 3, 2, 1], "tasks of equal size keep their order"
    assert caplog.messages == ["synthesize: 1 of 5 jobs done, 4 to do"]
    assert accelerator.waited == 1
    assert list(tmp_path.iterdir()) == []


def test_preparation_runs_once_and_only_when_tasks_are_missing(tmp_path, caplog):
    calls = []
    assert loop(tmp_path, [1, 2, 3], done=[2], prepare=calls.append) == [1, 3]
    assert calls == [[1, 3]], "in the order of the tasks"
    with caplog.at_level("INFO", "prism_hf"):
        assert loop(tmp_path, [1, 2, 3], done=[1, 2, 3], prepare=calls.append) == []
    assert loop(tmp_path, [], prepare=calls.append) == []
    assert len(calls) == 1
    assert "synthesize: 3 of 3 jobs done, 0 to do" in caplog.messages


def test_a_second_launch_does_the_remaining_tasks(tmp_path):
    done = []

    def fail(task, _):
        if task == 2:
            raise KeyboardInterrupt
        done.append(task)

    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path, [1, 2, 3], do=fail)
    assert done == [1]
    assert list(tmp_path.iterdir()) == [], "no progress file after the share has ended"
    assert loop(tmp_path, [1, 2, 3], done=done) == [2, 3]


@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_processes_finish_at_about_the_same_time(tmp_path, monkeypatch, world):
    """With many sizes, each process gets its share of the large tasks, and no task is done twice."""
    sizes = [4000 - 500 * (number % 8) for number in range(40)]
    # The results of the other processes, which do not run here.
    monkeypatch.setattr(module, "gather_object", lambda _: list(range(len(sizes))))
    shares = [
        loop(tmp_path, list(range(len(sizes))), size=sizes.__getitem__, accelerator=Alone(rank, world, rank == 0))
        for rank in range(world)
    ]
    assert sorted(task for share in shares for task in share) == list(range(len(sizes)))
    work = [[sizes[task] for task in share] for share in shares]
    assert all(steps == sorted(steps, reverse=True) for steps in work)
    assert max(map(sum, work)) - min(map(sum, work)) <= max(sizes)


def mixes():
    """Return lists of task sizes, each with the most processes for which they can be divided evenly."""
    rng = random.Random(0)
    yield [4000 - 500 * (number // 10 % 8) for number in range(100)], 33  # ImageNet, 10 images per class: a ladder
    yield [4000 - 500 * (number // 10 % 8) for number in range(800)], 64
    yield [rng.randint(1, 1000) for _ in range(200)], 64
    yield [int(1000 * rng.lognormvariate(0, 1)) for _ in range(600)], 64
    yield [300] * 130 + [200] * 300, 51
    yield [7] * 640, 44
    yield [10_000] + [100] * 1000, 64  # the longest task is the limit
    yield [4, 30, 9, 16], 4


def test_processes_finish_within_five_percent_of_the_ideal():
    for costs, most in mixes():
        for world in range(1, most + 1):
            hands = deal(costs, world)
            assert sorted(number for hand in hands for number in hand) == list(range(len(costs)))
            ideal = max(sum(costs) / world, max(costs))
            busiest = max(sum(costs[number] for number in hand) for hand in hands)
            assert busiest <= 1.05 * ideal, (len(costs), world, busiest / ideal)


def test_the_longest_task_comes_first_and_tasks_without_cost_are_divided_too():
    assert deal([1, 5, 3, 2, 9], 2) == [[4, 0], [1, 2, 3]]
    assert [len(hand) for hand in deal([0] * 7, 3)] == [3, 2, 2]
    assert deal([2.5], 2) == [[0], []]


def test_a_cost_orders_the_tasks_and_sizes_count_the_progress(tmp_path):
    seen = []
    order = loop(
        tmp_path, [1, 2, 3], size=lambda _: 10, cost=lambda task: task % 3, do=lambda *_: seen.append(read(tmp_path)),
        steps="step",
    )  # fmt: skip
    assert order == [2, 1, 3]
    assert [(note["done"], note["of"]) for note in seen] == [(0, 30), (10, 30), (20, 30)]


def test_skipped_steps_are_in_the_file_at_once(tmp_path):
    seen = []

    def work(_, progress):
        progress.skip(30)
        seen.append(read(tmp_path)["done"])

    loop(tmp_path, [1], do=work, size=lambda _: 100, steps="step")
    assert seen == [30]


def test_unfinished_tasks_are_returned_in_order():
    assert unfinished(Alone(), "abcde", lambda letter: letter in "bd") == ["a", "c", "e"]


SCRIPT = """
import sys
from pathlib import Path
from accelerate import Accelerator
from prism_hf.runtime.share_loop import share

accelerator, folder = Accelerator(cpu=True), Path(sys.argv[1])
rank = accelerator.process_index

def note(what, task):
    with open(folder / f"{what}-{rank}", "a") as file:
        file.write(f"{task}\\n")

def is_done(task):
    note("looked", task)
    return task in (2, 5)

def do(task, progress):
    note("did", task)
    assert (folder / f"progress-{rank}.json").is_file()

share(
    accelerator, "relabel", list(range(8)), is_done=is_done, do=do, unit="job", notes=folder,
    prepare=lambda missing: note("prepared", missing), size=lambda task: {7: 9, 0: 9}.get(task, 1),
)
note("saw", sorted(path.name for path in folder.glob("progress-*")))
"""


def test_two_processes_divide_the_checks_and_the_work(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = tmp_path / "notes"
    folder.mkdir()
    words = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--main_process_port", "0", str(tmp_path / "script.py"), str(folder)]
    done = subprocess.run(
        [PYTHON, "-m", "accelerate.commands.launch", *words],
        capture_output=True, text=True, env=quiet_env(), check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    notes = {path.name: path.read_text().splitlines() for path in folder.iterdir()}
    assert (notes["looked-0"], notes["looked-1"]) == (list("0246"), list("1357"))
    assert notes["prepared-0"] == notes["prepared-1"] == ["[0, 1, 3, 4, 6, 7]"]
    assert notes["did-0"] == ["0", "1", "4"], "every second task, the largest first"
    assert notes["did-1"] == ["7", "3", "6"]
    assert notes["saw-0"] == notes["saw-1"] == ["[]"], "no process continues before all are done"


# -- progress ---------------------------------------------------------------------------------------------------------


def test_the_current_work_is_in_a_file_until_the_end(tmp_path):
    seen = []
    before = time.time()
    loop(
        tmp_path, [7, 5], do=lambda *_: seen.append(read(tmp_path)), name=lambda task: f"job {task}",
        size=lambda task: 10 * task, steps="step",
    )  # fmt: skip
    first, second = seen
    assert first == {
        "stage": "synthesize", "unit": "step", "done": 0, "of": 120, "now": "job 7", "seconds_left": None,
        "updated": first["updated"], "host": socket.gethostname(), "pid": os.getpid(),
    }  # fmt: skip
    assert (second["done"], second["now"]) == (70, "job 5")
    assert second["seconds_left"] >= 0
    assert before <= first["updated"] <= second["updated"] <= time.time()
    assert not (tmp_path / "progress-0.json").exists()


def test_a_task_may_report_its_steps_and_those_of_an_earlier_launch(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_WRITE_EVERY_S", -1.0)
    seen = []

    def work(task, progress):
        progress.skip(30)
        assert progress.seconds_left is None or task == 2, "work of an earlier launch does not count toward the speed"
        progress.advance(20)
        seen.append((progress.count, read(tmp_path)["done"]))

    loop(tmp_path, [1, 2], do=work, size=lambda _: 100, steps="step")
    assert seen == [(50, 50), (150, 150)], "the first task did not report its remaining steps"


def test_the_estimate_counts_only_work_of_this_launch(tmp_path, monkeypatch):
    progress = Progress(tmp_path / "p.json", "relabel", 100, "epoch")
    progress.skip(50)
    progress.advance(10)
    monkeypatch.setattr(progress, "_started", module.time.monotonic() - 1000)
    assert progress.seconds_left == pytest.approx(4000, rel=0.5)
    progress.close()


@pytest.mark.parametrize(
    ("accelerator", "title", "lines"), [(Alone(), "", 1), (Alone(is_main_process=False), "", 0), (Alone(), "SRe2L", 0)]
)
def test_a_long_stage_logs_one_time_estimate(tmp_path, monkeypatch, caplog, accelerator, title, lines):
    """Only the first process logs it; a comparison has its own estimate for all its runs."""
    monkeypatch.setattr(module, "ESTIMATE_AFTER_S", -1.0)
    with caplog.at_level("INFO", "prism_hf"):
        loop(tmp_path, [1, 2, 3], accelerator=accelerator, title=title)
    assert sum("synthesize: about " in line and line.endswith("left") for line in caplog.messages) == lines


class Bar:
    """Records what a terminal would show."""

    def __init__(self, **words):
        self.words, self.n, self.open = words, 0, True
        BARS.append(self)

    def update(self, count):
        self.n += count

    def close(self):
        self.open = False


BARS = []


def test_a_full_disk_for_progress_notes_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "tqdm", Bar)  # pytest captures output into files
    with file_limit(100):
        assert loop(tmp_path, [1, 2]) == [1, 2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("title", "text"), [("", "synthesize"), ("SRe2L, seed 0", "SRe2L, seed 0, synthesize")])
def test_a_bar_shows_the_steps_of_this_process(tmp_path, monkeypatch, title, text):
    monkeypatch.setattr(module, "tqdm", Bar)
    BARS.clear()

    def work(task, progress):
        if task == 1:
            progress.advance(3)

    loop(tmp_path, [1, 2], do=work, size=lambda _: 10, steps="step", title=title)
    (bar,) = BARS
    assert bar.words == {"total": 20, "desc": text, "unit": "step", "leave": not title}
    assert bar.n == 20
    assert not bar.open


def test_a_task_moves_through_its_steps_and_a_resumed_one_starts_where_it_was(tmp_path):
    seen = []

    def do(task, progress):
        progress.reach(30 if task == 1 else 0)  # an earlier launch did 30 steps of task 1
        seen.append((progress.count, progress.seconds_left))
        progress.reach(60)
        seen.append((progress.count, progress.seconds_left is not None))

    loop(tmp_path, [1, 2], do=do, size=lambda _: 100, steps="step")
    assert seen == [(30, None), (60, True), (100, seen[2][1]), (160, True)]
    assert seen[2][1] is not None
