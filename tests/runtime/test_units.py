import pytest

from prism_hf.runtime.units import count_text, duration_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3600, "60 min"), (5399, "1 h 30 min"), (7200, "2 h"),
        (12000, "3 h 20 min"), (190800, "2 d 5 h"), (172800, "2 d"),
    ],
)  # fmt: skip
def test_durations_are_readable(seconds, text):
    assert duration_text(seconds) == text


def test_one_thing_is_counted_in_the_singular():
    texts = [count_text(count, "seed") for count in (0, 1, 2, 1347)]
    assert texts == ["0 seeds", "1 seed", "2 seeds", "1,347 seeds"]
    assert [count_text(count, "process", "processes") for count in (1, 2)] == ["1 process", "2 processes"]
