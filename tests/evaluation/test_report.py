import json
import math
import statistics

import pytest

from prism_hf.evaluation.report import (
    bytes_text,
    difference,
    evaluation_facts,
    full_is_best,
    in_words,
    knows_little,
    markdown_table,
    plain_table,
    remarks_on,
    score_row,
    summary,
    table_rows,
    top1_text,
)  # fmt: skip


def score(images, labels, *top1):
    return score_row(images, labels, range(len(top1)), top1, 30)


def facts(image_bytes, label_bytes, verifier_top1, mean, *per_class):
    return {
        "image_bytes": image_bytes, "label_bytes": label_bytes, "verifier_top1": verifier_top1,
        "intra_class_similarity": {"mean": mean, "per_class": list(per_class)},
    }  # fmt: skip


@pytest.fixture
def evaluation():
    return evaluation_facts(
        rows=(
            score("distilled", "soft", 0.9, 0.92),
            score("random_real", "soft", 0.8, 0.82),
            score("full", "hard", 0.99),
        ),
        sets={
            "distilled": facts(12_345, 678, 0.5, 0.25, 0.25, None),
            "random_real": facts(99, 1_000_000, None, None, None, None),
        },
        student="test_resnet",
        epochs=4,
        test_count=50,
        left_out={"full-soft": "no teachers"},
    )


def test_score_has_mean_and_sample_deviation():
    made = score("distilled", "soft", 0.5, 0.6, 0.9)
    assert made["mean"] == pytest.approx(2.0 / 3)
    assert made["std"] == pytest.approx(statistics.stdev([0.5, 0.6, 0.9]))


def test_one_seed_has_no_deviation():
    one = score("distilled", "soft", 0.5)
    assert one["std"] is None
    assert top1_text(one) == "50.0 (one seed)"
    assert top1_text(score("distilled", "soft", 0.5, 0.5)) == "50.0 ± 0.0"


@pytest.mark.parametrize(
    ("ours", "control", "verdict", "points"),
    [
        ((0.90, 0.91, 0.92), (0.80, 0.81, 0.82), "the distilled images win", "+10.0"),
        ((0.80, 0.81, 0.82), (0.90, 0.91, 0.92), "random real images win", "-10.0"),
        ((0.80, 0.82, 0.81), (0.90, 0.91, 0.92), "random real images win", "-10.0"),
        ((0.80, 0.90), (0.82, 0.90), "the distilled images and random real images are level", "-1.0"),
        ((0.5, 0.5), (0.5, 0.5), "the distilled images and random real images are level", "+0.0"),
        ((0.6, 0.6), (0.5, 0.5), "the distilled images win", "+10.0"),
    ],
)
@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_verdict_is_stated_in_words(ours, control, verdict, points, labels):
    text = in_words([score("distilled", labels, *ours), score("random_real", labels, *control)])
    assert text.startswith(f"With {labels} labels {verdict}: distilled minus random real is {points} points")
    assert text.count("With") == 1


def test_methods_are_level_within_the_t_interval_of_the_paired_difference():
    def words(gap, *spread):
        ours = [0.5 + gap + x for x in spread]
        return in_words([score("distilled", "soft", *ours), score("random_real", "soft", *[0.5] * len(ours))])

    # The differences have a standard error of 0.01, and the quantiles of Student's t are 12.71, 4.30 and 2.78.
    for half, spread in (
        (0.1271, (-0.01, 0.01)),
        (0.0430, (-0.017321, 0, 0.017321)),
        (0.0278, (-0.02, -0.02, 0, 0.02, 0.02)),
    ):
        spread = [x * 0.01 / (statistics.stdev(spread) / math.sqrt(len(spread))) for x in spread]
        assert "are level" in words(half - 0.0002, *spread)
        assert "the distilled images win" in words(half + 0.0002, *spread)
        assert f"(95 % interval ± {100 * half:.1f})" in words(half + 0.0002, *spread)


def test_the_difference_is_paired_over_the_seeds_that_both_rows_have():
    a = score_row("a", "soft", [0, 1, 2], [0.9, 0.5, 0.7], 10)
    b = score_row("b", "soft", [2, 0, 7], [0.6, 0.8, 0.1], 10)
    gap, half = difference(a, b)
    assert gap == pytest.approx(0.1)  # seeds 0 and 2, 0.1 each, however far apart the seeds are
    assert half == pytest.approx(0, abs=1e-9)
    gap, half = difference(a, score_row("b", "soft", [3], [0.5], 10))
    assert (gap, half) == (pytest.approx(0.2), math.inf)


def test_sets_of_teachers_are_the_sample_and_their_seeds_are_averaged():
    sets = [0, 0, 1, 1, 2, 2]
    ours = score_row("a", "soft", [0, 1, 0, 1, 0, 1], [0.5, 0.7, 0.6, 0.6, 0.8, 0.6], 10, sets)
    control = score_row("b", "soft", [0, 1, 0, 1, 0, 1], [0.5] * 6, 10, sets)
    assert (ours["mean"], ours["teacher_seeds"]) == (pytest.approx(0.6333333), sets)
    assert ours["std"] == pytest.approx(statistics.stdev([0.6, 0.6, 0.7]))
    gap, half = difference(ours, control)
    assert gap == pytest.approx(0.1333333)
    assert half == pytest.approx(4.3027 * statistics.stdev([0.1, 0.1, 0.2]) / math.sqrt(3), rel=1e-4)
    alone = score_row("a", "soft", [0, 1], [0.5, 0.7], 10, [0, 0])
    assert alone["std"] is None
    assert difference(alone, score_row("b", "soft", [0, 1], [0.4, 0.4], 10, [0, 0]))[1] == math.inf, "one set of teachers"


def test_missing_control_is_reported():
    text = in_words([score("distilled", "soft", 0.5, 0.6), score("full", "hard", 0.9)])
    assert text == "There is no random-real control to compare with."
    assert in_words([score("random_real", "soft", 0.5)]) == ""


def test_one_seed_gives_no_verdict():
    text = in_words([score("distilled", "soft", 0.9), score("random_real", "soft", 0.1)])
    assert text == "With soft labels distilled minus random real is +80.0 points. One seed is not enough for a verdict."
    rows = [score(images, labels, 0.5) for images in ("distilled", "random_real") for labels in ("soft", "image", "hard")]
    assert in_words(rows).count("One seed is not enough for a verdict.") == 1
    assert in_words(rows).count("+0.0 points.") == 3


def test_a_table_of_single_seeds_does_not_remark_on_each_row():
    alone, three = score("distilled", "soft", 0.5), score("random_real", "soft", 0.5, 0.5, 0.5)
    made = {"rows": [alone, alone | {"images": "random_real"}], "sets": {}}
    assert [line[3] for line in table_rows(made)[1:]] == ["50.0", "50.0"]
    assert [line[3] for line in table_rows(made | {"rows": [alone, three]})[1:]] == ["50.0 (one seed)", "50.0 ± 0.0"]


def test_verdict_is_the_same_after_json():
    made = [score("distilled", "soft", 0.9, 0.92), score("random_real", "soft", 0.8, 0.8)]
    assert in_words(json.loads(json.dumps(made))) == in_words(made)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_345, "12.3 kB"),
        (5_000_000, "5 MB"),
        (7_250_000_000, "7.25 GB"),
        (None, "-"),
        pytest.param(999_900, "1 MB"),
        pytest.param(1_500_000_000_000, "1.5 TB"),
    ],
)
def test_bytes_are_formatted_for_people(count, text):
    assert bytes_text(count) == text


def test_table_shows_known_values_and_dashes(evaluation):
    assert table_rows(evaluation)[1:] == [
        ("distilled", "30", "soft", "91.0 ± 1.4", "12.3 kB", "678 B", "0.250", "50.0"),
        ("random real", "30", "soft", "81.0 ± 1.4", "99 B", "1 MB", "-", "-"),
        ("all real", "30", "hard", "99.0 (one seed)", "-", "-", "-", "-"),
    ]


def test_hard_labels_have_no_label_bytes(evaluation):
    report = evaluation | {"rows": [score("distilled", "hard", 0.9)]}
    assert table_rows(report)[1][5] == "-"


def test_markdown_table():
    assert markdown_table([("a", "b"), ("1", "22")]) == "| a | b |\n| --- | --- |\n| 1 | 22 |"


def test_plain_table_is_aligned():
    assert plain_table([("a", "bb", "c"), ("111", "2", "3")]) == "a    bb  c\n111  2   3"


def test_report_is_plain_json(evaluation):
    report = evaluation
    assert json.loads(json.dumps(report)) == report
    assert report["sets"]["distilled"]["intra_class_similarity"] == {"mean": 0.25, "per_class": [0.25, None]}
    assert report["left_out"] == {"full-soft": "no teachers"}
    assert report["in_words"].startswith("With soft labels the distilled images win")


def test_summary_shows_table_words_gaps_and_times(evaluation):
    report = {"recipe": "tiny", "evaluation": evaluation, "wall_time_s": {"relabel": 3.4}}
    text = summary(report)
    assert text.startswith("tiny: student test_resnet, 2 seeds, 4 epochs (last), 50 test images\n")
    assert plain_table(table_rows(report["evaluation"])) in text
    assert "With soft labels the distilled images win" in text
    assert "left out: full-soft: no teachers" in text
    assert text.endswith("time: relabel 3 s")


def test_summary_without_rows_or_times():
    empty = evaluation_facts(rows=(), sets={}, student="s", epochs=1, test_count=2)
    assert "r: no students" in summary({"recipe": "r", "evaluation": empty})


# -- numbers that mean little -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top1", "classes", "count", "little"),
    [
        (0.10, 10, 10_000, True), (0.18, 10, 10_000, True), (0.20, 10, 10_000, False),
        (0.5, 2, 10_000, True), (0.56, 2, 10_000, False), (0.56, 2, 12, True),  # 12 images: chance may give 0.9
        (1.0, 2, 4, False), (0.001, 1000, 50_000, True), (0.11, 1000, 50_000, False),
    ],
)  # fmt: skip
def test_a_score_near_chance_is_known(top1, classes, count, little):
    assert knows_little(top1, classes, count) is little


def test_all_real_images_are_a_reference_only_above_the_others():
    rows = [{"images": "distilled", "mean": 0.6}, {"images": "random_real", "mean": 0.5}]
    assert [full_is_best([*rows, {"images": "full", "mean": mean}]) for mean in (0.5, 0.6, 0.7)] == [False, False, True]
    assert not full_is_best(rows)


def test_weak_networks_and_an_under_trained_ceiling_are_remarked_on():
    rows = [{"images": "distilled", "mean": 0.6}, {"images": "random_real", "mean": 0.5}, {"images": "full", "mean": 0.55}]
    top1 = {"squeeze:a": 0.1, "squeeze:b": 0.9, "squeeze:v": 0.12}
    first, second, third = remarks_on(top1, "squeeze:v", rows, classes=10, count=1000)
    assert first == "squeeze:a has 10.0 % top-1 and chance is 10.0 %, so what it teaches means little."
    assert second == "squeeze:v has 12.0 % top-1 and chance is 10.0 %, so the column `verifier %` means little."
    assert third.startswith("The student on all real images is under-trained")
    assert remarks_on({"squeeze:b": 0.9}, None, [*rows[:2], {"images": "full", "mean": 0.7}], classes=10, count=1000) == []
