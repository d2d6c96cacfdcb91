import math

import pytest

from prism_hf.evaluation.dd_scores import dd_ranking, dd_ranking_of, dd_ranking_text
from prism_hf.evaluation.report import evaluation_facts, score_row, summary


def test_the_published_example_and_the_formula():
    scores = dd_ranking(full_hard=0.9, hard=0.5, soft=0.85, random_soft=0.8)
    assert (scores.hlr, scores.ior) == (pytest.approx(0.4), pytest.approx(0.05))
    assert scores.lrs == pytest.approx(0.20, abs=0.005)
    assert scores.lrs == pytest.approx((math.exp(0.5 * 0.05 - 0.5 * 0.4) - 1 / math.e) / (math.e - 1 / math.e))


@pytest.mark.parametrize(("ior", "hlr", "lrs"), [(1, -1, 1.0), (-1, 1, 0.0), (0, 0, 1 / (1 + math.e))])
def test_the_range_of_lrs(ior, hlr, lrs):
    assert dd_ranking(full_hard=hlr, hard=0.0, soft=ior, random_soft=0.0).lrs == pytest.approx(lrs)


def rows(*missing):
    kinds = {("distilled", "soft"): 0.85, ("distilled", "hard"): 0.5, ("random_real", "soft"): 0.8, ("full", "hard"): 0.9}
    return [score_row(*kind, [0, 1], [top1, top1], 10) for kind, top1 in kinds.items() if kind not in missing]


def test_what_cannot_be_computed_is_left_out():
    assert dd_ranking_text(dd_ranking_of(rows())) == "HLR 0.400, IOR +0.050, LRS 0.201"
    assert dd_ranking_text(dd_ranking_of(rows(("full", "hard")))) == "IOR +0.050"
    assert dd_ranking_text(dd_ranking_of(rows(("random_real", "soft")))) == "HLR 0.400"
    assert dd_ranking_text(dd_ranking_of([])) == ""


def test_a_report_has_and_prints_the_scores():
    facts = evaluation_facts(rows(), {}, student="test_resnet", epochs=3, test_count=10)
    assert facts["dd_ranking"] == dd_ranking_of(rows())._asdict()
    assert "DD-Ranking: HLR 0.400, IOR +0.050, LRS 0.201" in summary({"recipe": "x", "evaluation": facts})
