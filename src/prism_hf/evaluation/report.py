"""Report of an evaluation: for machines (report.json) and for people (the table and plain sentences)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..runtime import size_text
from .diversity import Diversity

CONTROL_ITSELF = "These are random real images: what a distilled set is to be compared with."
NO_CONTROL = "the data set itself is random real images"
LABELS = {"distilled": "distilled", "random_real": "random real", "full": "all real"}
_VERDICTS = {
    "level": "the distilled images and random real images are level",
    "wins": "the distilled images win",
    "loses": "random real images win",
}


@dataclass(frozen=True)
class Score:
    """Top-1 of one row of the table on the test part, last epoch.

    Attributes:
        images: `distilled`, `random_real` or `full`.
        labels: `soft`, `hard` or `image`.
        seeds: One student each.
        top1: In [0, 1], one per seed.
        count: Training images.
    """

    images: str
    labels: str
    seeds: tuple[int, ...]
    top1: tuple[float, ...]
    count: int

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; `None` for a single seed."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None

    def as_dict(self) -> dict[str, object]:
        """For report.json."""
        return {
            "images": self.images,
            "labels": self.labels,
            "count": self.count,
            "seeds": list(self.seeds),
            "top1": list(self.top1),
            "mean": self.mean,
            "std": self.std,
        }


@dataclass(frozen=True)
class SetFacts:
    """What is known of one set of images beside its scores.

    Attributes:
        image_bytes: Bytes of the encoded images; `None` for the source.
        label_bytes: Bytes of all labels and views as stored.
        verifier_top1: Share that the held-out verifier puts in its class.
        diversity: Intra-class similarity.
    """

    image_bytes: int | None
    label_bytes: int | None
    verifier_top1: float | None
    diversity: Diversity

    def as_dict(self) -> dict[str, object]:
        """For report.json."""
        return {
            "image_bytes": self.image_bytes,
            "label_bytes": self.label_bytes,
            "verifier_top1": self.verifier_top1,
            "intra_class_similarity": {"mean": self.diversity.mean, "per_class": list(self.diversity.per_class)},
        }


@dataclass(frozen=True)
class Evaluation:
    """Everything that the evaluate stage found.

    Attributes:
        scores: Rows of the table.
        sets: Facts by set: `distilled`, `random_real`, `full`.
        left_out: Rows that could not be had, with the reason.
        names: What sets are called in tables, where not as in `LABELS`.
        student: Architecture.
        epochs: Epochs of views per student.
        similarity_network: Whose features measured similarity, or `None`.
        verifier: Name of the verifier, or `None`.
        test_count: Test images.
        tested_on: What they are.
    """

    scores: tuple[Score, ...]
    sets: Mapping[str, SetFacts]
    student: str
    epochs: int
    test_count: int
    verifier: str | None = None
    similarity_network: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    tested_on: str = "test images"

    def name_of(self, images: str) -> str:
        """What a set is called in tables."""
        return self.names.get(images, LABELS[images])

    def of_random_images(self) -> Evaluation:
        """The same, where the data set is random real images: method `random`."""
        return replace(self, names={"distilled": LABELS["random_real"]})

    def as_dict(self) -> dict[str, object]:
        """For report.json."""
        return {
            "student": self.student,
            "epochs": self.epochs,
            "test_count": self.test_count,
            "tested_on": self.tested_on,
            "protocol": "last epoch; the same views, batches and steps for all distilled and random real rows",
            "rows": [score.as_dict() for score in self.scores],
            "sets": {name: facts.as_dict() for name, facts in self.sets.items()},
            "left_out": dict(self.left_out),
            "verifier": self.verifier,
            "similarity_network": self.similarity_network,
            "in_words": CONTROL_ITSELF if self.names else in_words([score.as_dict() for score in self.scores]),
        } | ({"names": dict(self.names)} if self.names else {})


def in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the distilled images beat random real ones, with the standard error of the difference.

    Args:
        rows: `Score.as_dict` of each score.
    """
    by_key = {(row["images"], row["labels"]): row for row in rows}
    sentences = [
        _sentence(labels, by_key["distilled", labels], by_key.get(("random_real", labels)))
        for labels in ("soft", "image", "hard")
        if ("distilled", labels) in by_key
    ]
    return " ".join(sentences)


def _sentence(labels: str, distilled: Mapping[str, Any], control: Mapping[str, Any] | None) -> str:
    if control is None:
        return f"With {labels} labels there is no random-real control to compare with."
    gap, error = difference(distilled, control)
    outcome = verdict(gap, error)
    points = f"distilled minus random real is {100 * gap:+.1f} points"
    if outcome is None:
        return f"With {labels} labels {points}; one seed allows no verdict."
    return f"With {labels} labels {_VERDICTS[outcome]}: {points} (standard error {100 * error:.1f})."


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float]:
    """Mean top-1 of row `a` minus that of row `b`, and its standard error; infinite if a row has a single seed."""
    variances = [math.inf if row["std"] is None else row["std"] ** 2 / len(row["top1"]) for row in (a, b)]
    return a["mean"] - b["mean"], math.sqrt(sum(variances))


def verdict(gap: float, error: float) -> str | None:
    """`wins`, `loses`, or `level` within two standard errors; `None` if the error is not finite: one seed tells nothing."""
    if not math.isfinite(error):
        return None
    if abs(gap) <= 2 * error:
        return "level"
    return "wins" if gap > 0 else "loses"


# -- numbers for people; a dash where one is not known ----------------------------------------------------------------


def top1_text(row: Mapping[str, Any]) -> str:
    """`97.1 ± 0.3`: mean and standard deviation of a row, in percent."""
    return f"{100 * row['mean']:.1f}" + (" (one seed)" if row["std"] is None else f" ± {100 * row['std']:.1f}")


def bytes_text(count: float | None) -> str:
    """`12.3 kB`."""
    return "-" if count is None else size_text(count)


def percent_text(share: float | None) -> str:
    """`97.1`, of a share in [0, 1]."""
    return "-" if share is None else f"{100 * share:.1f}"


def cosine_text(similarity: float | None) -> str:
    """`0.512`."""
    return "-" if similarity is None else f"{similarity:.3f}"


# -- the table --------------------------------------------------------------------------------------------------------


def table_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of a report's `evaluation`, header first: images, how many, labels, top-1, bytes, similarity, verifier."""
    header = ("images", "count", "labels", "top-1 %", "image bytes", "label bytes", "intra-class cos", "verifier %")
    names = LABELS | evaluation.get("names", {})
    lines: list[tuple[str, ...]] = [header]
    for row in evaluation["rows"]:
        facts = evaluation["sets"].get(row["images"], {})
        similarity = facts.get("intra_class_similarity") or {}
        lines.append(
            (
                names[row["images"]],
                str(row["count"]),
                row["labels"],
                top1_text(row),
                bytes_text(facts.get("image_bytes")),
                bytes_text(facts.get("label_bytes")) if row["labels"] == "soft" else "-",
                cosine_text(similarity.get("mean")),
                percent_text(facts.get("verifier_top1")),
            )
        )
    return lines


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Rows, header first, as a Markdown table."""
    head, *body = lines
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def plain_table(lines: Sequence[Sequence[str]]) -> str:
    """Rows, header first, in aligned columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def summary(report: Mapping[str, Any]) -> str:
    """The result table for a terminal, with times and plain sentences."""
    evaluation = report["evaluation"]
    seeds = evaluation["rows"][0]["seeds"] if evaluation["rows"] else []
    students = f"{len(seeds)} seed" + ("" if len(seeds) == 1 else "s")
    parts = [
        f"{report['recipe']}: student {evaluation['student']}, {students}, {evaluation['epochs']} epochs (last), "
        f"{evaluation['test_count']} {evaluation.get('tested_on', 'test images')}",
        plain_table(table_rows(evaluation)),
        evaluation["in_words"],
    ]
    parts += [f"left out: {name}: {reason}" for name, reason in evaluation["left_out"].items()]
    times = report.get("wall_time_s")
    if times:
        parts.append("time: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in times.items()))
    return "\n".join(part for part in parts if part)
