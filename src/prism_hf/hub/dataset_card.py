"""What the data set says about itself: a dataset card, rendered strictly from facts; pure, no network.

Text from outside (class names, source ids, licences) is escaped before it enters Markdown; the YAML header is written by
a YAML library from an allow-list of keys.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets.info import DatasetInfo, DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from huggingface_hub import DatasetCardData
from jinja2 import Environment, StrictUndefined

from ..dataset.writer import VIEWS, image_features, view_features
from ..evaluation.report import markdown_table, table_rows
from ..recipe.schema import Recipe, to_dict
from ..recipe.yaml_file import dump_recipe
from ..runtime.plain_yaml import dump_yaml
from ..runtime.untrusted import visible
from .merge import block_of

METADATA_KEYS = (
    "pretty_name", "license", "license_name", "task_categories", "tags", "source_datasets", "size_categories",
    "configs", "dataset_info",
)  # fmt: skip
"""Everything that may stand in the YAML header; a key outside is an error."""

_LICENCES = ("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "mit", "apache-2.0", "bsd-3-clause", "odc-by")
"""Licence ids of the Hub that a source may name; anything else becomes `other` with its name."""


def card_facts(
    folder: Path, recipe: Recipe, class_names: Sequence[str], report: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Everything that a card says, as plain JSON: what `render_card` needs and nothing else.

    Args:
        folder: The data set folder, with tables and provenance.json.
        recipe: The resolved recipe.
        class_names: K names.
        report: report.json, or `None` before the evaluation. Times are left out of the card: the same recipe gives the
            same card.
    """
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    tables = {}
    for config, sub in (("default", "data"), (VIEWS, VIEWS)):
        paths = sorted((folder / sub).glob("train-*.parquet"))
        groups = [pq.ParquetFile(path).metadata for path in paths]
        tables[config] = {
            "rows": sum(m.num_rows for m in groups),
            "file_bytes": sum(path.stat().st_size for path in paths),
            "table_bytes": sum(m.row_group(i).total_byte_size for m in groups for i in range(m.num_row_groups)),
        }
    return {
        "recipe": to_dict(recipe),
        "class_names": list(class_names),
        "tables": tables,
        "provenance": {k: v for k, v in provenance.items() if k != "files"},
        "evaluation": None if report is None else report["evaluation"],
    }


def render_card(facts: Mapping[str, Any], recipe: Recipe) -> str:
    """The card, README.md of the data set folder.

    Args:
        facts: From `card_facts`.
        recipe: The recipe that the facts are about.

    Raises:
        jinja2.UndefinedError: The template names a fact that is not there.

    Example:
        >>> render_card(facts, recipe).startswith("---")
        True
    """
    template = files("prism_hf.hub").joinpath("templates/dataset_card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    evaluation = facts["evaluation"]
    recipe_yaml = dump_recipe(recipe)
    seeds = evaluation["rows"][0]["seeds"] if evaluation and evaluation["rows"] else []
    body = environment.from_string(
        template
    ).render(
        placeholder=_placeholder(recipe.name),
        name=recipe.name,  # safe as it is: a recipe's name is letters, digits, dot, dash, underscore
        r=escape_all(to_dict(recipe)),
        student=recipe.evaluation.student if re.fullmatch(r"\w+", recipe.evaluation.student) else "resnet18",
        class_names=[escape(name) for name in facts["class_names"][:20]],
        class_count=len(facts["class_names"]),
        teachers=escape_all(facts["provenance"]["teachers"]),
        provenance=escape_all({k: v for k, v in facts["provenance"].items() if k != "teachers"}),
        tables=facts["tables"],
        has_evaluation=evaluation is not None,
        table=markdown_table(table_rows(evaluation)) if evaluation else "",
        evaluation=escape_all(evaluation or {}),
        seeds=len(seeds),
        recipe_yaml=recipe_yaml.strip(),
        fence=fence_for(recipe_yaml),
        replay=REPLAY,
        method=method_in_words(recipe),
    )
    return f"---\n{_header(facts, recipe)}---\n\n{block_of(body)}"


def _header(facts: Mapping[str, Any], recipe: Recipe) -> str:
    return dump_yaml(metadata(facts, recipe))


def render_control_card(facts: Mapping[str, Any], recipe: Recipe) -> str:
    """A short card for the control folder: random real images, so that plain `datasets` loads it the same way."""
    return (
        f"---\n{_header(facts, recipe)}---\n\n# {recipe.name}: random real images\n\n"
        f"{facts['tables']['default']['rows']} random real training images of {escape(recipe.data.source)}, relabelled "
        "by the same teachers under the same protocol as the distilled set: its control. Not distilled.\n"
    )


def address_card(text: str, name: str, repo_id: str, revision: str | None = None) -> str:
    """The card with the place where it will stand, instead of `ORG/NAME`.

    Args:
        text: From `render_card`.
        name: Of the recipe.
        repo_id: Hub id of the data set.
        revision: Branch, unless it is the main one: the lines that load the data then name it.
    """
    # Only in the first piece of code: a class may be called anything, in the header too.
    before, title, rest = text.partition("\n## Load and train\n")
    code, fence, after = rest.partition("\n```\n")
    code = code.replace(_placeholder(name), f'repo = "{repo_id}"', 1)
    if revision is not None:
        code = code.replace("load_dataset(repo, ", f"load_dataset(repo, revision={json.dumps(revision)}, ")
    return f"{before}{title}{code}{fence}{after}"


def _placeholder(name: str) -> str:
    return f'repo = "ORG/{name}"  # a Hub id, or the path of this folder'


REPLAY = """\
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import pil_to_tensor


def shown(image, box, flip):  # image: (C, H, W) float in [0, 1]
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    return interpolate(crop, image.shape[-2:], mode="bilinear", antialias=True)[0].flip([-1] if flip else [])


def replay(row, images):  # row of "views", images = the "default" config
    own, partner = (pil_to_tensor(images[row[key]]["image"]) / 255 for key in ("image_index", "mix_image_index"))
    view, (top, left, height, width) = shown(own, row["crop"], row["flip"]), row["mix_box"]
    if row["mix_image_index"] >= 0:
        share = torch.full_like(view, 1.0 if height * width else row["mix_weight"])  # CutMix, or a blend
        share[:, top : top + height, left : left + width] = 0
        view = share * view + (1 - share) * shown(partner, row["mix_crop"], row["mix_flip"])
    return view"""
"""The outsider's replay, shown in the card and the docs, and run by a test: no code of ours."""


def metadata(facts: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The YAML header, from an allow-list; `configs` and `dataset_info` make plain `load_dataset` work."""
    data = DatasetCardData()
    infos = {
        "default": _info("default", image_features(facts["class_names"]), facts["tables"]["default"]),
        VIEWS: _info(VIEWS, view_features(len(facts["class_names"])), facts["tables"][VIEWS]),
    }
    DatasetInfosDict(infos).to_dataset_card_data(data)
    on_hub = facts["provenance"]["source"].get("on_hub", False)
    values: dict[str, Any] = {
        "pretty_name": recipe.name,
        **licence_keys(recipe.data.licence),
        "task_categories": ["image-classification"],
        "tags": ["dataset-distillation", "soft-labels", "prism", "prism-hf"],
        "source_datasets": [recipe.data.source if on_hub else "extended|other"],
        "size_categories": [_size_category(facts["tables"]["default"]["rows"])],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}], "default": True},
            {"config_name": VIEWS, "data_files": [{"split": "train", "path": f"{VIEWS}/train-*"}]},
        ],
        "dataset_info": data.to_dict()["dataset_info"],
    }
    extra = set(values) - set(METADATA_KEYS)
    if extra:
        raise ValueError(f"metadata keys {sorted(extra)} are not in the allow-list")
    # Through JSON: plain types only, whatever the library put into its classes.
    return json.loads(json.dumps({key: value for key, value in values.items() if value is not None}))


def licence_keys(licence: str) -> dict[str, str | None]:
    """`license` and `license_name` of a card's header: an id of the Hub, or `other` with the name made an id.

    The card's text has it as it was given.
    """
    wanted = slug(licence)
    known = wanted in _LICENCES
    return {"license": wanted if known else "other", "license_name": None if known else wanted}


def slug(text: str) -> str:
    """Text as an id of lower-case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.strip().lower()).strip("-.")[:80] or "unknown"


def _info(config: str, features: datasets.Features, table: Mapping[str, int]) -> DatasetInfo:
    split = SplitInfo("train", num_bytes=table["table_bytes"], num_examples=table["rows"], dataset_name=None)
    splits = SplitDict()
    splits.add(split)
    return DatasetInfo(
        config_name=config,
        features=features,
        splits=splits,
        download_size=table["file_bytes"],
        dataset_size=table["table_bytes"],
    )


def _size_category(rows: int) -> str:
    bounds = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
    return next((name for bound, name in bounds if rows < bound), "10M<n<100M")


_LINK = re.compile(r":(?=//)|@|(?<=www)\.", re.IGNORECASE)
_LINE_START = re.compile(r"^(\d*)([-=.)])")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def escape(text: object) -> str:
    """Text that shows as itself in one line of Markdown or HTML, inside a table too, whatever it contains."""
    line = _MARKDOWN.sub(r"\\\1", " ".join(visible(str(text)).split()))
    # A dash, an equals sign or a number with a dot would open a list, a rule or a heading at the start of a line.
    line = _LINE_START.sub(r"\1\\\2", line)
    # Addresses and @names would become links on their own.
    return _LINK.sub(lambda found: f"&#{ord(found[0])};", html.escape(line, quote=False))


def escape_all(value: Any) -> Any:
    """`escape` for every string inside plain JSON; numbers, booleans and `None` stay."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {key: escape_all(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [escape_all(item) for item in value]
    return value


def fence_for(text: str) -> str:
    """A code fence longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def method_in_words(recipe: Recipe) -> str:
    """One sentence on who supervised what."""
    teachers = recipe.teachers
    if recipe.method == "random" or not recipe.synthesis.iterations:
        return "nothing is optimised"
    if teachers.selection == "cycle" and teachers.bn_pool:
        conv = " and of the inputs of convolutions" if recipe.synthesis.conv else ""
        return (
            f"{len(teachers.synthesis_names)} teachers take turns, one at each iteration, which gives both the "
            f"classification loss and the alignment of batch-norm statistics{conv} "
            f"(the {'G-VBSM' if conv else 'BN-only G-VBSM'} scheme)"
        )
    if not teachers.bn_pool:
        return "one teacher gives both the classification loss and the batch-norm alignment (the SRe2L scheme)"
    draws = min(teachers.extras, len(teachers.bn_pool))
    if not teachers.include_logit and not (draws and teachers.draw_probability):
        return "one logit teacher gives the classification loss, and no network gives batch-norm alignment"
    when = "once per slot" if teachers.selection == "per_slot" else "anew at each iteration"
    own = "the logit teacher itself and " if teachers.include_logit else ""
    return (
        "one logit teacher gives the classification loss; batch-norm alignment comes from "
        f"{own}up to {draws} of {len(teachers.bn_pool)} other networks, each draw made with probability "
        f"{teachers.draw_probability:g}, drawn {when} (the PRISM scheme)"
    )
