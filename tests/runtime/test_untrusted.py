import pytest

from prism_hf.runtime.plain_yaml import read_header
from prism_hf.runtime.untrusted import foreign_files, read_card


def test_a_card_is_read_like_the_library_reads_it():
    text = "---\na: yes\nb: 1e-3\n---\nwords"
    assert read_card(text) == {"a": True, "b": "1e-3"}
    assert read_header(text) == {"a": "yes", "b": 0.001}
    assert read_card("words") == {}


@pytest.mark.parametrize(
    "header",
    ["a: 2024-99-99", "- a", "self: 1", "a: [", "a: &a [x]\nb: [" + "*a, " * 17 + "]"],
    ids=["a date", "a list", "a name of the library", "broken", "aliases"],
)
def test_a_card_without_a_readable_header_gives_a_one_line_error(header):
    with pytest.raises(ValueError, match=".") as error:
        read_card(f"---\n{header}\n---\n")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("path", ["/etc/x", "~/x", "../x", "a/../../x", "file:///x", "https://host/x", "zip://a::b", "\\x"])
def test_paths_outside_the_folder_are_named(path):
    assert foreign_files({"configs": [{"data_files": [{"split": "train", "path": [path]}]}]}) == [path]
    assert foreign_files({"configs": [{"data_dir": path}]}) == [path]


def test_paths_inside_the_folder_are_accepted():
    assert foreign_files({"configs": [{"data_files": "data/train-*"}, {"data_dir": "a"}, 3], "other": "/etc"}) == []
    assert foreign_files({"configs": "/etc"}) == foreign_files({}) == []
