"""The dataset card, rendered from recorded facts only; no network access."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import pyarrow.parquet as pq
from datasets.info import DatasetInfo, DatasetInfosDict
from huggingface_hub import DatasetCardData

from ..dataset import READING, VIEWS, image_features, read_provenance, view_features
from ..evaluation import dd_ranking_of, dd_ranking_text, full_is_best, markdown_table, table_rows
from ..recipe import NO_IMAGES, SQUEEZE_PREFIX, Recipe, dump_recipe, to_dict
from ..runtime import count_text, map_texts
from .card import checked_header, class_list, escape, fence_for, license_keys, render, slug, with_header
from .citations import CITATIONS
from .figures import part_shown
from .merge import block_of

METADATA_KEYS = (
    "pretty_name", "license", "license_name", "task_categories", "tags", "source_datasets", "size_categories",
    "configs", "dataset_info",
)  # fmt: skip
"""The keys that the YAML header may have; any other key is an error."""
_PLACEHOLDER = 'repo = "ORG/{}"  # a Hub id, or the path to this folder'


def card_facts(
    folder: Path, recipe: Recipe, class_names: Sequence[str], report: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return all the facts of a card as plain JSON. The folder must contain the tables and provenance.json.

    `report` is `None` before the evaluation. Its times are left out, so that the same recipe gives the same card.
    """
    provenance = read_provenance(folder / "provenance.json").plain()
    return {
        "recipe": to_dict(recipe),
        "class_names": list(class_names),
        "tables": {"default": _sizes(folder / "data"), VIEWS: _sizes(folder / VIEWS)},
        "provenance": {key: value for key, value in provenance.items() if key != "files"},
        "evaluation": None if report is None else report["evaluation"],
    }


def _sizes(folder: Path) -> dict[str, int]:
    """Return the number of rows and bytes of the tables in a folder."""
    paths = sorted(folder.glob("train-*.parquet"))
    footers = [pq.read_metadata(path) for path in paths]
    return {
        "rows": sum(footer.num_rows for footer in footers),
        "file_bytes": sum(path.stat().st_size for path in paths),
        "table_bytes": sum(f.row_group(i).total_byte_size for f in footers for i in range(f.num_row_groups)),
    }


def render_card(facts: Mapping[str, Any], recipe: Recipe) -> str:
    """Return the card (README.md of the dataset folder) for `card_facts`; a missing fact is a `jinja2.UndefinedError`.

    Example:
        >>> render_card(facts, recipe).startswith("---")
        True
    """
    evaluation, recipe_yaml, student = facts["evaluation"], dump_recipe(recipe), recipe.evaluation.student
    names, counts = facts["class_names"], facts["provenance"]["source"].get("images_per_class", [])
    shown = recipe.data.distilled_classes if recipe.data.class_logits == "full" else len(names)
    values = {
        "placeholder": _PLACEHOLDER.format(recipe.name),
        "name": recipe.name,  # needs no escaping: a recipe name has only letters, digits, dots, dashes and underscores
        "r": map_texts(to_dict(recipe), escape),
        "student": student if re.fullmatch(r"\w+", student) else "resnet18",
        "source": escape(source_name(facts)),
        "no_images": recipe.data.source == NO_IMAGES,
        "source_version": _source_version(facts),
        "class_count": len(names),
        "class_sizes": class_sizes(names, counts),
        "class_list": class_list(names, counts),
        "full_is_best": full_is_best(evaluation["rows"]) if evaluation else False,
        "restricted": _restricted(facts["provenance"]["teachers"]),
        "part": part_shown(shown, recipe.synthesis.ipc),
        "provenance": map_texts(facts["provenance"], escape),
        "tables": facts["tables"],
        "table": markdown_table(table_rows(evaluation)) if evaluation else "",
        "evaluation": map_texts(evaluation, escape),
        "dd_ranking": dd_ranking_text(dd_ranking_of(evaluation["rows"])) if evaluation else "",
        "seeds": len(evaluation["rows"][0]["seeds"]) if evaluation and evaluation["rows"] else 0,
        "recipe_yaml": recipe_yaml.strip(),
        "fence": fence_for(recipe_yaml),
        "replay": REPLAY,
        "stored": recipe.stored_labels,
        "reading": READING.get(recipe.stored_labels.codec),
        "method": method_in_words(recipe),
        "paper": cited_paper(recipe),
    }
    return with_header(metadata(facts, recipe), block_of(render("dataset_card.md.jinja", values)))


def render_control_card(facts: Mapping[str, Any], recipe: Recipe) -> str:
    """Return a short card for the control (random real images), so that plain `datasets` loads it like the dataset."""
    return with_header(
        metadata(facts, recipe),
        f"# {recipe.name}: random real images\n\n"
        f"{count_text(facts['tables']['default']['rows'], 'random real training image')} of "
        f"{escape(source_name(facts))}{_source_version(facts)}, relabeled "
        "by the same teachers under the same protocol as the distilled dataset. They are its control. Not distilled.\n",
    )


def source_name(facts: Mapping[str, Any]) -> str:
    """Return the name of the real data: a Hub id, or that of a local folder without the folders above it."""
    name = facts["recipe"]["data"]["source"]
    if name == "digits":
        return "scikit-learn's digits"
    if name == NO_IMAGES:
        return "no real images"
    # Early versions did not record whether the source is on the Hub.
    local = facts["provenance"]["source"].get("on_hub") is False
    return f"the local folder {PurePath(name).name or name}" if local else name


def _source_version(facts: Mapping[str, Any]) -> str:
    """Return the config and revision of the real data, escaped and in parentheses; nothing if it has neither."""
    data, source = facts["recipe"]["data"], facts["provenance"]["source"]
    version = {"config": data["config"], "revision": source.get("revision") or data["revision"]}
    parts = [f"{key} {escape(value)}" for key, value in version.items() if value is not None]
    return f" ({', '.join(parts)})" if parts else ""


def _restricted(teachers: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on teachers whose license, or that of their pretrained start, is unknown or non-commercial."""
    licenses = {teacher["name"]: slug(teacher.get("license", "")) for teacher in teachers}
    unknown = [
        escape(name)
        for name, license in licenses.items()
        if "unknown-weights-of" in license or (license in ("unknown", "other") and not name.startswith(SQUEEZE_PREFIX))
    ]
    limited = [escape(name) for name, license in licenses.items() if re.search(r"(^|-)nc(-|$)|non-?commercial", license)]
    parts = [f"The license of {', '.join(unknown)} is unknown; ask its authors before you use this set."] if unknown else []
    if limited:
        parts.append(f"The license of {', '.join(limited)} forbids commercial use, which may extend to this set.")
    return " ".join(parts)


def class_sizes(names: Sequence[str], counts: Sequence[int]) -> str:
    """Return a sentence on the number of training images and the smallest and largest class; empty without counts."""
    if not counts:
        return ""
    total = f"The source has {count_text(sum(counts), 'training image')}"
    small, large = min(counts), max(counts)
    if small == large:
        return f"{total}, {small:,} of each class."
    smallest, largest = (escape(names[counts.index(size)]) for size in (small, large))
    images = count_text(small, "image")
    return f"{total}. The smallest class is *{smallest}* ({images}), the largest is *{largest}* ({large:,})."


def address_card(text: str, name: str, repo_id: str, revision: str | None = None) -> str:
    """Return the card of the recipe `name` with the id of its repo, and with the branch unless it is the main one."""
    # Replace only in the first code block: a class name, which is also in the header, may contain the same text.
    before, title, rest = text.partition("\n## Load and train\n")
    code, fence, after = rest.partition("\n```\n")
    code = code.replace(_PLACEHOLDER.format(name), f'repo = "{repo_id}"', 1)
    if revision is not None:
        code = code.replace("load_dataset(repo, ", f"load_dataset(repo, revision={json.dumps(revision)}, ")
    return f"{before}{title}{code}{fence}{after}"


REPLAY = """\
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import pil_to_tensor


def crop_and_flip(image, box, flip):  # image: (C, H, W) float in [0, 1]
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    return interpolate(crop, image.shape[-2:], mode="bilinear", antialias=True)[0].flip([-1] if flip else [])


def replay(row, images):  # row: of the "views" config; images: the "default" config
    image, partner = (pil_to_tensor(images[row[key]]["image"]) / 255 for key in ("image_index", "mix_image_index"))
    view, (top, left, height, width) = crop_and_flip(image, row["crop"], row["flip"]), row["mix_box"]
    if row["mix_image_index"] >= 0:
        share = torch.full_like(view, 1.0 if height * width else row["mix_weight"])  # CutMix or MixUp
        share[:, top : top + height, left : left + width] = 0
        view = share * view + (1 - share) * crop_and_flip(partner, row["mix_crop"], row["mix_flip"])
    return view"""
"""Code that rebuilds a view without prism-hf. The card and the docs show it, and a test runs it."""


def metadata(facts: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the YAML header, with allowed keys only; `configs` and `dataset_info` make plain `load_dataset` work."""
    names, tables, stored = facts["class_names"], facts["tables"], recipe.stored_labels
    data, infos = DatasetCardData(), DatasetInfosDict()
    for config, features in (
        ("default", image_features(names)),
        (VIEWS, view_features(len(names), stored.codec, stored.top_k)),
    ):
        rows, file_bytes, table_bytes = (tables[config][key] for key in ("rows", "file_bytes", "table_bytes"))
        infos[config] = DatasetInfo(
            config_name=config,
            features=features,
            splits={"train": {"name": "train", "num_bytes": table_bytes, "num_examples": rows}},
            download_size=file_bytes,
            dataset_size=table_bytes,
        )
    infos.to_dataset_card_data(data)
    on_hub = facts["provenance"]["source"].get("on_hub", False)
    values = {
        "pretty_name": recipe.name,
        **license_keys(recipe.data.license),
        "task_categories": ["image-classification"],
        "tags": ["dataset-distillation", "soft-labels", "prism", "prism-hf", "image", "datasets"],
        "source_datasets": [recipe.data.source if on_hub else "extended|other"],
        "size_categories": [_size_category(tables["default"]["rows"])],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}], "default": True},
            {"config_name": VIEWS, "data_files": [{"split": "train", "path": f"{VIEWS}/train-*"}]},
        ],
        "dataset_info": data.to_dict()["dataset_info"],
    }
    return checked_header(values, METADATA_KEYS)


def _size_category(rows: int) -> str:
    bounds = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
    return next((name for bound, name in bounds if rows < bound), "10M<n<100M")


def cited_paper(recipe: Recipe) -> dict[str, str] | None:
    """Return the name and citation of the method that optimized the images; `None` if they were not optimized."""
    if recipe.method == "random" or not recipe.synthesis.iterations:
        return None
    with_pool = "G-VBSM" if recipe.teachers.selection == "cycle" else "PRISM"
    name = with_pool if recipe.teachers.bn_pool else "SRe2L"
    return {"name": name, **CITATIONS[name]}


def method_in_words(recipe: Recipe) -> str:
    """Return one sentence that says which teacher supervised what."""
    teachers = recipe.teachers
    if recipe.method == "random" or not recipe.synthesis.iterations:
        return "nothing is optimized"
    if teachers.selection == "cycle" and teachers.bn_pool:
        conv = " and of convolution inputs" if recipe.synthesis.conv else ""
        return (
            f"{len(teachers.synthesis_names)} teachers take turns, one per iteration, and each provides both the "
            f"classification loss and the alignment of batch-norm statistics{conv} "
            f"(the {'G-VBSM' if conv else 'BN-only G-VBSM'} scheme)"
        )
    if not teachers.bn_pool:
        return "one teacher provides both the classification loss and the batch-norm alignment (the SRe2L scheme)"
    draws = min(teachers.extras, len(teachers.bn_pool))
    if not teachers.include_logit and not (draws and teachers.draw_probability):
        return "one logit teacher provides the classification loss, and no network provides batch-norm alignment"
    when = "once per slot" if teachers.selection == "per_slot" else "anew at each iteration"
    logit = "the logit teacher itself and " if teachers.include_logit else ""
    pool = count_text(len(teachers.bn_pool), "other network")
    return (
        "one logit teacher provides the classification loss; batch-norm alignment comes from "
        f"{logit}up to {draws} of {pool}, drawn {when}, where each draw is made with "
        f"probability {teachers.draw_probability:g} (the PRISM scheme)"
    )
