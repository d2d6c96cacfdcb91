"""What any long job needs: whole files, checkpoints, locks, signals, logs, the Hub's client. Nothing here knows images."""

from .facts import Facts
from .lock import HOLDER, LOCK, check_free, holder_of, holder_text, is_held, locked, waited_for
from .logs import log_file
from .memory import told_in_one_line
from .plain_yaml import YamlError, dump_yaml, read_header, read_yaml
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
from .units import duration_text, size_text
from .untrusted import (
    foreign_files,
    homes_of,
    is_inside,
    is_plain_path,
    map_texts,
    read_card,
    stray_link,
    texts_in,
    visible,
    visible_entries,
    without_password,
)
