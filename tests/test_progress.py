import json

import pytest

from prism_hf import progress as module
from prism_hf.progress import Progress, duration_text, progress


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
