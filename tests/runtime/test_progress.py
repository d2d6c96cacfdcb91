import json

import pytest

from prism_hf.runtime import progress as module
from prism_hf.runtime.progress import Board, Progress, progress
from prism_hf.runtime.units import duration_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3600, "60 min"), (5399, "1 h 30 min"), (7200, "2 h"),
        (12000, "3 h 20 min"), (190800, "2 d 5 h"), (172800, "2 d"),
    ],
)  # fmt: skip
def test_durations_are_for_people(seconds, text):
    assert duration_text(seconds) == text


def test_what_is_being_done_stands_in_a_file_until_the_end(tmp_path):
    path = tmp_path / "progress-0.json"
    with progress(path, "synthesize", 100, "step", print) as shown:
        shown.skip(30)
        assert shown.seconds_left() is None, "found work says nothing about speed"
        shown.doing("job 3")
        shown.advance(20)
        shown.write()
        value = json.loads(path.read_text())
        assert (value["stage"], value["now"], value["done"], value["of"]) == ("synthesize", "job 3", 50, 100)
        assert value["seconds_left"] == pytest.approx(shown.seconds_left(), abs=60)
    assert not path.exists()


def test_the_estimate_counts_only_what_this_launch_did(tmp_path, monkeypatch):
    shown = Progress(tmp_path / "p.json", "relabel", 100, "epoch", print)
    shown.skip(50)
    shown.advance(10)
    monkeypatch.setattr(shown, "_started", module.time.monotonic() - 1000)
    assert shown.seconds_left() == pytest.approx(4000, rel=0.5)
    shown.close()


def test_a_long_stage_says_once_how_long_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ESTIMATE_AFTER_S", -1.0)
    said = []
    with progress(tmp_path / "p.json", "relabel", 3, "epoch", said.append) as shown:
        for _ in range(3):
            shown.advance()
    (line,) = said
    assert line.startswith("relabel: about ")


class Bar:
    """What a terminal would show."""

    def __init__(self, *, total, initial=0, **_):
        self.total, self.n, self.names, self.open = total, float(initial), [], True

    def update(self, count):
        self.n += count

    def set_description(self, text):
        self.names.append(text)

    def close(self):
        self.open = False


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setattr(module, "tqdm", Bar)
    said = []
    made = Board(4, said.append)
    made.found(1)
    return made, said


def test_one_bar_serves_many_runs(board, tmp_path):
    shown, said = board
    bar = shown._bar
    assert (bar.total, bar.n) == (4, 1), "a run that an earlier launch had finished"
    shown.begin("SRe2L, seed 0")
    for stage, total in (("synthesize", 10), ("relabel", 0), ("package", 3), ("evaluate", 2)):
        with progress(tmp_path / "p.json", stage, total, "unit", print, shown.share(stage, total)) as part:
            part.skip(total // 2)
            part.advance(total - total // 2)
        assert bar.open, "it is not of one stage"
    assert bar.n == pytest.approx(1 + Board.SHARES["synthesize"] + Board.SHARES["evaluate"])
    assert bar.names == [
        "SRe2L, seed 0",
        *(f"SRe2L, seed 0, {s}" for s in ("synthesize", "relabel", "package", "evaluate")),
    ]
    shown.end(2)
    assert bar.n == pytest.approx(2), "whatever its stages have told"
    for number in (3, 4):
        shown.begin(f"run {number}")
        shown.end(number)
    shown.close()
    assert bar.n == pytest.approx(4)
    assert not bar.open
    assert [line.partition(",")[0] for line in said] == ["SRe2L", "run 3: 3 of 4 jobs done", "run 4: 4 of 4 jobs done"]


def test_teachers_and_students_of_real_images_are_jobs_on_the_same_bar(board, tmp_path):
    shown, _ = board
    shown.begin("teachers")
    with progress(tmp_path / "p.json", "squeeze", 2, "teacher", print, shown.share("squeeze", 2)) as part:
        part.advance()
        assert shown._bar.n == pytest.approx(2)
        part.advance()
    assert shown._bar.n == pytest.approx(3)
    shown.close()


def test_the_shares_of_a_run_are_one_run():
    assert sum(Board.SHARES.values()) == pytest.approx(1)


def test_the_estimate_of_a_board_counts_only_this_launch(board, monkeypatch):
    shown, said = board
    monkeypatch.setattr(shown, "_began", module.time.monotonic() - 600)
    shown.begin("a")
    shown.end(2)
    assert said == ["a: 2 of 4 jobs done, about 20 min left"]


def test_on_a_board_no_stage_tells_its_own_estimate(board, tmp_path, monkeypatch):
    shown, said = board
    monkeypatch.setattr(module, "ESTIMATE_AFTER_S", -1.0)
    with progress(tmp_path / "p.json", "relabel", 3, "epoch", said.append, shown.share("relabel", 3)) as part:
        part.advance(2)
    assert said == []
