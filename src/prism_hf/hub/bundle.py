"""Bundles: the files to publish from a folder, the card, and the outdated files to delete; no network access."""

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from ..dataset import Provenance, check_folder, read_provenance
from ..errors import HubError
from ..models import StudentFacts, TeacherFacts, read_facts
from ..runtime import is_plain_path, sha256_of
from .dataset_card import METADATA_KEYS, address_card
from .model_card import MODEL_METADATA_KEYS, render_model_card

Kind = Literal["dataset", "model"]
MODEL_FACTS = (TeacherFacts.FILE, StudentFacts.FILE)
LABELS: Mapping[str, type[Provenance | TeacherFacts | StudentFacts]] = {
    facts.FILE: facts for facts in (Provenance, TeacherFacts, StudentFacts)
}
"""The files that tell what a repo made by prism-hf contains, and the classes that read them."""
_SHARD = re.compile(r"(data|views)/train-.+", re.DOTALL)  # matches what the globs in `configs:` match
_SMALL = (".json", ".yaml")
"""Files that are kept in memory and sent inside the commit; all others are uploaded before it, one by one."""
_PICTURES = ("assets/grid.png", "assets/diversity.png")


@dataclass(frozen=True, eq=False)
class Entry:
    """A file to publish, with the content that was checked."""

    source: Path | bytes  # its path; for a small file the content itself, so that it cannot change after the check
    sha256: str

    def intact(self) -> bool:
        """Return whether the file still has the checked content."""
        return isinstance(self.source, bytes) or sha256_of(self.source) == self.sha256

    def equal(self, listed: RepoFile) -> bool:
        """Return whether a file on the Hub has the same content."""
        if listed.lfs is not None:
            return listed.lfs.sha256 == self.sha256
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return listed.blob_id == sha.git_hash(content)


@dataclass(frozen=True, eq=False)
class Bundle:
    """Everything that one push publishes."""

    kind: Kind
    name: str  # the title in its facts: a repo may hold versions of one name only
    files: Mapping[str, Entry]  # by path in the repo, without README.md
    readme: Callable[[str, str | None], str]  # (repo id, branch or `None`) -> the generated card
    owned_keys: Collection[str]  # header keys of the card that only prism-hf may set


def bundle_of(folder: Path, *, dataset_id: str | None = None) -> Bundle:
    """Check a dataset or model folder and return its bundle (`dataset_id`: the Hub id of a student's training data).

    Raises:
        HubError: The folder is neither, cannot be read, or is a dataset that differs from its provenance.json.
    """
    try:
        if (folder / Provenance.FILE).is_file():
            return _dataset(folder)
        if (folder / "model.safetensors").is_file() and any((folder / name).is_file() for name in MODEL_FACTS):
            return _model(folder, dataset_id)
    except OSError as error:
        raise HubError(f"{str(error.filename or folder)!r} cannot be read ({error.strerror or error})") from error
    if (folder / "dataset" / Provenance.FILE).is_file():
        raise HubError(f"{str(folder)!r} is a run folder; push its dataset, {str(folder / 'dataset')!r}")
    raise HubError(
        f"{str(folder)!r} has nothing to push: expected a dataset (provenance.json, data/, views/) or a network "
        f"(model.safetensors with {' or '.join(MODEL_FACTS)})"
    )


def _dataset(folder: Path) -> Bundle:
    checked = _path_inside(folder, Provenance.FILE).read_bytes()
    differences = check_folder(folder).differences
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise HubError(f"{str(folder)!r} is not what was packaged: {differences[0]}{more}; run --stage package again")
    provenance = read_provenance(folder / Provenance.FILE)
    card = _path_inside(folder, "README.md").read_text(encoding="utf-8")
    listed = [*provenance.files, Provenance.FILE, *(path for path in _PICTURES if (folder / path).is_file())]
    files = {path: _entry(folder, path) for path in listed}
    # Another process may have packaged the dataset again since the check.
    changed = [path for path, entry in provenance.files.items() if files[path].sha256 != entry.sha256]
    if changed or files[Provenance.FILE].source != checked:
        raise HubError(f"{str(folder)!r} is being written right now ({[*changed, Provenance.FILE][0]}); push again later")
    readme = partial(address_card, card, provenance.recipe)
    return Bundle("dataset", provenance.title, files, readme, owned_keys=METADATA_KEYS)


def _model(folder: Path, dataset_id: str | None) -> Bundle:
    facts_file = next(name for name in MODEL_FACTS if (folder / name).is_file())
    files = {path: _entry(folder, path) for path in ("config.json", "model.safetensors", facts_file)}
    readme = partial(render_model_card, folder, dataset_id=dataset_id)
    readme("org/name")  # report problems before the first request
    return Bundle("model", read_facts(folder).title, files, readme, owned_keys=MODEL_METADATA_KEYS)


def _entry(folder: Path, path: str) -> Entry:
    """Return the entry of a file in the folder."""
    local = _path_inside(folder, path)
    if not path.endswith(_SMALL):
        return Entry(local, sha256_of(local))
    content = local.read_bytes()
    return Entry(content, hashlib.sha256(content).hexdigest())


def _path_inside(folder: Path, path: str) -> Path:
    """Return the path of a file in the folder; refuse links, which could publish any file that the user can read."""
    inner = [path, *map(str, PurePosixPath(path).parents)][:-1]  # without the last one, the folder itself
    if not is_plain_path(path) or any((folder / part).is_symlink() for part in inner):
        raise HubError(f"{path[:80]!r} in {str(folder)!r} leads out of the folder; put the file itself there")
    return folder / path


def name_in(label: str, content: bytes) -> str | None:
    """Return the title in the label file of a repo, or `None` if prism-hf did not write that file."""
    try:
        return LABELS[label].parse(content, label).title
    except ValueError:
        return None


def stale(bundle: Bundle, paths: Collection[str]) -> list[str]:
    """Return the files of a repo that the new version has to delete; files that other people added stay.

    These are tables that match the card's `configs:`, our pictures, and the facts file of the other kind of network.
    """
    unlisted = [path for path in sorted(paths) if path not in bundle.files]
    if bundle.kind == "model":
        return [path for path in unlisted if path in MODEL_FACTS]
    return [path for path in unlisted if path in _PICTURES or _SHARD.fullmatch(path)]
