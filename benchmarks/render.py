"""Render cards/*.md, and the parts between markers in README.md and docs/*.md, from benchmarks/results/*.json.

`python benchmarks/render.py` writes the files; `--check` only compares them and exits with 1 if any file is stale.
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from statistics import median

import fashion

from prism_hf.evaluation.report import cosine_text, markdown_table, percent_text, plain_table, table_rows, top1_text
from prism_hf.hub.dataset_card import render_card
from prism_hf.recipe.yaml_file import load_recipe, parse_recipe

PAGES = (
    "imagenet",
    "labels",
    "scale",
    "method",
    "reproduction",
    "reliability",
    "comparison",
    "comparison_tables",
    "performance",
)
ROWS = ("distilled, soft", "random_real, soft", "distilled, hard", "random_real, hard")
ROOT = Path(__file__).resolve().parent.parent
MARKERS = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results() -> dict[str, dict]:
    """Return all results by label."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def rendered() -> dict[Path, str]:
    """Return the expected contents of every derived file."""
    recorded = results()
    files = {}
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        if path.parent.name == "accelerate":
            continue
        recipe = load_recipe(path)
        if recipe.name in recorded:
            facts = recorded[recipe.name]["card_facts"]
            files[ROOT / "cards" / f"{recipe.name}.md"] = render_card(facts, parse_recipe(facts["recipe"]))
    for name in ("README.md", *(f"docs/{page}.md" for page in PAGES)):
        text = (ROOT / name).read_text(encoding="utf-8")
        files[ROOT / name] = MARKERS.sub(lambda m: m[1] + wrapped(section(m["name"], recorded)) + m[3], text)
    return files


def wrapped(text: str) -> str:
    """Break the long lines of generated text, but not the rows of a table or what a terminal shows."""
    lines = [
        line if line.startswith("|") or "  " in line else textwrap.fill(line, 118, break_on_hyphens=False)
        for line in text.split("\n")
    ]
    return "\n".join(lines)


def section(name: str, recorded: dict[str, dict]) -> str:
    """Return one generated part of a document: the results of a run by its label, or `comparison` over all runs."""
    if name == "comparison":
        return markdown_table(comparison(recorded)) + "\n"
    if name == "fashion-few":
        return fashion.few_table(recorded) + "\n"
    if name == "digits-printed":
        return printed(recorded["digits-prism-ipc10"])
    if name in fashion.SECTIONS:
        source = fashion.SOURCES.get(name, name)
        return fashion.SECTIONS[name](recorded[source]) + "\n" if source in recorded else "*not yet run*\n"
    if name not in recorded:
        return "*not yet run*\n"
    result = recorded[name]
    if name in RELIABILITY:
        return f"{RELIABILITY[name](result)}\n\n`{result['command']}`\n"
    if name in WHOLE:
        return WHOLE[name](result)
    report = result["report"]
    times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report["wall_time_s"].items())
    hardware = result["hardware"]
    return (
        f"`{result['command']}`\n\n"
        f"{markdown_table(table_rows(report['evaluation']))}\n\n"
        f"{report['evaluation']['in_words']}\n\n"
        f"Time: {times}; {sum(report['wall_time_s'].values()):.0f} s in total ({hardware['cpu']}, "
        f"{hardware['cores']} cores, {hardware['processes']} process).\n"
    )


def printed(result: dict) -> str:
    """Return the time and the table of a run, as its command prints them."""
    report, hardware = result["report"], result["hardware"]
    minutes = sum(report["wall_time_s"].values()) / 60
    table = plain_table(table_rows(report["evaluation"]))
    return f"It takes about {minutes:.0f} minutes on {hardware['cores']} CPU cores and prints\n\n```text\n{table}\n```\n"


TITLES = {
    "resnet18": "ResNet-18, 224 px",
    "three": "ResNet-18, MobileNetV2, EfficientNet-B0, 224 px",
    "small20": "4 small networks, 32 px",
    "small100": "4 small networks, 32 px",
    "gvbsm": "G-VBSM in full, the three networks, 224 px",
    "gvbsm-small": "G-VBSM in full, the small networks, 32 px",
}
"""The cases of throughput.py."""


def gpu_steps(result: dict) -> str:
    """Return the speed and memory of steps on a GPU, for the published step, ours, and the floor."""
    rows = []
    for part in result["parts"].values():
        for label, case in part.get("cases", {}).items():
            if "variants" not in case:  # relabeling
                continue
            title = f"{TITLES[label.split(', ')[0]]}, batch {case['case']['batch']}"
            for variant, facts in case["variants"].items():
                speed, memory = f"{facts['image_iterations_per_s']:,.0f}", f"{facts['peak_bytes'] / 1e9:.1f} GB"
                rows.append((title, variant, speed, f"{facts['ratio_wall']:.2f}", memory))
    header = ("case", f"step ({result['device']})", "image-iterations / s", "speed / published", "peak memory")
    return f"{markdown_table([header, *rows])}\n\n`{result['command']}`. {result.get('note', '')}\n"


def teacher_pool(result: dict) -> str:
    """Return the networks that can be teachers."""
    rows = [
        (
            name,
            facts["license"],
            str(facts["bn_layers"]),
            str(facts["size"]),
            f"{facts['mean'][0]:g}",
            f"{facts['parameters'] / 1e6:.1f}",
        )
        for name, facts in result["teachers"].items()
    ]
    head = ("teacher (Hub id: timm/NAME)", "license", "BN layers", "input", "mean, red", "million parameters")
    return f"{markdown_table([head, *rows])}\n\n`{result['command']}`\n"


def imagenet_lite(result: dict) -> str:
    """Return the scores of images made with real ImageNet teachers from noise."""
    rows = [
        (
            method,
            f"{100 * facts['top1']:.0f}",
            f"{100 * facts['top5']:.0f}",
            f"{facts['similarity']:.2f}",
            f"{facts['s_per_image']:.0f}",
        )
        for method, facts in result["methods"].items()
    ]
    head = ("method", "held-out top-1 %, of 1000", "held-out top-5 %", "intra-class cos", "s per image")
    images = f"{result['classes']} classes, {result['ipc']} images each, {result['iterations']} iterations"
    hardware = f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores, shared with other work"
    return f"{markdown_table([head, *rows])}\n\n{images}. `{result['command'].strip()}` ({hardware})\n"


def labels(result: dict) -> str:
    """Return the accuracy of students for each way to store labels, with paired differences."""
    parts = []
    for data in dict.fromkeys(row["data"] for row in result["rows"]):
        table = []
        for row in (row for row in result["rows"] if row["data"] == data):
            cells = [f"{row['codec']}{' ' + str(row['top_k']) if row['top_k'] else ''}", str(row["epochs"])]
            cells += [str(row["hard_epochs"] or "-"), row["loss"]]
            first = next(iter(row["sets"].values()))
            cells += [f"{first['bytes'] / 1000:,.0f} kB", f"{first['smaller']:.1f}"]
            for facts in row["sets"].values():
                mean = 100 * sum(facts["top1"]) / len(facts["top1"])
                gap = facts["gap"]
                cells.append(f"{mean:.1f}" + ("" if gap is None else f" ({100 * gap[0]:+.1f} ± {100 * gap[1]:.1f})"))
            table.append(cells)
        head = ["codec", "stored epochs", "hard epochs", "loss", "views", "times smaller", *row["sets"]]
        parts.append(f"{NAMES.get(data, data)}:\n\n{markdown_table([head, *table])}\n")
    large = result["large"] or {}
    if large:
        sizes = [(codec, f"{size:,.0f}", f"{large['float16'] / size:.1f}") for codec, size in large.items()]
        head = ["codec", "bytes per view", "times smaller than float16"]
        parts.append(f"1000 classes (labels of EfficientNet-Lite0 and 1):\n\n{markdown_table([head, *sizes])}\n")
    seeds = f"{len(result['seeds'])} seeds of the student, {result['epochs']} epochs"
    where = f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores"
    return "\n".join(parts) + f"\n{seeds}. `{result['command']}` ({where})\n"


NAMES = {"digits-base": "Digits", "fashion-base": "Fashion-MNIST"}


def scale(result: dict) -> str:
    """Return the plans of large runs."""
    rows = [
        (
            name,
            f"{case['jobs']:,}",
            workers,
            f"{facts['makespan_over_ideal']:.3f}",
            f"{100 * facts['busy']:.0f} %",
            f"{facts['hours']:.2g}",
        )
        for name, case in result["cases"].items()
        for workers, facts in case["workers"].items()
    ]
    head = ("run", "jobs", "workers", "makespan / ideal", "busy", "hours")
    plans = [
        (
            name,
            f"{case['images']:,}",
            f"{case['gpu_hours']:.1f}",
            f"{case['labels']['codec']}, {case['labels']['epochs']} epochs",
            *(f"{case['disk_gb'][kind]:.0f} GB" for kind in ("images", "labels")),
            f"{case['plan_s']:.2f} s, {case['peak_mib']:.0f} MiB",
        )
        for name, case in result["cases"].items()
    ]
    names = ("run", "images", "GPU hours of synthesis", "labels", "disk, images", "disk, labels", "planning")
    return f"{markdown_table([head, *rows])}\n\n{markdown_table([names, *plans])}\n\n`{result['command']}`\n"


def gpu_digits(result: dict) -> str:
    """Return the results of the default recipe on a GPU."""
    times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result["wall_time_s"].items())
    return (
        f"`{result['command']}`, {result['device']}\n\n{markdown_table(table_rows(result['evaluation']))}\n\n"
        f"Time: {times}.\n"
    )


def throughput(result: dict) -> str:
    """Return the speed and memory of one step relative to the published one, for each case and variant."""
    rows = []
    for label, case in result["cases"].items():
        name, threads = label.split(", ")
        facts = dict(case["variants"])
        base = facts.pop("published")
        ratios = [f"{facts[key]['ratio_cpu']:.2f}" if key in facts else "-" for key in ("ours", "ours, bf16", "floor")]
        memory = f"{facts['ours']['peak_bytes'] / base['peak_bytes']:.2f}" if "peak_bytes" in base else "-"
        rate, share = f"{facts['ours']['image_iterations_per_s']:.0f}", f"{100 * facts['ours']['share_of_peak']:.0f} %"
        rows.append((f"{TITLES[name]}, batch {case['case']['batch']}", threads, *ratios, memory, rate, share))
    head = ("case", "CPU", "ours", "ours, bf16", "floor", "memory, ours / published", "image-iterations / s", "of peak")
    cpu = result["hardware"]["cpu"]
    return f"{markdown_table([head, *rows])}\n\n`{result['command']}` ({cpu})\n"


def main_job(result: dict) -> str:
    """Return the seconds of the README's main command before and after, by stage."""
    stages = list(next(iter(result["runs"].values()))[0]["stages"])
    rows = []
    for name, runs in result["runs"].items():
        seconds = [f"{median(run['stages'][stage] for run in runs):.0f}" for stage in stages]
        scores = [f"{100 * median(sum(run['top1'][row]) / len(run['top1'][row]) for run in runs):.1f}" for row in ROWS]
        rows.append((name, *seconds, f"{median(run['seconds'] for run in runs):.0f}", *scores))
    head = ("commit", *(f"{stage}, s" for stage in stages), "whole command, s", *(f"{row}, top-1 %" for row in ROWS))
    share = ", ".join(f"{value:.2f}" for value in result["share_of_time"])
    cpu, cores = result["hardware"]["cpu"], result["hardware"]["cores"]
    return (
        f"{markdown_table([head, *rows])}\n\nTime after / before in each round: {share}. Medians over rounds; before: "
        f"{result['before']}.\n\n`{result['command']}` ({cpu}, {cores} cores)\n"
    )


def relabel_speed(result: dict) -> str:
    """Return how many times as many images per second ours labels, or trains on, as a standard pipeline."""
    rows = [(label, f"{case['ours_per_s']:.0f}", f"{case['ratio']:.2f}") for label, case in result["cases"].items()]
    head = ("case", "ours, images / s", "ours / standard")
    device = result["hardware"]["cpu"] if result["device"] == "cpu" else result["device"]
    return f"{markdown_table([head, *rows])}\n\n`{result['command']}` ({device})\n"


def kills_table(result: dict) -> str:
    """Return a table of the kills, and of the cases that ended with identical bytes."""

    def counts(key: str) -> str:
        return "; ".join(f"{name}: {count}" for name, count in sorted(result[key].items()))

    rows = [
        ("runs with identical bytes at the end", f"{result['survived']} of {result['cases']}"),
        ("kills by signal", f"{counts('by_signal')} ({result['kills']} in total)"),
        ("kills by stage", counts("by_stage")),
        ("kills by target", counts("by_whom")),
        ("runs by recipe", counts("by_recipe")),
        ("runs by number of processes in the last launch", counts("last_processes")),
        ("slowest exit after SIGTERM or SIGINT", f"{result['slowest_polite_end_s']:.1f} s"),
        ("slowest exit of the other processes after one died", f"{result['slowest_end_after_one_dead_worker_s']:.1f} s"),
    ]
    return markdown_table([("measurement", "result"), *rows])


def memory_table(result: dict) -> str:
    """Return a table of the peak memory of each stage at both scales, and their ratio."""
    images, views = result["images"], result["epochs_of_views"]
    head = tuple(f"{images[k]} images, {views[k]} epochs of views" for k in ("1x", "10x"))
    rows = [
        (stage, f"{peak['1x'] / 1e6:.0f} MB", f"{peak['10x'] / 1e6:.0f} MB", f"{peak['ratio']:.3f}")
        for stage, peak in result["peak_bytes"].items()
    ]
    note = f"Each image is {images['bytes_each'] / 1000:.1f} kB. Peaks are anonymous memory, which cannot be dropped."
    return markdown_table([("stage", *head, "ratio"), *rows]) + f"\n\n{note}"


def checkpoint_text(result: dict) -> str:
    """Return a sentence on the cost of a checkpoint relative to the interval between checkpoints."""
    batch = " x ".join(map(str, result["batch"]))
    return (
        f"A checkpoint of {result['recipe']} ({batch} pixels and their two moments, {result['bytes'] / 1e6:.0f} MB) takes "
        f"{result['seconds_of_a_write']:.2f} s (median of {len(result['seconds_of_all_writes'])}). With one checkpoint "
        f"every {result['pause_s']:.0f} s, this is {100 * result['share_of_the_time']:.1f} % of the time."
    )


def precision_table(result: dict) -> str:
    """Return a table of the same jobs in both precisions."""
    keys = ("ce", "bn", "logit_top1", "verifier_top1")
    rows = [(name, *(f"{result[name][key]:.3f}" for key in keys)) for name in ("float32", "bf16")]
    gap = result["mean_absolute_difference_of_8_bit_levels"]
    head = ("precision", "last CE", "last R_bn", "logit teacher", "verifier")
    setup = f"{result['recipe']}, {result['jobs']} jobs, {result['device']}"
    return markdown_table([head, *rows]) + f"\n\n{setup}; on average, pixels differ by {gap:.2f} of 255 levels."


def refusals_table(result: dict) -> str:
    """Return a table of the bad-input test cases by group."""
    rows = [(group, str(count)) for group, count in sorted(result["by_group"].items())]
    total = ("all", f"{result['passed']} of {result['cases']} as specified")
    text = (
        "Each case must raise the right error class, exit with code 2 and write nothing. Its error message must be one "
        "line that says what was expected, what was given and how to fix it."
    )
    return f"{text}\n\n" + markdown_table([("wrong input", "cases"), *rows, total])


RELIABILITY = {
    "kills": kills_table,
    "memory": memory_table,
    "memory_default": memory_table,
    "checkpoints": checkpoint_text,
    "precision": precision_table,
    "precision_real": precision_table,
    "precision_gpu": precision_table,
    "refusals": refusals_table,
}


WHOLE = {
    "throughput": throughput,
    "main_job": main_job,
    "relabel": relabel_speed,
    "gpu": gpu_steps,
    "gpu_digits": gpu_digits,
    "teacher-pool": teacher_pool,
    "imagenet-lite": imagenet_lite,
    "labels": labels,
    "scale": scale,
    "openclipart": gpu_digits,
}
"""Sections that name their command themselves."""


def comparison(recorded: dict[str, dict]) -> list[tuple[str, ...]]:
    """Return a table with one line per run: scores with soft and hard labels, verifier, similarity."""
    lines: list[tuple[str, ...]] = [
        (
            "run",
            "images",
            "soft labels",
            "hard labels",
            "random real, soft",
            "random real, hard",
            "verifier %",
            "intra-class cos",
        )
    ]
    for label, result in recorded.items():
        if "report" not in result:  # not a run: step times, tuning
            continue
        evaluation = result["report"]["evaluation"]
        rows = {(row["images"], row["labels"]): top1_text(row) for row in evaluation["rows"]}
        facts = evaluation["sets"]["distilled"]
        lines.append(
            (
                f"`{label}`",
                str(evaluation["rows"][0]["count"]),
                *(
                    rows.get(key, "-")
                    for key in (
                        ("distilled", "soft"),
                        ("distilled", "hard"),
                        ("random_real", "soft"),
                        ("random_real", "hard"),
                    )
                ),
                percent_text(facts["verifier_top1"]),
                cosine_text(facts["intra_class_similarity"]["mean"]),
            )
        )
    return lines


def main() -> int:
    """Write the derived files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = [p for p, text in rendered().items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    if args.check:
        for path in stale:
            sys.stderr.write(f"stale: {path.relative_to(ROOT)}; run `make cards`\n")
        return 1 if stale else 0
    for path, text in rendered().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
