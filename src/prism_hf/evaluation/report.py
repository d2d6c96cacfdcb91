"""Reports of an evaluation: report.json for programs; the results table and a summary in words for people."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

from ..runtime import count_text, size_text
from .dd_scores import dd_ranking_of, dd_ranking_text

CONTROL_ITSELF = "These are random real images: the control that a distilled set is compared with."
NO_CONTROL = "the dataset itself consists of random real images"
NOT_ALL = "only a part of the training images is read (data.images_per_class)"
LABELS = {"distilled": "distilled", "random_real": "random real", "full": "all real"}
_VERDICTS = {
    "level": "the distilled images and random real images are level",
    "wins": "the distilled images win",
    "loses": "random real images win",
}


KNOWS_LITTLE = 0.1
"""A network knows little if it covers less than this share of the way from chance to a perfect score."""


def knows_little(top1: float, classes: int, count: int) -> bool:
    """Return whether a top-1 accuracy, in [0, 1], is near chance: by `KNOWS_LITTLE`, or within three standard errors of it.

    `count` is the number of test images.
    """
    chance = 1 / classes
    error = math.sqrt(chance * (1 - chance) / max(count, 1))
    return top1 < min(chance + max(KNOWS_LITTLE * (1 - chance), 3 * error), 1)


def full_is_best(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the table has students on all real images, and they score above all others."""
    full = [row["mean"] for row in rows if row["images"] == "full"]
    return bool(full) and all(min(full) > row["mean"] for row in rows if row["images"] != "full")


def remarks_on(
    top1: Mapping[str, float], verifier: str | None, rows: Sequence[Mapping[str, Any]], *, classes: int, count: int
) -> list[str]:
    """Return a sentence on each number of a table that means little: weak teachers, a weak verifier, a weak ceiling.

    `top1` has the test accuracy of each squeezed network, in [0, 1], and `count` the number of test images.
    """
    remarks = []
    for name, score in top1.items():
        if knows_little(score, classes, count):
            little = "the column `verifier %` means" if name == verifier else "what it teaches means"
            remarks.append(f"{name} has {100 * score:.1f} % top-1 and chance is {100 / classes:.1f} %, so {little} little.")
    if any(row["images"] == "full" for row in rows) and not full_is_best(rows):
        remarks.append(
            "The student on all real images is under-trained, so its score is not an upper reference; raise "
            "evaluation.full_data_epochs."
        )
    return remarks


def score_row(
    images: str,
    labels: str,
    seeds: Sequence[int],
    top1: Sequence[float],
    count: int,
    teacher_seeds: Sequence[int] = (),
) -> dict[str, Any]:
    """Return a row of the table: the test top-1, in [0, 1], after the last epoch, of one student per seed.

    `images` and `labels` are as in `Row`; `count` is the number of training images. With `teacher_seeds`, one per student,
    the standard deviation `std` is that of the means of the sets of teachers.
    """
    row = {"images": images, "labels": labels, "count": count, "seeds": list(seeds), "top1": list(top1)}
    if teacher_seeds:
        row["teacher_seeds"] = list(teacher_seeds)
    means = _averaged({key: score for key, score in zip(_draws(row), top1, strict=True)})
    return row | {"mean": statistics.fmean(means), "std": statistics.stdev(means) if len(means) > 1 else None}


def _draws(row: Mapping[str, Any]) -> list[tuple[int | None, int]]:
    """Return the seed of the teachers (`None` if there is one set of them) and the seed of each score of a row."""
    return list(zip(row.get("teacher_seeds") or [None] * len(row["seeds"]), row["seeds"], strict=True))


def _averaged(values: Mapping[tuple[int | None, int], float]) -> list[float]:
    """Return the mean of each set of teachers; without several sets, the value of each seed."""
    groups: dict[object, list[float]] = {}
    for (teachers, seed), value in values.items():
        groups.setdefault(seed if teachers is None else ("teachers", teachers), []).append(value)
    return [statistics.fmean(group) for group in groups.values()]


def evaluation_facts(
    rows: Sequence[Mapping[str, Any]],
    sets: Mapping[str, Mapping[str, Any]],
    *,
    student: str,
    epochs: int,
    test_count: int,
    tested_on: str = "test images",
    left_out: Mapping[str, str] | None = None,
    verifier: str | None = None,
    similarity_network: str | None = None,
    names: Mapping[str, str] | None = None,
    remarks: Sequence[str] = (),
) -> dict[str, Any]:
    """Return `evaluation` of report.json from `score_row`s and the `set_facts` of `distilled`, `random_real` and `full`.

    `left_out` gives the reason for each missing row. `names` overrides the names of sets in tables (default: `LABELS`).
    `remarks` are sentences for the end of the summary.
    """
    return {
        "student": student,
        "epochs": epochs,
        "test_count": test_count,
        "tested_on": tested_on,
        "protocol": "last epoch; the same views, batches and steps for all distilled and random real rows",
        "rows": list(rows),
        "sets": dict(sets),
        "left_out": dict(left_out or {}),
        "dd_ranking": dd_ranking_of(rows)._asdict(),
        "verifier": verifier,
        "similarity_network": similarity_network,
        "in_words": " ".join([CONTROL_ITSELF if names else in_words(rows), *remarks]),
    } | ({"names": dict(names)} if names else {})


def in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return sentences on whether the distilled images beat random real ones, with the interval of the difference."""
    by_key = {(row["images"], row["labels"]): row for row in rows}
    if not rows:
        return "No student was scored."
    sentences, unsure = [], False
    for labels in ("soft", "image", "hard"):
        distilled, control = by_key.get(("distilled", labels)), by_key.get(("random_real", labels))
        if distilled and control:
            gap, half = difference(distilled, control)
            outcome, points = verdict(gap, half), f"distilled minus random real is {100 * gap:+.1f} points"
            clause, unsure = points, unsure or outcome is None
            if outcome is not None:
                clause = f"{_VERDICTS[outcome]}: {points} (95 % interval ± {100 * half:.1f})"
            sentences.append(f"With {labels} labels {clause}.")
    if not any(images == "random_real" for images, _ in by_key):
        sentences.append("There is no random-real control to compare with.")
    if unsure:
        sentences.append("One seed is not enough for a verdict.")
    return " ".join(sentences)


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float]:
    """Return the mean top-1 of row `a` minus that of row `b`, and half the width of its 95 % interval.

    The interval is Student's t for paired differences: of the seeds that both rows have, or, if the rows name the seeds of
    their teachers, of the sets of teachers, with the seeds of each set averaged. It is infinite if there is only one pair.
    """
    ours, theirs = (dict(zip(_draws(row), row["top1"], strict=True)) for row in (a, b))
    pairs = {key: ours[key] - theirs[key] for key in ours if key in theirs}
    if not pairs:
        return a["mean"] - b["mean"], math.inf
    gaps = _averaged(pairs)
    if len(gaps) == 1:
        return gaps[0], math.inf
    half = float(stdtrit(len(gaps) - 1, 0.975)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.fmean(gaps), half


def verdict(gap: float, half: float) -> str | None:
    """Return `wins`, `loses`, or `level` (within the interval); `None` if the interval is not finite (one seed)."""
    if not math.isfinite(half):
        return None
    if abs(gap) <= half:
        return "level"
    return "wins" if gap > 0 else "loses"


def top1_text(row: Mapping[str, Any], *, remark: bool = True) -> str:
    """Format the mean and standard deviation of a row in percent: `97.1 ± 0.3`, or `97.1 (one seed)` with a `remark`."""
    alone = " (one seed)" if remark else ""
    return f"{100 * row['mean']:.1f}" + (alone if row["std"] is None else f" ± {100 * row['std']:.1f}")


def bytes_text(count: float | None) -> str:
    """Format a number of bytes: `12.3 kB`."""
    return "-" if count is None else size_text(count)


def percent_text(share: float | None) -> str:
    """Format a fraction in [0, 1] in percent: `97.1`."""
    return "-" if share is None else f"{100 * share:.1f}"


def cosine_text(similarity: float | None) -> str:
    """Format a cosine similarity: `0.512`."""
    return "-" if similarity is None else f"{similarity:.3f}"


def table_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of a report's `evaluation`, header first."""
    header = ("images", "count", "labels", "top-1 %", "image bytes", "label bytes", "intra-class cos", "verifier %")
    names = LABELS | evaluation.get("names", {})
    lines: list[tuple[str, ...]] = [header]
    spread = any(row["std"] is not None for row in evaluation["rows"])  # else the text around the table says "1 seed"
    scored = evaluation["rows"]
    for row in scored or [{"images": name, "labels": "-"} for name in evaluation["sets"]]:
        facts = evaluation["sets"].get(row["images"], {})
        similarity = facts.get("intra_class_similarity") or {}
        lines.append(
            (
                names[row["images"]],
                str(row["count"]) if scored else str(facts["count"]),
                row["labels"],
                top1_text(row, remark=spread) if scored else "-",
                bytes_text(facts.get("image_bytes")),
                bytes_text(facts.get("label_bytes")) if row["labels"] == "soft" or not scored else "-",
                cosine_text(similarity.get("mean")),
                percent_text(facts.get("verifier_top1")),
            )
        )
    return lines


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Format rows, header first, as a Markdown table."""
    head, *body = lines
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def plain_table(lines: Sequence[Sequence[str]]) -> str:
    """Format rows, header first, in aligned columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def summary(report: Mapping[str, Any]) -> str:
    """Return the results for a terminal: table, summary in words, and times."""
    evaluation = report["evaluation"]
    seeds = evaluation["rows"][0]["seeds"] if evaluation["rows"] else []
    protocol = (
        f"student {evaluation['student']}, {count_text(len(seeds), 'seed')}, "
        f"{count_text(evaluation['epochs'], 'epoch')} (last), "
        f"{evaluation['test_count']} {evaluation.get('tested_on', 'test images')}"
    )
    parts = [
        f"{report['recipe']}: {protocol if seeds else 'no students'}",
        plain_table(table_rows(evaluation)),
        evaluation["in_words"],
    ]
    if scores := dd_ranking_text(dd_ranking_of(evaluation["rows"])):
        parts.append(f"DD-Ranking: {scores}")
    parts += [f"left out: {name}: {reason}" for name, reason in evaluation["left_out"].items()]
    if times := report.get("wall_time_s"):
        parts.append("time: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in times.items()))
    return "\n".join(part for part in parts if part)
