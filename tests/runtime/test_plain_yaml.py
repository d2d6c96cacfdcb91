import math

import pytest
import yaml
from each import each
from huggingface_hub import DatasetCard

from prism_hf.runtime.plain_yaml import YamlError, dump_yaml, read_header, read_yaml

# Text that YAML 1.1, YAML 1.2, or the syntax of either would interpret as something else.
ODD_TEXT = [
    "1e-3", "1e3", "1E+3", ".5", "1.", "0o7", "017", "0x1F", "0b1", "1_000", "+1", "12:30", "190:20:30", "12:30.5",
    "yes", "No", "ON", "off", "y", "N", "true", "null", "~", "", " ", "=", "<<", ".inf", "-.INF", ".nan", ".NaN",
    "2024-01-01", "2001-1-1 25:00:00", "2024-01-01T00:00:00Z", "a: b", "a:", ":a", "?a", "? a", "- a", "-", "a #b", "#",
    "[a]", "{a}", "a, b", "&a", "*a", "!a", "!!int 3", "|", ">", "%YAML 1.1", "@", "`", "'", '"', "'a\"", "\\", "---",
    "...", " a ", "a\tb", "a\nb", "a\r\nb", "a\rb", "a\n", "\n", "\x85", "a\u2028b", "\u2029", "\x0b", "\x0c", "\x1c",
    "\x00", "\x1b[31m", "\x7f", "\ufeff", "\u202e", "é", "😀", "日本語", "x" * 2000, "a " * 300,
]  # fmt: skip


@each("text", ODD_TEXT)
def test_written_text_is_on_one_line_and_read_by_every_reader(text):
    values = {"text": text, "list": [text, [text]], "key": {text: text}}
    written = dump_yaml(values)
    assert read_yaml(written) == values
    assert yaml.safe_load(written) == values
    assert DatasetCard(f"---\n{written}---\nwords").data.to_dict() == values
    assert read_header(f"---\n{written}---\nwords") == values
    assert len(dump_yaml({"text": text}).splitlines()) == 1


@each(
    "value",
    [0, -1, 10**30, 0.1, 1e-5, 1e20, 1e16, -2.5e-300, 5.0, 0.0, math.inf, -math.inf, True, False, None, [], {}, [[]],
     {"a": [{"b": [1, [2, {"c": None}]]}]}],
)  # fmt: skip
def test_other_values_are_read_by_every_reader(value):
    written = dump_yaml({"a": value})
    for again in (read_yaml(written), yaml.safe_load(written)):
        assert again == {"a": value}
        assert type(again["a"]) is type(value)


def test_keys_keep_their_order_and_lists_have_one_item_per_line():
    assert dump_yaml({"b": [1, "x"], "a": {"d": [], "c": {}}}) == "b:\n- 1\n- x\na:\n  d: []\n  c: {}\n"


@each("text, value",
    [
        ("1e-3", 0.001), ("1E3", 1000.0), (".5", 0.5), ("5.", 5.0), ("-1", -1), ("+1", 1), ("017", 17), ("0o17", 15),
        ("0x1f", 31), (".inf", math.inf), ("true", True), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("2024-01-01", "2024-01-01"),
        ("2024-99-99", "2024-99-99"), ("12:30", "12:30"), ("1_000", "1_000"), ("0b1", "0b1"), ("=", "="), ("<<", "<<"),
        ("'1'", "1"), ('"true"', "true"), ("!!str 1", "1"), ("!!float 1", 1.0), ("[a, 1]", ["a", 1]),
    ],
)  # fmt: skip
def test_values_follow_the_core_schema_of_yaml_1_2(text, value):
    again = read_yaml(f"a: {text}")["a"]
    assert again == value
    assert type(again) is type(value)
    # Not even a directive switches to YAML 1.1.
    assert read_yaml(f"%YAML 1.1\n---\na: {text}") == {"a": value}


@each(
    "text, words",
    [
        ("a: 1\nb: 2\na: 3", ["key 'a' appears twice", "line 3, column 1"]),
        ("1: a\n1.0: b", ["appears twice", "line 2"]),
        ("a: &a {x: 1}\nb: {<<: *a}", ["merge keys (<<)", "line 2"]),
        ("a: &a {x: 1}\nb: {!!merge m: *a}", ["merge keys (<<)", "line 2"]),
        ("[a]: b", ["cannot be a key", "line 1"]),
        ("? {a: b}\n: c", ["cannot be a key", "line 1"]),
        ("a: !!python/object/apply:os.system ['true']", ["tag 'python/object/apply:os.system'", "line 1"]),
        ("a: !mine x", ["tag '!mine'", "line 1, column 4"]),
        ("a: !!timestamp 2024-01-01", ["tag 'timestamp'"]),
        ("a: !!binary aGk=", ["tag 'binary'"]),
        ("!!set {a, b}", ["tag 'set'"]),
        ("a: !!int soon", ["looks like int", "line 1"]),
        ("a: !!bool soon", ["looks like bool", "line 1"]),
        ("a: !!map [1]", ["expected a mapping", "line 1"]),
        ("a: " + "9" * 5000, ["looks like int", "quote it", "line 1"]),
        ("a: " + "[" * 2000, ["nested too deeply"]),
        ("a: &a [x]\nb: [" + "*a, " * 17 + "]", ["more than 16 aliases", "line 2"]),
        ("a: [", ["line 1"]),
        ("a: *nobody", ["undefined alias", "line 1"]),
        ("a: b: c", ["line 1"]),
        ("a\n---\nb", ["single document", "line 2"]),
        ("a: \x00", ["x0000", "position 3"]),
        ("a: \ud800", ["xd800", "position 3"]),
    ],
)
def test_other_yaml_gives_a_one_line_error_with_its_position(text, words):
    with pytest.raises(YamlError) as error:
        read_yaml(text)
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert len(line) < 200
    assert all(word in line for word in words), line


def test_an_alias_may_represent_a_value():
    assert read_yaml("a: &x [1]\nb: [*x, *x]") == {"a": [1], "b": [[1], [1]]}


@pytest.mark.filterwarnings("error")
def test_an_anchor_may_be_redefined():
    assert read_yaml("a: &x 1\nb: *x\nc: &x 2\nd: *x") == {"a": 1, "b": 1, "c": 2, "d": 2}


@each(
    "text, header",
    [
        ("---\na: 1\n---\nwords", {"a": 1}),
        ("---\r\na: 1\r\n---\r\nwords", {"a": 1}),
        ("\n ---\ra: 1\r---\r\nwords", {"a": 1}),
        ("---\na: 1\n---\rwords", None),
        ("--- \na: 1\n---\n", None),
        ("---\na: 1\n--- \n", {"a": 1}),
        ("---\na: 1\n---", {"a": 1}),
        ("---\n---\na: 1\n---\n", {"a": 1}),  # the way huggingface_hub reads it
        ("words\n---\na: 1\n---\n", None),
        ("---\na: 1\n----\n", None),
        ("words", None),
        ("", None),
    ],
)
def test_the_header_is_found_by_the_rules_of_the_hub(text, header):
    assert read_header(text) == header
    assert DatasetCard(text).data.to_dict() == (header or {})
