"""What a shared network says about itself: a model card, rendered strictly from its folder; pure, no network.

Text from outside (class names, data set ids, licences) is escaped as in the data set's card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment, StrictUndefined

from ..errors import HubError
from ..models.folder import KINDS
from ..runtime.plain_yaml import dump_yaml
from .dataset_card import escape, escape_all, licence_keys, slug

MODEL_METADATA_KEYS = (
    "license", "license_name", "library_name", "pipeline_tag", "tags", "datasets", "model-index",
)  # fmt: skip
"""Everything that may stand in the YAML header; a key outside is an error."""

_CONFIG_KEYS = (
    "architecture",
    "label_names",
    *(f"pretrained_cfg.{key}" for key in ("input_size", "mean", "std", "license")),
)
_FACTS_KEYS = {
    "teacher": ("test_top1", "source.id", "source.on_hub", "source.revision", "source.licence", "test.id", "test.split"),
    "student": (
        "architecture", "labels", "seed", "epochs", "test_top1", "test_count", "channels", "dataset.name", "dataset.images",
        "dataset.hub_id", "source.id", "source.on_hub", "source.revision", "source.licence", "test.id", "test.split",
    ),
}  # fmt: skip


def render_model_card(folder: Path, *, repo_id: str, dataset_id: str | None = None, revision: str | None = None) -> str:
    """The card, README.md of a model repo.

    Args:
        folder: A model folder; see `model_folder.store_network`.
        repo_id: Hub id under which the network is shared.
        dataset_id: Hub id of the distilled data set, if a student's facts do not know it yet.
        revision: Branch, unless it is the main one: the lines that load the network then name it.

    Raises:
        HubError: A file is missing, incomplete or names a local path (it is named), or an id is no Hub id.

    Example:
        >>> render_model_card(run.folder / "student", repo_id="org/name").startswith("---")
        True
    """
    for given in (repo_id, dataset_id):
        if given is not None and not _is_hub_id(given):
            raise HubError(f"{given!r} is no Hub id; expected NAMESPACE/NAME of letters, digits, dots, dashes, underscores")
    config = _read_config(folder / "config.json")
    facts_file, facts = _read_facts(folder, config)
    if facts["kind"] == "student":
        facts["dataset"] = {**facts["dataset"], "hub_id": dataset_id or facts["dataset"]["hub_id"]}
    header = dump_yaml(_metadata(facts, repo_id))
    return f"---\n{header}---\n\n{_body(facts, config, repo_id, facts_file, revision)}"


def _body(facts: Mapping[str, Any], config: Mapping[str, Any], repo_id: str, facts_file: str, revision: str | None) -> str:
    template = files("prism_hf.hub").joinpath("templates/model_card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["or_dash"] = lambda value: "-" if value is None else value
    dataset, cfg = facts.get("dataset", {}), config["pretrained_cfg"]
    page = environment.from_string(template)
    return page.render(
        name=escape(repo_id.rpartition("/")[2]),
        repo_id=repo_id,  # safe as it is, inside code too: a checked Hub id, and a checked branch
        revision=revision,
        facts_file=facts_file,
        f=escape_all(facts),
        at=f" (revision {escape(facts['source']['revision'])})" if facts["source"]["revision"] else "",
        dataset=escape(dataset.get("hub_id") or dataset.get("name") or "without a name"),
        size=cfg["input_size"][-1],
        mean=", ".join(f"{value:g}" for value in cfg["mean"]),
        std=", ".join(f"{value:g}" for value in cfg["std"]),
        class_names=[escape(name) for name in config["label_names"][:20]],
        class_count=len(config["label_names"]),
    )


def _metadata(facts: Mapping[str, Any], repo_id: str) -> dict[str, Any]:
    """The YAML header, from an allow-list; the accuracy on the real test part stands in `model-index`."""
    source = facts["source"]
    licence = licence_keys(str(source["licence"]))
    trained_on = [facts.get("dataset", {}).get("hub_id"), source["id"] if source["on_hub"] else None]
    data = ModelCardData(
        license=licence["license"],
        license_name=licence["license_name"],
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "dataset-distillation", "prism-hf"],
        datasets=[name for name in trained_on if name is not None and _is_hub_id(name)] or None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=[_result(facts)],
    )
    # Through JSON: plain types only, whatever the library put into its classes.
    values: dict[str, Any] = json.loads(json.dumps(data.to_dict()))
    extra = set(values) - set(MODEL_METADATA_KEYS)
    if extra:
        raise ValueError(f"metadata keys {sorted(extra)} are not in the allow-list")
    return {key: values[key] for key in MODEL_METADATA_KEYS if key in values}


def _result(facts: Mapping[str, Any]) -> EvalResult:
    test, source = facts["test"], facts["source"]
    return EvalResult(
        task_type="image-classification",
        dataset_type=str(test["id"]) if _is_hub_id(test["id"]) else slug(str(test["id"])),
        dataset_name=str(test["id"]),
        dataset_split=test["split"],
        dataset_revision=source.get("revision") if test["id"] == source["id"] else None,
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=facts["test_top1"],
    )


def _read_config(path: Path) -> dict[str, Any]:
    config = _read(path, _CONFIG_KEYS)
    cfg, names = config["pretrained_cfg"], config["label_names"]
    numbers = [cfg[key] for key in ("input_size", "mean", "std")]
    if not all(isinstance(triple, list) and len(triple) == 3 and all(map(_is_number, triple)) for triple in numbers):
        raise HubError(f"{path}: input_size, mean and std are expected to be three numbers each")
    if not isinstance(names, list):
        raise HubError(f"{path}: label_names is no list; it is not what prism-hf wrote")
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_facts(folder: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and contents of the facts file, with `None` for what older versions did not write of a teacher."""
    path = next((path for path in (folder / f"{name}.json" for name in KINDS) if path.is_file()), None)
    if path is None:
        raise HubError(
            f"{str(folder)!r} has no {' and no '.join(f'{name}.json' for name in KINDS)}: its network is unknown"
        )
    facts = _read(path)
    if KINDS[path.stem] == "teacher":
        facts = _older_teacher(config, facts.get("settings")) | facts
    facts["kind"] = KINDS[path.stem]
    _require(facts, _FACTS_KEYS[facts["kind"]], path)
    top1 = facts["test_top1"]
    if not _is_number(top1) or not 0 <= top1 <= 1:
        raise HubError(f"{path}: test_top1 is {top1!r}, expected a share between 0 and 1")
    for text in _texts(facts):
        if Path(text).is_absolute():
            raise HubError(f"{path} names the local path {text!r}; cut it to its last part before the network is shared")
    return path.name, facts


def _older_teacher(config: Mapping[str, Any], settings: object) -> dict[str, Any]:
    known = settings if isinstance(settings, Mapping) else {}
    data = str(known.get("data", "unknown"))
    return {
        "architecture": config["architecture"],
        "seed": known.get("seed"),
        "epochs": known.get("epochs"),
        "channels": None,
        "train_count": None,
        "test_count": None,
        "source": {"id": data, "on_hub": False, "revision": None, "licence": config["pretrained_cfg"]["license"]},
        "test": {"id": data, "split": None},
    }


def _read(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HubError(f"{path} is missing; a shared network needs it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise HubError(f"{path} cannot be read ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(values, dict):
        raise HubError(f"{path} holds no JSON object")
    _require(values, keys, path)
    return values


def _require(values: Mapping[str, Any], keys: Sequence[str], path: Path) -> None:
    for key in keys:
        place: Any = values
        for part in key.split("."):
            if not isinstance(place, Mapping) or part not in place:
                raise HubError(f"{path} has no {key!r}; it is not what prism-hf wrote")
            place = place[part]


def _texts(value: object) -> list[str]:
    """All strings inside plain JSON."""
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _is_hub_id(text: object) -> bool:
    try:
        validate_repo_id(text)  # type: ignore[arg-type]
    except HFValidationError:
        return False
    return True
