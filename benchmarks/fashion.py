"""Tables of docs/comparison.md, rendered from the JSON of benchmarks/tables.py."""

from collections.abc import Sequence
from typing import Any

from prism_hf.evaluation.report import bytes_text, cosine_text, difference, markdown_table, top1_text, verdict

NOT_YET = "*not yet run*"
SIGNS = {"wins": "**above**", "level": "level", "loses": "*below*"}


def score_of(result: dict[str, Any], method: str, labels: str, student: str | None = None) -> dict[str, Any] | None:
    """Return the score of a method, for the first student unless another is named; `None` if it was not run."""
    student = student or result["scores"][0]["student"]
    key = (method, labels, student)
    return next((s for s in result["scores"] if (s["method"], s["labels"], s["student"]) == key), None)


def gap_text(a: dict[str, Any] | None, b: dict[str, Any] | None) -> str:
    """Format a difference, half the width of its 95 % interval and the verdict: `+1.2 ± 0.4 **above**`."""
    if a is None or b is None:
        return "-"
    gap, half = difference(a, b)
    outcome = verdict(gap, half)
    if outcome is None:
        return f"{100 * gap:+.1f} (one seed)"
    return f"{100 * gap:+.1f} ± {100 * half:.1f} {SIGNS[outcome]}"


def cell(row: dict[str, Any] | None) -> str:
    """Format the mean and standard deviation of a row, or `NOT_YET` if it was not run."""
    return NOT_YET if row is None else top1_text(row)


def _numbered(noun: str, numbers: Sequence[int]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def provenance(result: dict[str, Any]) -> str:
    """Return a line with the command, seeds, student, test images and machine of a result."""
    hardware, data = result["hardware"], result["data"]
    seeds = _numbered("seed", result["protocol"]["seeds"])
    student = result["scores"][0]["student"]
    processes = "1 process" if hardware["processes"] == 1 else f"{hardware['processes']} processes"
    if sets := result["protocol"].get("teacher_seeds"):
        seeds += f" with teachers of {_numbered('seed', sets)}"
    return (
        f"`{result['command']}`: {seeds} (for both synthesis and student), student {student}, last epoch, "
        f"{data['test_count']:,} {data.get('tested_on', 'test images')}; {hardware['cpu']}, {hardware['cores']} cores, "
        f"{processes}."
    )


def methods_table(result: dict[str, Any]) -> str:
    """Return table 1 at one number of images per class."""
    control = next(method["label"] for method in result["methods"] if method["control"])
    head = (
        "method", "soft", "hard", "soft - random", "hard - random", "intra-class cos", "verifier %", "s / image",
        "images", "labels",
    )  # fmt: skip
    rows: list[Sequence[str]] = [head]
    for method in result["methods"]:
        soft, hard = (score_of(result, method["label"], labels) for labels in ("soft", "hard"))
        gaps = [
            "-" if method["control"] else gap_text(row, score_of(result, control, labels))
            for row, labels in ((soft, "soft"), (hard, "hard"))
        ]
        rows.append(
            (
                method["label"],
                cell(soft),
                cell(hard),
                *gaps,
                cosine_text(method["similarity"]["mean"]),
                f"{100 * method['verifier_top1']:.0f}",
                "-" if method["control"] else f"{method['seconds_per_image']:.2f}",
                bytes_text(method["image_bytes"]),
                bytes_text(method["label_bytes"]),
            )
        )
    first = result["scores"][0]["student"]
    for full in result["full_data"]:
        if full["student"] == first:
            reference = cosine_text(result["real"]["similarity"]["mean"])
            rows.append(("all 60,000 real", "-", top1_text(full), "-", "-", reference, *["-"] * 4))
    return f"{markdown_table(rows)}\n\n{provenance(result)}"


def against_first(result: dict[str, Any]) -> str:
    """Return table 2 or 3, which compares every row with the first method; each row changes one thing."""
    methods = [method["label"] for method in result["methods"]]
    first = next(method["label"] for method in result["methods"] if not method["control"])
    rows: list[Sequence[str]] = [
        ("", "soft", "hard", f"soft - {first}", f"hard - {first}", "intra-class cos", "verifier %")
    ]
    for label in sorted(methods, key=lambda label: label != first):
        scores = {labels: score_of(result, label, labels) for labels in ("soft", "hard")}
        gaps = ["-" if label == first else gap_text(scores[labels], score_of(result, first, labels)) for labels in scores]
        facts = next(method for method in result["methods"] if method["label"] == label)
        rows.append(
            (
                label,
                *map(cell, scores.values()),
                *gaps,
                cosine_text(facts["similarity"]["mean"]),
                f"{100 * facts['verifier_top1']:.0f}",
            )
        )
    return f"{markdown_table(rows)}\n\n{provenance(result)}"


def students_table(result: dict[str, Any]) -> str:
    """Return table 4: scores with soft labels, one column per student."""
    students = list(dict.fromkeys(score["student"] for score in result["scores"]))
    rows: list[Sequence[str]] = [("method, soft labels", *students)]
    for method in result["methods"]:
        rows.append((method["label"], *(cell(score_of(result, method["label"], "soft", name)) for name in students)))
    full = {row["student"]: row for row in result["full_data"]}
    rows.append(
        ("all 60,000 real, hard labels", *(top1_text(full[name]) if name in full else NOT_YET for name in students))
    )
    return f"{markdown_table(rows)}\n\n{provenance(result)}"


def labels_table(result: dict[str, Any]) -> str:
    """Return table 5: scores by the size of the labels."""
    methods = [method["label"] for method in result["methods"]]
    kinds = list(dict.fromkeys(score["labels"] for score in result["scores"]))
    names = {
        "hard": "class only",
        "image": "one label per image",
        "soft": f"views of {result['protocol']['relabel']['epochs']} epochs",
    }
    order = sorted(kinds, key=lambda kind: (score_of(result, methods[0], kind) or {})["label_bytes"] or 0)
    rows: list[Sequence[str]] = [("labels", "bytes", *methods, *(f"{label} - {methods[0]}" for label in methods[1:]))]
    for kind in order:
        scores = [score_of(result, label, kind) for label in methods]
        size = scores[0]["label_bytes"] if scores[0] else None
        name = names.get(kind) or f"views of {kind.removeprefix('soft-')} epochs, repeated"
        rows.append(
            (
                name,
                bytes_text(size or 0),
                *map(cell, scores),
                *(gap_text(row, scores[0]) for row in scores[1:]),
            )
        )
    epochs = result["protocol"]["evaluation"]["epochs"]
    return f"{markdown_table(rows)}\n\nEvery student trains for {epochs} epochs. {provenance(result)}"


def sets_table(result: dict[str, Any]) -> str:
    """Return a table over sets of teachers: scores, and differences to random real images and to published PRISM."""
    labels = [method["label"] for method in result["methods"]]
    control = next(method["label"] for method in result["methods"] if method["control"])
    prism = next((label for label in labels if label in ("PRISM per slot", "PRISM")), control)
    head = ("method", "soft", "hard", "soft - random", "hard - random", "soft - PRISM", "hard - PRISM")
    rows: list[Sequence[str]] = [head]
    for label in labels:
        scores = [score_of(result, label, kind) for kind in ("soft", "hard")]
        gaps = [
            "-" if label in (other, control) else gap_text(score, score_of(result, other, kind))
            for other in (control, prism)
            for score, kind in zip(scores, ("soft", "hard"), strict=True)
        ]
        rows.append((label, *map(cell, scores), *gaps))
    return f"{markdown_table(rows)}\n\n{provenance(result)}"


def convergence_table(result: dict[str, Any]) -> str:
    """Return the scores for several lengths of training."""
    rows: list[Sequence[str]] = [("images, epochs of students, epochs of views", "soft", "hard")]
    for method in result["methods"]:
        scores = [score_of(result, method["label"], kind) for kind in ("soft", "hard")]
        rows.append((method["label"], *("-" if s is None else f"{100 * s['mean']:.1f}" for s in scores)))
    return f"{markdown_table(rows)}\n\n{provenance(result)}"


FEW = ("random real", "PRISM from easy images", "its start images, not optimized", "PRISM per slot")
"""Methods in the README table."""
SHORT = {"fashion-final-ipc10": "Fashion-MNIST", "openclipart-final-64-ipc10": "clip art"}


def few_table(recorded: dict[str, dict[str, Any]], methods: Sequence[str] = FEW) -> str:
    """Return the table for the README: a few methods on both datasets."""
    results = {title: recorded[name] for name, title in SHORT.items() if name in recorded}
    if not results:
        return NOT_YET
    kinds = [(title, labels) for title in results for labels in ("soft", "hard")]
    rows: list[Sequence[str]] = [("ten images per class", *(f"{title}, {labels}" for title, labels in kinds))]
    rows += [(name, *(cell(score_of(results[title], name, labels)) for title, labels in kinds)) for name in methods]
    return markdown_table(rows)


SECTIONS = {
    "fashion-final-ipc10": sets_table,
    "openclipart-final-64-ipc10": sets_table,
    "fashion-tune-ipc10": sets_table,
    "openclipart-tune-64-ipc10": sets_table,
    "fashion-convergence-ipc1": convergence_table,
    "fashion-convergence-ipc10": convergence_table,
    "fashion-convergence-ipc50": convergence_table,
    "openclipart-convergence-64-ipc10": convergence_table,
    "fashion-methods-ipc1": methods_table,
    "fashion-methods-ipc10": methods_table,
    "fashion-methods-ipc50": methods_table,
    "fashion-fresh-seeds": methods_table,
    "fashion-other-teachers": methods_table,
    "fashion-other-teachers-ipc1": methods_table,
    "fashion-decoupling": against_first,
    "fashion-decoupling-noise": against_first,
    "fashion-switches": against_first,
    "fashion-iterations": against_first,
    "fashion-held-out": against_first,
    "fashion-students": students_table,
    "fashion-labels": labels_table,
}
SOURCES = {"fashion-students": "fashion-methods-ipc10"}
"""Result that a section is rendered from, if its name differs."""
