"""Fuzz tests: hundreds of unusual texts and values, and thousands in the slow run."""

import copy
import os
import subprocess
from dataclasses import replace
from pathlib import PurePath

import pytest
import yaml
from huggingface_hub import DatasetCard
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from pipeline import PYTHON, RECIPE, ROOT, one_line, quiet_env

from cards import HOSTILE, NAMES, packed_card, render, shape, shown, tokens
from prism_hf.errors import RecipeError
from prism_hf.hub.dataset_card import METADATA_KEYS, address_card, metadata, render_control_card
from prism_hf.hub.merge import BEGIN, END, merge_readme
from prism_hf.recipe.schema import Recipe, to_dict
from prism_hf.recipe.yaml_file import dump_recipe, load_recipe, override_recipe, parse_recipe, public_recipe
from prism_hf.runtime.plain_yaml import dump_yaml, read_yaml
from prism_hf.runtime.untrusted import _UNSEEN as UNSEEN

MORE = float(os.environ.get("FUZZ_TIMES", "0.2"))  # for more examples: FUZZ_TIMES=20 pytest tests/test_fuzz.py
NEW = MORE > 1  # otherwise every run tries the same examples


def fuzz(examples):
    return settings(
        max_examples=int(examples * MORE),
        derandomize=not NEW,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


@pytest.mark.slow
def test_five_times_as_many_examples_pass():
    """Run the tests below with five times the examples, in a separate process because the number is set at import."""
    words = [PYTHON, "-m", "pytest", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        words, env=quiet_env() | {"FUZZ_TIMES": "1"}, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-5000:]


# -- recipes ----------------------------------------------------------------------------------------------------------

GOOD = to_dict(load_recipe(RECIPE))
odd_words = st.sampled_from(
    [
        "",
        " ",
        "~",
        "null",
        "1e400",
        "nan",
        ".inf",
        "0x_",
        "12:30",
        "2024-13-45",
        "2024-01-01",
        "<<",
        "=",
        "a\nb",
        "\x85",
        "\u2028",
        "\ufeff",
        "\x1b[31m",
        "\ud800",
        "../x",
        "/",
        "-",
        "- a",
        "#",
        "!!bool x",
        "*a",
        "&a",
        "\\",
        "'",
        '"',
        "%",
        "@",
    ]
)
words = st.one_of(odd_words, st.text(max_size=20), st.text(min_size=300, max_size=400))
numbers = st.one_of(
    st.integers(), st.sampled_from([0, -1, 1, 2, 2**31, 2**63, 10**30, -(10**400)]), st.floats(), st.booleans(), st.none()
)
plain = st.recursive(
    st.one_of(words, numbers, st.dates(), st.binary(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(words, numbers), inner, max_size=4)),
    max_leaves=8,
)


def fits_a_screen(line):
    assert len(one_line(line)) < 2000
    assert len(line.splitlines()) == 1


def loads_or_explains(load):
    """Return a recipe that survives a round trip, or check for an error of one short line."""
    try:
        recipe = load()
    except RecipeError as error:
        return fits_a_screen(str(error))
    assert isinstance(recipe, Recipe)
    again = parse_recipe(read_yaml(dump_recipe(recipe)))
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe  # readers of YAML 1.1
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()
    return recipe


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "recipe.yaml"


def load_text(file, text):
    file.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    recipe = loads_or_explains(lambda: load_recipe(file))
    if recipe is not None:
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(file) == recipe


@fuzz(150)
@given(text=st.text(max_size=200))
def test_any_text_loads_or_is_refused(file, text):
    load_text(file, text)


@fuzz(150)
@given(data=st.binary(max_size=100))
def test_random_bytes_are_refused(file, data):
    file.write_bytes(data)
    assert loads_or_explains(lambda: load_recipe(file)) is None


# Elements of YAML syntax, so that the examples reach deep into the parser.
pieces = st.sampled_from(
    [
        "a",
        "b",
        ": ",
        "- ",
        "? ",
        "\n",
        "  ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "&x ",
        "*x",
        "<<",
        "!!",
        "!!int ",
        "!!bool ",
        "!!float ",
        "!!timestamp ",
        "!!binary ",
        "!!omap ",
        "!!set ",
        "!!python/object:os.system ",
        "|\n",
        ">\n",
        "'",
        '"',
        "#",
        "%",
        "---\n",
        "...\n",
        "~",
        "0x",
        "1_0",
        "1:2",
        "2001-01-99",
        "2001-1-1 25:00:00",
        ".nan",
        "-.inf",
        "=",
        "\t",
        "\\x",
        "\u2028",
    ]
)


@fuzz(400)
@given(parts=st.lists(pieces, max_size=25))
@example(parts=["a", ": ", "!!timestamp ", "a"])
@example(parts=["a", ": ", "!!bool ", "a"])
@example(parts=["&x ", "[", "*x", "]"])
@example(parts=["["] * 3000)
@example(parts=["a", ": ", "0001-01-01 00:00:00+10:00"])
@example(parts=["!!set ", "a"])
def test_random_yaml_fragments_are_refused(file, parts):
    file.write_text("".join(parts), encoding="utf-8")
    assert loads_or_explains(lambda: load_recipe(file)) is None


@fuzz(150)
@given(values=plain)
def test_random_values_are_refused(values):
    assert loads_or_explains(lambda: parse_recipe(values)) is None


json_like = st.recursive(
    st.one_of(
        words, st.text("-+.:0123456789eExoyYnN_~ T"), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(words, st.text(max_size=5)), inner)),
    max_leaves=8,
)


@fuzz(400)
@given(values=st.dictionaries(words, json_like, max_size=4))
def test_written_values_are_read_back_by_yaml_1_1_and_1_2(values):
    written = dump_yaml(values)
    assert yaml.safe_load(written) == read_yaml(written) == values


def places(values, path=()):
    """Yield the path of every key, including keys in nested sections."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


PLACES = list(places(GOOD))


@st.composite
def changed(draw):
    """Draw the values of a valid recipe with up to four of them dropped, renamed, changed, or nested."""
    values = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        *parents, last = draw(st.sampled_from(PLACES))
        section = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section:
            continue
        old = section[last]
        match draw(st.sampled_from(["change", "change", "near", "near", "drop", "rename", "wrap"])):
            case "change":
                section[last] = draw(st.one_of(plain, words, numbers))
            case "near" if isinstance(old, bool):
                section[last] = not old
            case "near" if isinstance(old, int | float) and abs(old) < 1e9:
                section[last] = draw(st.sampled_from([old + 1, old / 2, old * 10**9, -old, str(old), 0, 0.5]))
            case "near" if isinstance(old, str):
                section[last] = old[:1] + draw(words)
            case "near" if isinstance(old, list):
                section[last] = draw(st.sampled_from([[], old * 2, old[:1], [*old, "squeeze:resnet10t"]]))
            case "drop":
                del section[last]
            case "rename":
                section[draw(words)] = section.pop(last)
            case "wrap":
                section[last] = draw(st.sampled_from([[old], {last: old}, {"": old}, {0: old, "0": old}]))
    return values


@fuzz(500)
@given(values=changed())
def test_a_changed_recipe_loads_or_gives_one_error_line(file, values):
    recipe = loads_or_explains(lambda: parse_recipe(values))
    if recipe is not None:
        assert public_recipe(public_recipe(recipe)) == public_recipe(recipe)
    with_tags = yaml.dump(values, allow_unicode=True)  # values that are not plain YAML become tags
    load_text(file, with_tags)


@fuzz(300)
@given(
    place=st.one_of(st.sampled_from(PLACES).map(".".join), words),
    value=st.one_of(
        words,
        numbers.map(str),
        plain.map(lambda v: yaml.dump(v, default_flow_style=True)),
        st.lists(pieces, max_size=6).map("".join),
    ),
)
def test_any_override_loads_or_gives_one_error_line(place, value):
    for override in (f"{place}={value}", value):
        loads_or_explains(lambda override=override: load_recipe(RECIPE, [override]))
        loads_or_explains(lambda override=override: override_recipe(load_recipe(RECIPE), [override]))


# -- cards ------------------------------------------------------------------------------------------------------------

marks = st.sampled_from(
    [
        *HOSTILE,
        BEGIN,
        END,
        "\n",
        "\r",
        "\n\n",
        "\n---\n",
        "\n```\n",
        "````",
        "    ",
        "\t",
        "<",
        ">",
        "<b>",
        "</details>",
        "<!--",
        "-->",
        "[",
        "](",
        ")",
        "![",
        "](http://e)",
        "<http://e>",
        "http://e.example",
        "www.e.example",
        "a@b.example",
        "# ",
        "\n# ",
        "\n===",
        "\n---",
        "|",
        "\\",
        "`",
        "*",
        "_",
        "~~",
        "$$",
        "&lt;",
        "&#60;",
        "{{ 1 }}",
        "{% for %}",
        "1. ",
        "- ",
        "+ ",
        "> ",
        "[^1]",
        "[x]: /y",
        ":",
        "- - -",
        "\u2028",
        "\x85",
        "\x0b",
        "\ufeff",
        "\u202e",
        "ORG/NAME",
        'repo = "ORG/',
        "load_dataset(repo, ",
        "x" * 90,
    ]
)
prose = st.one_of(st.text(max_size=30), st.lists(st.one_of(marks, st.text(max_size=5)), max_size=6).map("".join))
something = prose.filter(bool)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    recipe, facts = packed_card(tmp_path_factory.mktemp("card"))
    return recipe, facts, " ".join(shape(render(facts, recipe)[2]))


@fuzz(40)
@given(
    names=st.lists(something, min_size=4, max_size=4, unique=True),
    source=something,
    on_hub=st.booleans(),
    license=something,
    teacher=st.lists(something, min_size=3, max_size=3),
    student=prose,
    reason=prose,
)
@example(
    names=NAMES,
    source="digits",
    on_hub=False,
    license=f"{'a' * 80} {END} {'b' * 80}",
    teacher=["a"] * 3,
    student="a",
    reason="a",
)
@example(names=NAMES, source="digits", on_hub=False, license=f"a\n{END}\nb", teacher=["a"] * 3, student="a", reason="a")
def test_no_text_changes_the_structure_of_a_card(packed, names, source, on_hub, license, teacher, student, reason):
    recipe, facts, plain = packed
    facts = copy.deepcopy(facts)
    recipe = replace(recipe, data=replace(recipe.data, source=source, license=license))
    facts["recipe"], facts["class_names"] = to_dict(recipe), names
    facts["provenance"]["source"] |= {"id": source, "on_hub": on_hub}
    facts["provenance"]["teachers"][0] |= dict(zip(("name", "architecture", "license"), teacher, strict=True))
    facts["evaluation"] |= {"student": student, "left_out": {"all real": reason}, "verifier": teacher[0]}
    card, header, body = render(facts, recipe)
    # The header has the expected content for every reader.
    assert header == metadata(facts, recipe)
    assert set(header) <= set(METADATA_KEYS)
    assert DatasetCard(card).data.to_dict() == header
    label = header["dataset_info"][0]["features"][1]["dtype"]["class_label"]
    assert [label["names"][str(i)] for i in range(4)] == names
    # The body has the same structure for any text.
    assert " ".join(shape(body)) == plain
    recipe_shown = next(token.content for token in tokens(body) if token.type == "fence" and token.info == "yaml")
    assert parse_recipe(yaml.safe_load(recipe_shown)) == recipe
    # A local source is shown without the folders above it.
    for word in (*names, teacher[0], source if on_hub else PurePath(source).name or source):
        assert seen(word) in shown(body)
    assert DatasetCard(render_control_card(facts, recipe)).data.to_dict() == header
    # Both stay the same on the way to the Hub.
    addressed = address_card(card, recipe.name, "org/name", "v2")
    assert " ".join(shape(addressed[addressed.index(body[:40]) :])) == plain
    assert DatasetCard(addressed).data.to_dict() == header
    published = merge_readme(card, None, owned=METADATA_KEYS)
    assert merge_readme(card, published, owned=METADATA_KEYS) == published
    assert DatasetCard(published.decode()).data.to_dict() == header


def seen(text):
    """Return text as one line shows it: U+FFFD for control characters, one space for white space."""
    return " ".join(UNSEEN.sub("\ufffd", text).split())
