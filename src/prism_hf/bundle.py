"""What of a folder is published: its files, its card, and which files of an older version have to go; no network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from .card import METADATA_KEYS, address_card
from .errors import HubError
from .model_card import MODEL_METADATA_KEYS, render_model_card
from .verification import check_folder

Kind = Literal["dataset", "model"]
MODEL_FACTS = ("squeeze.json", "student.json")
LABELS = ("provenance.json", *MODEL_FACTS)
"""Files that say what a repo of ours holds; see `name_in`."""
_SHARD = re.compile(r"(data|views)/train-[^/]*\.parquet")
_PICTURES = ("assets/grid.png", "assets/diversity.png")


@dataclass(frozen=True, eq=False)
class Bundle:
    """A publication.

    Attributes:
        kind: Of the repo.
        name: What it is a version of: the recipe's name, or the network's kind and architecture.
        files: Path in the repo -> local file, README.md aside.
        readme: (repo id, branch or `None`) -> the generated card.
        owned_keys: Keys of the card's header that are ours alone.
    """

    kind: Kind
    name: str
    files: Mapping[str, Path]
    readme: Callable[[str, str | None], str]
    owned_keys: Collection[str]


def bundle_of(folder: Path, *, dataset_id: str | None = None) -> Bundle:
    """A data set folder or a network's folder, checked.

    Args:
        folder: What a run left.
        dataset_id: Hub id of the data set that a student learned from, for its card.

    Raises:
        HubError: It is neither, or a data set that differs from its provenance.json.
    """
    if (folder / "provenance.json").is_file():
        return _dataset(folder)
    if (folder / "dataset" / "provenance.json").is_file():
        raise HubError(f"{str(folder)!r} is a run folder; push its data set, {str(folder / 'dataset')!r}")
    facts = [name for name in MODEL_FACTS if (folder / name).is_file()]
    if facts and (folder / "model.safetensors").is_file():
        return _model(folder, facts[0], dataset_id)
    raise HubError(
        f"{str(folder)!r} holds nothing to push: expected a data set (provenance.json, data/, views/) or a network "
        f"(model.safetensors with {' or '.join(MODEL_FACTS)})"
    )


def _dataset(folder: Path) -> Bundle:
    differences = check_folder(folder).differences
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise HubError(f"{str(folder)!r} is not what was packaged: {differences[0]}{more}; run --stage package again")
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    name = provenance["recipe"]
    listed = [*provenance["files"], "provenance.json", *(path for path in _PICTURES if (folder / path).is_file())]
    return Bundle(
        kind="dataset",
        name=name,
        files={path: _plain(folder, path) for path in listed},
        readme=lambda repo_id, revision: address_card(card, name, repo_id, revision),
        owned_keys=METADATA_KEYS,
    )


def _model(folder: Path, facts: str, dataset_id: str | None) -> Bundle:
    listed = ("config.json", "model.safetensors", facts)
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise HubError(f"{str(folder)!r} has no {missing[0]}; it is not a network that prism-hf stored")
    render_model_card(folder, repo_id="org/name", dataset_id=dataset_id)  # what is wrong with it is told before any request
    return Bundle(
        kind="model",
        name=_model_name(facts, (folder / facts).read_bytes()) or facts,
        files={path: _plain(folder, path) for path in listed},
        readme=lambda repo_id, revision: render_model_card(
            folder, repo_id=repo_id, dataset_id=dataset_id, revision=revision
        ),
        owned_keys=MODEL_METADATA_KEYS,
    )


def _plain(folder: Path, path: str) -> Path:
    """A listed file, inside the folder: a link could publish anything that the user can read."""
    local, pure = folder / path, PurePosixPath(path)
    parts = [folder.joinpath(*pure.parts[: i + 1]) for i in range(len(pure.parts))]
    if pure.is_absolute() or ".." in pure.parts or any(part.is_symlink() for part in parts):
        raise HubError(f"{path!r} in {str(folder)!r} leads out of the folder; put the file itself there")
    return local


def name_in(label: str, content: bytes) -> str | None:
    """What a repo holds a version of, by the content of its label file; `None` if it is not ours."""
    if label != "provenance.json":
        return _model_name(label, content)
    value = _mapping(content)
    known = isinstance(value.get("format_version"), int) and "files" in value
    return str(value["recipe"]) if known and "recipe" in value else None


def _model_name(label: str, content: bytes) -> str | None:
    facts = _mapping(content)
    if label == "squeeze.json":
        return str(facts["teacher"]) if "teacher" in facts else None
    return f"student {facts['architecture']}" if "architecture" in facts else None


def _mapping(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def stale(bundle: Bundle, there: Collection[str]) -> list[str]:
    """Files of an older version that have no place in this one.

    All tables that the card's `configs:` would mix in, and pictures of ours; what others put beside them stays.
    """
    if bundle.kind == "model":
        return []
    return sorted(path for path in there if path not in bundle.files and (_SHARD.fullmatch(path) or path in _PICTURES))
