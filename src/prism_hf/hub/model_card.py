"""The model card: what a shared network says about itself, rendered strictly from its folder; pure, no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..dataset import hub_id_problem
from ..errors import HubError
from ..models import NetworkConfig, StudentFacts, TeacherFacts, read_facts
from ..runtime import map_texts, texts_in
from .card import checked_header, escape, license_keys, render, slug, with_header

MODEL_METADATA_KEYS = (
    "license", "license_name", "library_name", "pipeline_tag", "tags", "datasets", "model-index",
)  # fmt: skip
"""Everything that may stand in the YAML header; a key outside is an error."""


def render_model_card(folder: Path, repo_id: str, revision: str | None = None, *, dataset_id: str | None = None) -> str:
    """The card, README.md of a model repo, from a model folder; the lines that load the network name a branch `revision`.

    `dataset_id` is the Hub id of the distilled dataset, for a student whose facts do not know it yet.

    Raises:
        HubError: A file is missing, incomplete or names a local path (it is named), or an id is not a Hub id.
    """
    for given in (repo_id, dataset_id):
        if given is not None and hub_id_problem(given):
            raise HubError(f"{given!r} is no Hub id; expected NAMESPACE/NAME of letters, digits, dots, dashes, underscores")
    try:
        config, facts = NetworkConfig.read(folder / "config.json"), read_facts(folder)
    except ValueError as error:
        raise HubError(f"{error}; share a network as prism-hf stored it") from error
    local = next((text for text in texts_in(facts.plain()) if Path(text).is_absolute()), None)
    if local is not None:
        raise HubError(f"{folder / facts.FILE} names the local path {local!r}; cut it to its last part")
    if isinstance(facts, StudentFacts):
        hub_id = dataset_id or facts.dataset.hub_id
        name = hub_id or facts.dataset.name or "without a name"
        told = facts.model_dump() | {"dataset_id": hub_id, "dataset_name": name}
    else:
        told = _of_teacher(facts, config)
    values = {
        "student": isinstance(facts, StudentFacts),
        "facts_file": facts.FILE,
        "revision": revision,
        "repo_id": repo_id,  # safe as it is, inside code too: a checked Hub id, and a checked branch
        "name": escape(repo_id.rpartition("/")[2]),
        "f": map_texts(told, escape),
        "size": config.pretrained_cfg.input_size[-1],
        "mean": ", ".join(f"{value:g}" for value in config.pretrained_cfg.mean),
        "std": ", ".join(f"{value:g}" for value in config.pretrained_cfg.std),
        "class_names": [escape(name) for name in config.label_names[:20]],
        "class_count": len(config.label_names),
    }
    return with_header(_metadata(told, repo_id), render("model_card.md.jinja", values))


def _of_teacher(facts: TeacherFacts, config: NetworkConfig) -> dict[str, Any]:
    """What the card tells of a teacher; those of earlier versions name their data alone."""
    told, settings = facts.model_dump(), facts.settings
    source = {"id": settings.data, "on_hub": False, "revision": None, "license": config.pretrained_cfg.license}
    return told | {
        "architecture": facts.architecture or config.architecture,
        "source": told["source"] or source,
        "test": told["test"] or {"id": settings.data, "split": None},
        "seed": settings.seed,
        "epochs": settings.epochs,
        "dataset_id": None,
    }


def _metadata(told: Mapping[str, Any], repo_id: str) -> dict[str, Any]:
    """The YAML header, from an allow-list; the accuracy on the real test part stands in `model-index`."""
    source, test = told["source"], told["test"]
    trained_on = [told["dataset_id"], source["id"] if source["on_hub"] else None]
    result = EvalResult(
        task_type="image-classification",
        dataset_type=slug(test["id"]) if hub_id_problem(test["id"]) else test["id"],
        dataset_name=test["id"],
        dataset_split=test["split"],
        dataset_revision=source["revision"] if test["id"] == source["id"] else None,
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=told["test_top1"],
    )
    data = ModelCardData(
        **license_keys(source["license"]),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "dataset-distillation", "prism-hf"],
        datasets=[name for name in trained_on if name is not None and hub_id_problem(name) is None] or None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=[result],
    )
    return checked_header(data.to_dict(), MODEL_METADATA_KEYS)
