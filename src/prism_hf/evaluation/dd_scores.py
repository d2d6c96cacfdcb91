"""Scores of DD-Ranking (arXiv 2505.13300), which separate what the images hold from what their labels add."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

WEIGHT = 0.5
"""Weight of IOR in LRS; HLR has the rest."""


class DDRanking(NamedTuple):
    """The scores of one method, from accuracies as fractions in [0, 1]; `None` where a row is missing.

    Attributes:
        hlr: Hard label recovery, what is lost against all real images with hard labels; lower is better.
        ior: Improvement over random, what is gained over random real images with soft labels; higher is better.
        lrs: Label robust score of both, in [0, 1]; higher is better.
    """

    hlr: float | None
    ior: float | None
    lrs: float | None


def dd_ranking(*, full_hard: float | None, hard: float | None, soft: float | None, random_soft: float | None) -> DDRanking:
    """Return the scores of DD-Ranking from top-1 accuracies in [0, 1].

    HLR = full_hard - hard, IOR = soft - random_soft, and LRS = (e^a - e^-1) / (e - e^-1) with a = w IOR - (1 - w) HLR and
    w = 1/2. The published package computes them from percentages, so its LRS differs.
    """
    hlr = None if full_hard is None or hard is None else full_hard - hard
    ior = None if soft is None or random_soft is None else soft - random_soft
    if hlr is None or ior is None:
        return DDRanking(hlr, ior, None)
    exponent = WEIGHT * ior - (1 - WEIGHT) * hlr
    return DDRanking(hlr, ior, (math.exp(exponent) - math.exp(-1)) / (math.e - math.exp(-1)))


def dd_ranking_of(rows: Sequence[Mapping[str, Any]]) -> DDRanking:
    """Return the scores of the distilled images from the rows of a table."""
    mean = {(row["images"], row["labels"]): float(row["mean"]) for row in rows}
    return dd_ranking(
        full_hard=mean.get(("full", "hard")),
        hard=mean.get(("distilled", "hard")),
        soft=mean.get(("distilled", "soft")),
        random_soft=mean.get(("random_real", "soft")),
    )


def dd_ranking_text(scores: DDRanking) -> str:
    """Return the scores as text for tables and cards, `HLR 0.400, IOR +0.050, LRS 0.199`; empty if all are missing."""
    forms = {"HLR": (scores.hlr, ".3f"), "IOR": (scores.ior, "+.3f"), "LRS": (scores.lrs, ".3f")}
    return ", ".join(f"{name} {value:{form}}" for name, (value, form) in forms.items() if value is not None)
