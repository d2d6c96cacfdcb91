import pytest
import yaml
from datasets import load_dataset_builder
from huggingface_hub import DatasetCard
from pipeline import add_card, small_set

from prism_hf.card import METADATA_KEYS
from prism_hf.readme import BEGIN, END, block_of, merge_readme

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


def merge(theirs, ours=OURS):
    merged = merge_readme(ours, theirs, owned=METADATA_KEYS)
    assert merge_readme(ours, merged, owned=METADATA_KEYS) == merged, "merging again changes nothing"
    assert merged.count(BEGIN) == merged.count(END) == 1
    assert DatasetCard(merged).data.to_dict()["configs"], "the library reads the header"
    return merged


def test_a_first_readme_is_ours():
    merged = merge(None)
    assert header(merged) == header(OURS)
    assert merged.endswith(block_of("# ours\n\nwords"))


def test_words_around_our_part_stay_where_they_are():
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


def test_header_entries_of_others_stay():
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
    assert "license_name" not in found, "ours alone, and not set any more"
    assert found["configs"] == [*header(OURS)["configs"], {"config_name": "extra", "data_files": "extra/*"}]
    assert [info["config_name"] for info in found["dataset_info"]] == ["default", "extra"]
    assert found["dataset_info"][0] == header(OURS)["dataset_info"][0]


@pytest.mark.parametrize(
    "theirs", [{"dataset_info": {"dataset_size": 1}}, {"tags": "one"}, {"configs": "no list"}, {"tags": [1]}]
)
def test_strange_headers_do_not_break_ours(theirs):
    assert header(merge(f"---\n{yaml.safe_dump(theirs)}---\n")) == header(OURS)


def test_marker_lines_inside_our_part_cannot_end_it():
    nasty = OURS.replace("words", f"```\n{END}\n{BEGIN}\n```")
    merged = merge_readme(nasty, None, owned=METADATA_KEYS) + "\nnotes\n"
    assert merge_readme(nasty, merged, owned=METADATA_KEYS) == merged
    assert merge_readme(OURS, merged, owned=METADATA_KEYS) == merge(None) + "\nnotes\n"


def test_words_written_into_the_local_file_come_along_once():
    local = merge(None).replace("Notes", "") + "\n## Mine\n\nlocal words\n"
    merged = merge_readme(local, None, owned=METADATA_KEYS)
    assert merged.count("local words") == 1
    again = merge_readme(local, merged + "\nhub words\n", owned=METADATA_KEYS)
    assert again.count("local words") == again.count("hub words") == 1


def test_a_real_card_merged_over_a_strange_one_still_loads(tmp_path):
    recipe, names, *_ = small_set(tmp_path)
    add_card(tmp_path, recipe, names)
    path = tmp_path / "README.md"
    theirs = "---\nviewer: false\nconfigs:\n- {config_name: x, data_files: nothing/*, default: true}\n---\nhello"
    path.write_text(merge(theirs, path.read_text()))
    builder = load_dataset_builder(str(tmp_path))
    assert builder.config.name == "default"
    assert builder.info.splits["train"].num_examples == 12
