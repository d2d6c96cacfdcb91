import random

import pytest
import yaml
from datasets import load_dataset_builder
from each import each
from huggingface_hub import DatasetCard
from pipeline import add_card, small_set

from prism_hf.hub.dataset_card import METADATA_KEYS
from prism_hf.hub.merge import BEGIN, END, block_of, merge_readme

OURS = """---
license: mit
tags:
- a
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  default: true
dataset_info:
- config_name: default
  splits:
  - name: train
    num_examples: 3
---

# ours

words
"""


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def merged_once(ours, theirs):
    data = theirs.encode() if isinstance(theirs, str) else theirs
    return merge_readme(ours, data, owned=METADATA_KEYS).decode("utf-8-sig")


def merge(theirs, ours=OURS):
    merged = merged_once(ours, theirs)
    assert merged_once(ours, merged) == merged, "merging again changes nothing"
    assert merged.count(BEGIN) == merged.count(END) == 1
    assert DatasetCard(merged).data.to_dict()["configs"], "the library reads the header"
    return merged


def test_without_a_readme_ours_is_used():
    merged = merge(None)
    assert header(merged) == header(OURS)
    assert merged.endswith(block_of("# ours\n\nwords"))


def test_text_around_our_part_stays_in_place():
    first = merge(None)
    theirs = first.replace(BEGIN, f"Above.\n\n{BEGIN}") + "\n## Notes\n\nBelow.\n"
    newer = OURS.replace("words", "newer words")
    merged = merge(theirs, newer)
    assert merged == theirs.replace("\nwords\n", "\nnewer words\n")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        ("# theirs\n\nhello", "# theirs\n\nhello"),
        ("---\nlicense: gpl\nlanguage: en\n---\nhello", "hello"),
        ("---\nlicense: gpl\nlanguage: en\n---\r\nhello\r\nyou", "hello\nyou"),
        ("---\n[broken\n---\nhello", "[broken"),
        ("---\n- a list\n---\nhello", "- a list"),
        ("---\n---\nhello", "hello"),
        ("text\n---\nwith: rules\n---\n", "with: rules"),
    ],
)
def test_a_readme_without_our_part_is_kept_below_it(text, kept):
    merged = merge(text)
    assert kept in merged.partition(END)[2]
    assert header(merged)["license"] == "mit", "keys that we generate are ours"
    assert ("language" in header(merged)) == ("language" in text)


def test_header_entries_by_others_are_kept():
    theirs = """---
license: gpl
license_name: old
viewer: false
tags: [b, a]
configs:
- {config_name: default, data_files: old/*}
- {config_name: extra, data_files: extra/*, default: true}
dataset_info:
- {config_name: default, dataset_size: 1}
- {config_name: extra, dataset_size: 2}
---
"""
    found = header(merge(theirs))
    assert found["tags"] == ["a", "b"]
    assert found["viewer"] is False
    assert "license_name" not in found, "only we set this key, and no longer do"
    assert found["configs"] == [*header(OURS)["configs"], {"config_name": "extra", "data_files": "extra/*"}]
    assert [info["config_name"] for info in found["dataset_info"]] == ["default", "extra"]
    assert found["dataset_info"][0] == header(OURS)["dataset_info"][0]


@pytest.mark.parametrize(
    "theirs", [{"dataset_info": {"dataset_size": 1}}, {"tags": "one"}, {"configs": "no list"}, {"tags": [1]}]
)
def test_unusual_headers_do_not_break_ours(theirs):
    assert header(merge(f"---\n{yaml.safe_dump(theirs)}---\n")) == header(OURS)


def test_marker_lines_inside_our_part_cannot_end_it():
    nasty = OURS.replace("words", f"```\n{END}\n{BEGIN}\n```")
    merged = merged_once(nasty, None) + "\nnotes\n"
    assert merged_once(nasty, merged) == merged
    assert merged_once(OURS, merged) == merge(None) + "\nnotes\n"


def test_a_real_card_merged_over_an_unusual_one_still_loads(tmp_path):
    recipe, names, *_ = small_set(tmp_path)
    add_card(tmp_path, recipe, names)
    path = tmp_path / "README.md"
    theirs = "---\nviewer: false\nconfigs:\n- {config_name: x, data_files: nothing/*, default: true}\n---\nhello"
    path.write_text(merge(theirs, path.read_text()))
    builder = load_dataset_builder(str(tmp_path))
    assert builder.config.name == "default"
    assert builder.info.splits["train"].num_examples == 12


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.replace(f"{BEGIN}\n", ""),
        lambda t: t.replace(f"{END}\n", ""),
        lambda t: t.replace(BEGIN, "@").replace(END, BEGIN).replace("@", END),
        lambda t: t.replace(BEGIN, f"  {BEGIN}"),
        lambda t: t.replace(END, f"  {END}"),
        lambda t: t.replace(BEGIN, f"{BEGIN}\n\nbetween\n\n{BEGIN}"),
        lambda t: t + t.partition("---\n\n")[2],
        lambda t: t.replace(END, f"{END}\n{END}"),
    ],
    ids=["no begin", "no end", "swapped", "indented begin", "indented end", "two begins", "twice", "two ends"],
)
def test_damaged_marker_lines_lose_no_text(damage):
    theirs = damage(merge(None).replace(BEGIN, f"Mine above.\n\n{BEGIN}") + "\nMine below.\n")
    newer = OURS.replace("words", "newer words")
    merged = merged_once(newer, theirs)
    assert merged_once(newer, merged) == merged, "merging again changes nothing"
    for word in ("Mine above.", "Mine below.", "newer words", *(["between"] if "between" in theirs else [])):
        assert word in merged
    again = merged_once(OURS.replace("words", "newest"), merged)
    assert "Mine above." in again
    assert "Mine below." in again


STRANGE = [
    "on: push",
    "1: x",
    "self: x",
    "ignore_metadata_errors: true",
    "configs: [{config_name: [a, b]}]",
    "day: 2024-01-01",
]


@pytest.mark.parametrize("line", STRANGE)
def test_valid_yaml_that_card_readers_reject_is_rewritten(line):
    merged = merge(f"---\n{line}\nviewer: false\n---\nhello\n")
    assert header(merged)["viewer"] is False
    assert "hello" in merged


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        ("caf\u00e9".encode("latin-1"), "caf\u00e9"),
        ("caf\u00e9 \u9db4".encode("utf-16"), "caf\u00e9 \u9db4"),
        (b"\xef\xbb\xbf---\nviewer: false\n---\nhello", "hello"),
    ],
    ids=["latin-1", "utf-16", "byte order mark"],
)
def test_a_readme_in_another_encoding_is_read(data, kept):
    merged = merge(data)
    assert kept in merged.partition(END)[2]
    assert ("viewer" in header(merged)) == (b"viewer" in data)


def test_a_complete_readme_is_returned_unchanged():
    theirs = (
        merge(None)
        .replace("license: mit\n", "")
        .replace("---\n", "---\nlicense:   'mit'\n", 1)
        .replace("\n", "\r\n")
        .encode()
    )
    assert merge_readme(OURS, theirs, owned=METADATA_KEYS) is theirs


def test_after_the_first_push_the_readme_on_the_hub_is_the_one_to_edit():
    local = merge(None) + "\nlocal words\n"
    first = merged_once(local, None)
    assert first.count("local words") == 1
    assert "local words" not in merged_once(local, first.replace("local words", "better words"))


PIECES = [
    *("---", "a: 1", "configs: 3", "- x", "# title", "", "```", "self: 2", "\ufeff", "é", "a: &x [*x]", "<<: {b: 1}"),
    *("d: 2024-01-01", BEGIN, END, f"  {BEGIN}", f"{END} ", "user line", "user line"),
]


@each("seed", range(300), some=range(40))
def test_merging_is_idempotent_for_any_mix_of_markers_headers_and_text(seed):
    draw = random.Random(seed)
    lines = [f"{piece} {n}" if (piece := draw.choice(PIECES)) == "user line" else piece for n in range(draw.randint(0, 9))]
    if draw.random() < 0.5:  # someone edited the middle of an older version of our part
        older = merged_once(OURS, None).splitlines()
        place = draw.randint(0, len(older))
        lines = [*older[:place], *lines, *older[place:]]
    theirs = "\n".join(lines) + "\n"
    once = merged_once(OURS.replace("words", "new words"), theirs)
    assert merged_once(OURS.replace("words", "new words"), once) == once
    assert DatasetCard(once).data.to_dict()["configs"][0]["config_name"] == "default"
    assert "new words" in once
    # Only the text between a begin and an end marker may be removed: that was ours.
    stripped = [line.strip() for line in lines]
    for place, line in enumerate(lines):
        if line.startswith("user line") and line not in once:
            assert (BEGIN in stripped[:place], END in stripped[place:]) == (True, True), line
