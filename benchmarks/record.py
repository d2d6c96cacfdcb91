"""Record a finished run as a benchmark: `python benchmarks/record.py outputs/NAME [--as LABEL]`.

The JSON contains the command, versions, hardware, seeds, times, all results, and the facts of the card. The README tables
and the cards in cards/ are rendered from it (`make cards`).
"""

import argparse
import json
from pathlib import Path

import machine

from prism_hf.hub.dataset_card import card_facts
from prism_hf.recipe.schema import to_dict
from prism_hf.recipe.yaml_file import differing_keys, load_recipe
from prism_hf.runtime.store import write_json

ROOT = Path(__file__).resolve().parent.parent


def command_of(run: Path, threads: int) -> str:
    """Return the command that reproduces a run: the closest shipped recipe, its overrides, and the number of threads."""
    recipe = load_recipe(run / "recipe.yaml")
    shipped = {
        p.relative_to(ROOT): load_recipe(p)
        for p in sorted((ROOT / "recipes").glob("*/*.yaml"))
        if p.parent.name != "accelerate"
    }
    path, nearest = min(
        shipped.items(), key=lambda item: (item[1].name != recipe.name, len(differing_keys(item[1], recipe)))
    )

    def value(key: str) -> str:
        current: object = to_dict(recipe)
        for part in key.split("."):
            current = current[part]  # type: ignore[index]
        return json.dumps(current, separators=(",", ":"))

    overrides = [f"{key}={value(key)}" for key in differing_keys(nearest, recipe)]
    if recipe.name != nearest.name:
        overrides.append(f"name={recipe.name}")
    return " ".join(["accelerate launch recipes/prism.py", str(path), *overrides, "--threads", str(threads)])


def main() -> None:
    """Write the JSON of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--as", dest="label")
    args = parser.parse_args()
    recipe = load_recipe(args.run / "recipe.yaml")
    report = json.loads((args.run / "report.json").read_text(encoding="utf-8"))
    import datasets

    names = datasets.load_dataset(str(args.run / "dataset"), split="train").features["label"].names
    result = {
        "command": command_of(args.run, report["hardware"]["threads"]),
        "hardware": machine.hardware() | report["hardware"],
        "report": report,
        "card_facts": card_facts(args.run / "dataset", recipe, names, report),
    }
    path = ROOT / "benchmarks" / "results" / f"{args.label or recipe.name}.json"
    write_json(path, result)


if __name__ == "__main__":
    main()
