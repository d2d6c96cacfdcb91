"""The model card: what a shared network says about itself, rendered strictly from its folder; pure, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import HubError
from ..models import NetworkConfig, StudentFacts, TeacherFacts, read_facts
from .card import checked_header, escape, escape_all, license_keys, render, slug, with_header

MODEL_METADATA_KEYS = (
    "license", "license_name", "library_name", "pipeline_tag", "tags", "datasets", "model-index",
)  # fmt: skip
"""Everything that may stand in the YAML header; a key outside is an error."""


def render_model_card(folder: Path, *, repo_id: str, dataset_id: str | None = None, revision: str | None = None) -> str:
    """The card, README.md of a model repo.

    Args:
        folder: A model folder; see `models.folder.store_network`.
        repo_id: Hub id under which the network is shared.
        dataset_id: Hub id of the distilled dataset, if a student's facts do not know it yet.
        revision: Branch, unless it is the main one: the lines that load the network then name it.

    Raises:
        HubError: A file is missing, incomplete or names a local path (it is named), or an id is not a Hub id.

    Example:
        >>> render_model_card(run.folder / "student", repo_id="org/name").startswith("---")
        True
    """
    for given in (repo_id, dataset_id):
        if given is not None and not _is_hub_id(given):
            raise HubError(f"{given!r} is no Hub id; expected NAMESPACE/NAME of letters, digits, dots, dashes, underscores")
    try:
        config, facts = NetworkConfig.read(folder / "config.json"), read_facts(folder)
    except ValueError as error:
        raise HubError(f"{error}; share a network as prism-hf stored it") from error
    for text in _texts(facts.plain()):
        if Path(text).is_absolute():
            path = folder / facts.FILE
            raise HubError(f"{path} names the local path {text!r}; cut it to its last part before the network is shared")
    told = _of_student(facts, dataset_id) if isinstance(facts, StudentFacts) else _of_teacher(facts, config)
    values = {
        "student": isinstance(facts, StudentFacts),
        "facts_file": facts.FILE,
        "revision": revision,
        "repo_id": repo_id,  # safe as it is, inside code too: a checked Hub id, and a checked branch
        "name": escape(repo_id.rpartition("/")[2]),
        "f": escape_all(told),
        "size": config.pretrained_cfg.input_size[-1],
        "mean": ", ".join(f"{value:g}" for value in config.pretrained_cfg.mean),
        "std": ", ".join(f"{value:g}" for value in config.pretrained_cfg.std),
        "class_names": [escape(name) for name in config.label_names[:20]],
        "class_count": len(config.label_names),
    }
    return with_header(_metadata(told, repo_id), render("model_card.md.jinja", values))


def _of_student(facts: StudentFacts, dataset_id: str | None) -> dict[str, Any]:
    """What the card tells of a student."""
    hub_id = dataset_id or facts.dataset.hub_id
    return facts.model_dump() | {"dataset_id": hub_id, "dataset_name": hub_id or facts.dataset.name or "without a name"}


def _of_teacher(facts: TeacherFacts, config: NetworkConfig) -> dict[str, Any]:
    """What the card tells of a teacher; those of earlier versions name their data alone."""
    told, settings = facts.model_dump(), facts.settings
    source = {"id": settings.data, "on_hub": False, "revision": None, "licence": config.pretrained_cfg.license}
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
    source, test, keys = told["source"], told["test"], license_keys(told["source"]["licence"])
    trained_on = [told["dataset_id"], source["id"] if source["on_hub"] else None]
    result = EvalResult(
        task_type="image-classification",
        dataset_type=test["id"] if _is_hub_id(test["id"]) else slug(test["id"]),
        dataset_name=test["id"],
        dataset_split=test["split"],
        dataset_revision=source["revision"] if test["id"] == source["id"] else None,
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=told["test_top1"],
    )
    data = ModelCardData(
        license=keys["license"],
        license_name=keys["license_name"],
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "dataset-distillation", "prism-hf"],
        datasets=[name for name in trained_on if name is not None and _is_hub_id(name)] or None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=[result],
    )
    return checked_header(data.to_dict(), MODEL_METADATA_KEYS)


def _texts(value: object) -> list[str]:
    """All strings inside plain JSON."""
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _is_hub_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
