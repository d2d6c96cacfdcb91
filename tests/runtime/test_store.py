import json
import os
import shutil
import signal
import stat
import sys

import pytest
from pipeline import file_limit, mtimes, one_line, sha_tree

from prism_hf.errors import DamagedError, OutputError
from prism_hf.runtime.store import (
    Artifact,
    Proof,
    clear_drafts,
    digest,
    draft_folder,
    folder_state,
    is_finished,
    read_proof,
    restore_swapped,
    seal_of,
    set_aside,
    sha256_of,
    sound_or_aside,
    swap_folder,
    write_bytes,
    write_json,
    write_whole,
)


def keep(path, data, key="this", **notes):
    Artifact(path, key).write(lambda draft: draft.write_bytes(data), notes)
    return path


def check(path, key="this"):
    return Artifact(path, key).check()


def names(folder):
    return sorted(os.listdir(folder))


def test_bytes_are_written_completely_in_new_folders_without_a_draft(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file.bin"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")

    def fail(draft):
        draft.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_json_keeps_unicode_and_refuses_non_finite_numbers(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"name": "鹤", "values": [1, 2.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "鹤", "values": [1, 2.5, None]}
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8"))["name"] == "鹤"


def test_sha256_of_known_bytes(tmp_path):
    write_bytes(tmp_path / "abc", b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# -- a disk that is full, a process that is killed ----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 500, 999])
def test_a_full_disk_gives_a_one_line_error_and_keeps_the_old_file(tmp_path, limit):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    with file_limit(limit), pytest.raises(OutputError) as error:
        write_bytes(path, b"n" * 1000)
    assert str(path) in one_line(error)
    assert "free some disk space and run the same command again" in one_line(error)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("limit", [0, 5, 10, 100, 200])
def test_a_full_disk_keeps_the_old_file_and_its_seal(tmp_path, limit):
    """From 10 on, the file itself fits and only its seal does not."""
    path = keep(tmp_path / "file.bin", b"old", number=1)
    with file_limit(limit), pytest.raises(OutputError) as error:
        keep(path, b"n" * 10, number=2)
    assert "free some disk space" in one_line(error)
    assert check(path).notes == {"number": 1}
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin", "file.bin.seal"]


def test_an_unwritable_path_gives_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for attempt in (lambda p: write_bytes(p, b"x"), lambda p: keep(p, b"x"), draft_folder):
        with pytest.raises(OutputError) as error:
            attempt(tmp_path / "file" / "below")
        assert "make it writable, or use another folder" in one_line(error)


def killed_at(number, act):
    """Run `act` in a process that is killed at its n-th disk operation; return whether it was killed."""
    child = os.fork()
    if not child:
        left = [number]

        def hook(event, args):
            if event in ("open", "os.rename", "os.remove", "os.chmod"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_process_killed_at_any_moment_leaves_a_complete_file_or_none(tmp_path):
    seen, number = set(), 0
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        path = keep(folder / "file.bin", b"old", version=1)
        killed = killed_at(number, lambda path=path: keep(path, b"new", version=2))
        if is_finished(path):
            version = check(path).notes["version"]
            assert path.read_bytes() == {1: b"old", 2: b"new"}[version]
            seen.add(version)
        else:
            seen.add("not written")
        clear_drafts(folder)
        assert set(names(folder)) <= {"file.bin", "file.bin.seal"}
        if not killed:
            break
        number += 1
    assert seen == {1, 2, "not written"}
    assert number > 5


def test_a_file_without_its_seal_counts_as_not_written(tmp_path):
    path = keep(tmp_path / "file.bin", b"data")
    seal_of(path).unlink()
    assert not is_finished(path)
    assert not Artifact(path, "this").is_whole()
    assert path.read_bytes() == b"data", "the file is kept until it is written again"
    with pytest.raises(DamagedError):
        check(path)


# -- changes after a file was written -------------------------------------------------------------------------------------


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit_seal(path):
    text = seal_of(path).read_text()
    assert '"number": 1' in text
    seal_of(path).write_text(text.replace('"number": 1', '"number": 2'))


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "one bit": flip,
    "first bit": lambda path: flip(path, 0),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "foreign": lambda path: path.write_bytes(b"other data of the same length."[: path.stat().st_size]),
    "seal edited": edit_seal,
    "seal removed": lambda path: seal_of(path).unlink(),
    "seal truncated": lambda path: seal_of(path).write_bytes(seal_of(path).read_bytes()[:-20]),
    "seal emptied": lambda path: seal_of(path).write_bytes(b""),
    "seal garbage": lambda path: seal_of(path).write_bytes(b"\xff\x00garbage"),
    "seal a list": lambda path: seal_of(path).write_text("[1]"),
    "seal of another": lambda path: shutil.copy(seal_of(path.with_name("other")), seal_of(path)),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damage_is_detected_and_the_file_is_named(tmp_path, kind):
    path = keep(tmp_path / "file.bin", b"the data of a file", number=1)
    keep(tmp_path / "other", b"the data of another", number=1)
    assert check(path) == read_proof(path) == Proof("this", sha256_of(path), 18, {"number": 1})
    DAMAGE[kind](path)
    with pytest.raises(DamagedError) as error:
        check(path)
    assert str(path) in one_line(error)


def test_a_later_change_that_keeps_size_and_seal_is_detected(tmp_path):
    """A file that was checked before is read again only after its time has changed."""
    path = keep(tmp_path / "file.bin", b"data")
    check(path)
    flip(path)
    stat_ = path.stat()
    os.utime(path, ns=(stat_.st_atime_ns, stat_.st_mtime_ns + 1))
    with pytest.raises(DamagedError, match="changed after it was written"):
        check(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"top1": 0.5}', '{"top1": 0.6}\n'])
def test_json_is_read_back_only_if_unchanged(tmp_path, text):
    score = Artifact(tmp_path / "score.json", "鹤")
    score.write_json({"top1": 0.5})
    assert score.read_json() == {"top1": 0.5}
    with pytest.raises(ValueError, match="JSON compliant"):
        score.write_json({"top1": float("nan")})
    assert score.read_json() == {"top1": 0.5}
    score.path.write_text(text)
    with pytest.raises(DamagedError) as error:
        score.read_json()
    assert str(score.path) in one_line(error)


def test_equal_values_have_equal_digests():
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_notes_of_a_seal_are_plain_and_finite(tmp_path):
    path = keep(tmp_path / "file.bin", b"data", shape=(1, 2))
    assert read_proof(path).notes == {"shape": [1, 2]}
    with pytest.raises(ValueError, match="JSON compliant"):
        keep(path, b"new", loss=float("nan"))
    assert check(path).notes == {"shape": [1, 2]}


def test_the_seal_of_an_earlier_version_is_read(tmp_path):
    """The test writes the seal as that version did, with the key among the notes."""
    path = tmp_path / "job-00003.safetensors"
    path.write_bytes(b"images")
    notes = {"key": "0123456789abcdef/3", "job": 3, "logit_top1": 0.5, "history": [{"step": 1, "ce": 0.25}]}
    facts = {"file_sha256": sha256_of(path), "bytes": 6, "notes": notes}
    seal = {**facts, "sha256": digest(facts)}
    seal_of(path).write_text(json.dumps(seal, indent=2) + "\n")
    proof = check(path, "0123456789abcdef/3")
    assert proof.key == "0123456789abcdef/3"
    assert proof.notes == {"job": 3, "logit_top1": 0.5, "history": [{"step": 1, "ce": 0.25}]}
    before = seal_of(path).read_text()
    keep(path, b"images", "0123456789abcdef/3", **proof.notes)
    assert json.loads(seal_of(path).read_text()) == json.loads(before), "this version writes the same bytes"


@pytest.mark.parametrize("kind", ["absent", "unsealed", "damaged", "foreign", "good"])
def test_a_whole_file_is_finished_unchanged_and_made_from_the_same_inputs(tmp_path, caplog, kind):
    path = tmp_path / "a.bin"
    if kind != "absent":
        keep(path, b"good", key="other" if kind == "foreign" else "this")
    if kind == "unsealed":
        seal_of(path).unlink()
    if kind == "damaged":
        path.write_bytes(b"baad")
    assert Artifact(path, "this").is_whole() == (kind == "good")
    aside = kind in ("damaged", "foreign")
    assert (tmp_path / "a.bin.aside-1").is_file() == aside
    assert ("a.bin.aside-1" in caplog.text) == aside
    assert ("a.bin was made from another recipe, or from other data" in caplog.text) == (kind == "foreign")


def test_a_file_is_removed_with_its_seal(tmp_path):
    file = Artifact(keep(tmp_path / "file.bin", b"data"), "this")
    file.remove()
    file.remove()
    assert names(tmp_path) == []


def test_a_folder_that_fails_its_check_is_set_aside(tmp_path, caplog):
    folder = tmp_path / "teacher"
    write_bytes(folder / "weights", b"x")
    assert sound_or_aside(folder, lambda: 7) == 7

    def damaged():
        raise DamagedError("weights are not readable")

    assert sound_or_aside(folder, damaged) is None
    assert caplog.messages == ["weights are not readable; set aside as teacher.aside-1, to be recreated"]
    assert (tmp_path / "teacher.aside-1" / "weights").read_bytes() == b"x"
    assert not folder.exists()


# -- setting aside and replacing ------------------------------------------------------------------------------------------


def test_setting_aside_never_overwrites_anything(tmp_path):
    path, contents = tmp_path / "file.bin", []
    for number in range(1, 4):
        keep(path, b"%d" % number, number=number)
        if number == 2:
            path.unlink()  # only the seal remains
        aside = set_aside(path)
        assert aside.name == f"file.bin.aside-{number}"
        assert not path.exists()
        assert not is_finished(path)
        contents.append(read_proof(aside).notes["number"])
    assert [read_proof(tmp_path / f"file.bin.aside-{n}").notes["number"] for n in (1, 2, 3)] == contents == [1, 2, 3]
    assert check(tmp_path / "file.bin.aside-3")


def test_folders_are_set_aside_too(tmp_path):
    folder = tmp_path / "run"
    write_bytes(folder / "a" / "b", b"x")
    before = sha_tree(folder)
    assert sha_tree(set_aside(folder)) == before
    assert not folder.exists()


def test_a_folder_replaces_another(tmp_path):
    folder = tmp_path / "data"
    for text in (b"old", b"new"):
        draft = draft_folder(folder)
        write_bytes(draft / "a" / "file", text)
        swap_folder(draft, folder)
        assert (folder / "a" / "file").read_bytes() == text
        assert names(tmp_path) == ["data"]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_draft_that_cannot_be_moved_leaves_the_old_folder_unchanged(tmp_path):
    folder = tmp_path / "data"
    write_bytes(folder / "a" / "file", b"old")
    before = mtimes(folder)
    draft = draft_folder(folder)
    draft.rmdir()
    with pytest.raises(OutputError) as error:
        swap_folder(draft, folder)
    assert str(folder) in one_line(error)
    assert mtimes(folder) == before
    assert names(tmp_path) == ["data"]


def test_a_folder_moved_away_by_a_killed_process_is_restored(tmp_path):
    folder = tmp_path / "data"
    write_bytes(folder / "file", b"old")
    draft = draft_folder(folder)
    os.replace(folder, draft.with_name(f"{draft.name}-old"))
    restore_swapped(folder)
    assert (folder / "file").read_bytes() == b"old"
    write_bytes(draft.with_name(f"{draft.name}-old") / "file", b"older")
    restore_swapped(folder)
    assert (folder / "file").read_bytes() == b"old", "an existing folder is kept"


def test_only_drafts_are_cleared(tmp_path):
    for name in ("data/file", ".hidden", "a.draft-b", "draft-x", "deep/down/kept"):
        write_bytes(tmp_path / name, b"x")
    before = sha_tree(tmp_path)
    write_bytes(draft_folder(tmp_path / "data") / "half", b"x")
    write_bytes(draft_folder(tmp_path / "other") / "half", b"x")
    (tmp_path / "deep" / "down" / ".draft-kept-abc").write_bytes(b"x")
    assert clear_drafts(tmp_path, of="other", deep=False) == 1
    assert clear_drafts(tmp_path, deep=False) == 1
    assert clear_drafts(tmp_path) == 1
    assert clear_drafts(tmp_path) == clear_drafts(tmp_path / "nowhere") == 0
    assert sha_tree(tmp_path) == before


def test_a_draft_that_is_a_link_is_removed_without_its_target(tmp_path):
    write_bytes(tmp_path / "precious" / "file", b"x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".draft-link").symlink_to(tmp_path / "precious")
    assert clear_drafts(tmp_path / "run") == 1
    assert (tmp_path / "precious" / "file").read_bytes() == b"x"


def test_the_state_of_a_folder_changes_with_its_files(tmp_path):
    write_bytes(tmp_path / "a", b"x")
    before = folder_state(tmp_path)
    assert folder_state(tmp_path) == before
    write_bytes(tmp_path / "a", b"xy")
    assert folder_state(tmp_path) != before
