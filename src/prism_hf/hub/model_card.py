"""The model card of a teacher or a student, rendered from its model folder only; no network access."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..dataset import hub_id_problem
from ..errors import HubError
from ..models import NetworkConfig, StudentFacts, TeacherFacts, read_facts
from ..runtime import map_texts, texts_in
from .card import checked_header, class_list, escape, license_keys, render, slug, with_header
from .citations import CITATIONS

MODEL_METADATA_KEYS = (
    "license", "license_name", "library_name", "pipeline_tag", "tags", "datasets", "model-index",
)  # fmt: skip
"""The keys that the YAML header may have; any other key is an error."""


def render_model_card(folder: Path, repo_id: str, revision: str | None = None, *, dataset_id: str | None = None) -> str:
    """Return the card (README.md of a model repo) of a model folder; its code loads the network from branch `revision`.

    `dataset_id` is the Hub id of the distilled dataset, for a student whose facts do not have it yet.

    Raises:
        HubError: A file is missing, is incomplete or contains a local path, or an id is not a Hub id.
    """
    for given in (repo_id, dataset_id):
        if given is not None and hub_id_problem(given):
            raise HubError(f"{given!r} is not a Hub id; expected NAMESPACE/NAME of letters, digits, dots, dashes or _")
    try:
        config, facts = NetworkConfig.read(folder / "config.json"), read_facts(folder)
    except ValueError as error:
        raise HubError(f"{error}; share the model folder as prism-hf wrote it") from error
    local = next((text for text in texts_in(facts.plain()) if Path(text).is_absolute()), None)
    if local is not None:
        raise HubError(f"{folder / facts.FILE} contains the local path {local!r}; shorten it to its last part")
    if isinstance(facts, StudentFacts):
        hub_id = dataset_id or facts.dataset.hub_id
        name = hub_id or facts.dataset.name or "without a name"
        fields = facts.model_dump() | {"dataset_id": hub_id, "dataset_name": name}
    else:
        fields = _of_teacher(facts, config)
    values = {
        "student": isinstance(facts, StudentFacts),
        "facts_file": facts.FILE,
        "revision": revision,
        "repo_id": repo_id,  # needs no escaping, even inside code: the id and the branch were checked
        "name": escape(repo_id.rpartition("/")[2]),
        "f": map_texts(fields, escape),
        "size": config.pretrained_cfg.input_size[-1],
        "mean": ", ".join(f"{value:g}" for value in config.pretrained_cfg.mean),
        "std": ", ".join(f"{value:g}" for value in config.pretrained_cfg.std),
        "class_list": class_list(config.label_names),
        "class_count": len(config.label_names),
        "paper": CITATIONS["SRe2L"],  # its first stage is the training of a teacher
    }
    return with_header(_metadata(fields, repo_id), render("model_card.md.jinja", values))


def _of_teacher(facts: TeacherFacts, config: NetworkConfig) -> dict[str, Any]:
    """Return the fields of a teacher's card; facts written by earlier versions have only the name of the data."""
    fields, settings = facts.model_dump(), facts.settings
    source = {"id": settings.data, "on_hub": False, "revision": None, "license": config.pretrained_cfg.license}
    if facts.source is not None:
        source = fields["source"] | {"license": facts.license}
    return fields | {
        "architecture": facts.architecture or config.architecture,
        "source": source,
        "test": fields["test"] or {"id": settings.data, "split": None},
        "seed": settings.seed,
        "epochs": settings.epochs,
        "dataset_id": None,
    }


def _metadata(fields: Mapping[str, Any], repo_id: str) -> dict[str, Any]:
    """Return the YAML header, with allowed keys only; `model-index` has the accuracy on the real test split."""
    source, test = fields["source"], fields["test"]
    trained_on = [fields["dataset_id"], source["id"] if source["on_hub"] else None]
    result = EvalResult(
        task_type="image-classification",
        dataset_type=slug(test["id"]) if hub_id_problem(test["id"]) else test["id"],
        dataset_name=test["id"],
        dataset_split=test["split"],
        dataset_revision=source["revision"] if test["id"] == source["id"] else None,
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=fields["test_top1"],
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
