"""A bundle: what of a folder is published, its card, and which files of an older version have to go; no network."""

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
"""Files that say what a repo of ours holds, and how they are read."""
_SHARD = re.compile(r"(data|views)/train-.+", re.DOTALL)  # as the globs in `configs:` match
_SMALL = (".json", ".yaml")
"""Files whose content is held in memory, and sent inside the commit; the others are sent before it, one by one."""
_PICTURES = ("assets/grid.png", "assets/diversity.png")


@dataclass(frozen=True, eq=False)
class Entry:
    """One file to publish, as it was when it was checked."""

    source: Path | bytes  # where it lies, or the content itself: small files are held, so that nobody can change them
    sha256: str

    def intact(self) -> bool:
        """Whether the file still has that content."""
        return isinstance(self.source, bytes) or sha256_of(self.source) == self.sha256

    def equal(self, listed: RepoFile) -> bool:
        """Whether a file on the Hub has this content."""
        if listed.lfs is not None:
            return listed.lfs.sha256 == self.sha256
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return listed.blob_id == sha.git_hash(content)


@dataclass(frozen=True, eq=False)
class Bundle:
    """A publication."""

    kind: Kind
    name: str  # what it is a version of, the title of its facts
    files: Mapping[str, Entry]  # by path in the repo, README.md aside
    readme: Callable[[str, str | None], str]  # (repo id, branch or `None`) -> the generated card
    owned_keys: Collection[str]  # keys of the card's header that are ours alone


def bundle_of(folder: Path, *, dataset_id: str | None = None) -> Bundle:
    """A dataset folder, or the folder of a network (of a student that learned from the dataset `dataset_id`), checked.

    Raises:
        HubError: It is neither, cannot be read, or is a dataset that differs from its provenance.json.
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
        f"{str(folder)!r} holds nothing to push: expected a dataset (provenance.json, data/, views/) or a network "
        f"(model.safetensors with {' or '.join(MODEL_FACTS)})"
    )


def _dataset(folder: Path) -> Bundle:
    held = _own(folder, Provenance.FILE).read_bytes()
    differences = check_folder(folder).differences
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise HubError(f"{str(folder)!r} is not what was packaged: {differences[0]}{more}; run --stage package again")
    provenance = read_provenance(folder / Provenance.FILE)
    card = _own(folder, "README.md").read_text(encoding="utf-8")
    listed = [*provenance.files, Provenance.FILE, *(path for path in _PICTURES if (folder / path).is_file())]
    files = {path: _entry(folder, path) for path in listed}
    # Between the check and now somebody may have packaged anew.
    changed = [path for path, entry in provenance.files.items() if files[path].sha256 != entry.sha256]
    if changed or files[Provenance.FILE].source != held:
        raise HubError(f"{str(folder)!r} is being written just now ({[*changed, Provenance.FILE][0]}); push again later")
    readme = partial(address_card, card, provenance.recipe)
    return Bundle("dataset", provenance.title, files, readme, owned_keys=METADATA_KEYS)


def _model(folder: Path, dataset_id: str | None) -> Bundle:
    facts_file = next(name for name in MODEL_FACTS if (folder / name).is_file())
    files = {path: _entry(folder, path) for path in ("config.json", "model.safetensors", facts_file)}
    readme = partial(render_model_card, folder, dataset_id=dataset_id)
    readme("org/name")  # what is wrong with it is told before any request
    return Bundle("model", read_facts(folder).title, files, readme, owned_keys=MODEL_METADATA_KEYS)


def _entry(folder: Path, path: str) -> Entry:
    """A listed file of the folder."""
    local = _own(folder, path)
    if not path.endswith(_SMALL):
        return Entry(local, sha256_of(local))
    content = local.read_bytes()
    return Entry(content, hashlib.sha256(content).hexdigest())


def _own(folder: Path, path: str) -> Path:
    """The path of a file inside the folder: a link could publish anything that the user can read."""
    inner = [path, *map(str, PurePosixPath(path).parents)][:-1]  # the last one is the folder itself
    if not is_plain_path(path) or any((folder / part).is_symlink() for part in inner):
        raise HubError(f"{path[:80]!r} in {str(folder)!r} leads out of the folder; put the file itself there")
    return folder / path


def name_in(label: str, content: bytes) -> str | None:
    """What a repo holds a version of, by the content of its label file; `None` if that is not ours."""
    try:
        return LABELS[label].parse(content, label).title
    except ValueError:
        return None


def stale(bundle: Bundle, paths: Collection[str]) -> list[str]:
    """Those files of a repo that have no place in the new version; what others put beside ours stays.

    All that the card's `configs:` would mix in, pictures of ours, and the facts of another kind of network.
    """
    gone = [path for path in sorted(paths) if path not in bundle.files]
    if bundle.kind == "model":
        return [path for path in gone if path in MODEL_FACTS]
    return [path for path in gone if path in _PICTURES or _SHARD.fullmatch(path)]
