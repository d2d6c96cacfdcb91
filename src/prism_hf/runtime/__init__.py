"""Infrastructure of long jobs: atomic files, checkpoints, locks, signals, logs, Hub client. Nothing specific to images.

Names from modules that load torch, accelerate or huggingface_hub are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .alive import watching
from .facts import Facts
from .lock import HOLDER, LOCK, check_free, holder_of, holder_text, is_held, locked, waited_for
from .logs import log_file
from .memory import told_in_one_line
from .plain_yaml import YamlError, dump_yaml, read_yaml
from .processes import best_processes, in_processes
from .seeds import derived_seed
from .stop import EVERY_S, is_first_process, leave_at_once, raise_if_stopped, stopping_cleanly
from .store import (
    DRAFT,
    Artifact,
    clear_drafts,
    digest,
    draft_folder,
    files_below,
    folder_state,
    is_finished,
    read_json,
    read_proof,
    restore_swapped,
    set_aside,
    sha256_of,
    sound_or_aside,
    swap_folder,
    write_bytes,
    write_json,
    write_whole,
    writing,
)
from .units import count_text, duration_text, size_text
from .untrusted import (
    folder_or_hub_id,
    foreign_files,
    homes_of,
    is_inside,
    is_plain_path,
    local_folder,
    map_texts,
    read_card,
    stray_link,
    texts_in,
    visible,
    visible_entries,
    without_password,
)

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, State
    from .graphs import Replayed
    from .hub_client import BRIEF, PAUSES, SHORT, UNREACHABLE, again, explain, hub_name
    from .share_loop import Progress, deal, share, unfinished
    from .tensors import open_rows, read_row, read_tensors, to_device, write_rows, write_tensors

_LATER = {
    "checkpoint": "Checkpoint State",
    "graphs": "Replayed",
    "hub_client": "BRIEF PAUSES SHORT UNREACHABLE again explain hub_name",
    "share_loop": "Progress deal share unfinished",
    "tensors": "open_rows read_row read_tensors to_device write_rows write_tensors",
}


def __getattr__(name: str) -> object:
    for module, names in _LATER.items():
        if name in names.split():
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
