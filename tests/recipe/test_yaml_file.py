import copy
import dataclasses
from typing import get_args, get_type_hints

import pytest
import yaml

from prism_hf.errors import RecipeError
from prism_hf.recipe.schema import Recipe
from prism_hf.recipe.yaml_file import differing_keys, dump_recipe, load_recipe, parse_recipe, public_recipe
from prism_hf.runtime.plain_yaml import read_yaml


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("synthesis.iteration", 3, "unknown key 'synthesis.iteration', did you mean 'iterations'?"),
        ("synthesis.view.jiter", 3, "unknown key 'synthesis.view.jiter', did you mean 'jitter'?"),
        ("relabel.view.mix_alhpa", 3, "did you mean 'mix_alpha'?"),
        ("synthesis.ladder", {"step": 1, "periods": 2}, "did you mean 'period'?"),
        ("teacher", {}, "unknown key 'teacher', did you mean 'teachers'?"),
        ("data.licence", "mit", "unknown key 'data.licence', did you mean 'license'?"),
        ("data.zzz", 1, "expected one of: source, num_classes"),
    ],
)
def test_unknown_key_gets_a_suggestion(tiny_recipe, key, value, message):
    with pytest.raises(RecipeError) as error:
        parse_recipe(tiny_recipe({key: value}, values=True))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def sections(kind, path=()):
    """Return (path, dataclass) of a recipe and of every section below it."""
    yield path, kind
    for field in dataclasses.fields(kind):
        hint = get_type_hints(kind)[field.name]
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from sections(part, (*path, field.name))


def test_the_error_for_an_unknown_key_lists_the_keys_of_its_section(tiny_recipe):
    every = dict(sections(Recipe))
    assert len(every) == 14
    for path, kind in every.items():
        values = section = copy.deepcopy(tiny_recipe(values=True))
        for key in path:
            section = section.setdefault(key, {})
        section["@"] = 1
        with pytest.raises(RecipeError) as error:
            parse_recipe(values)
        known = ", ".join(field.name for field in dataclasses.fields(kind))[:60]
        assert f"unknown key '{'.'.join((*path, '@'))}', expected one of: {known}" in str(error.value)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001"])
def test_floats_may_be_written_without_a_dot(tiny_recipe, text):
    assert parse_recipe(tiny_recipe({"synthesis.lr": read_yaml(text)}, values=True)).synthesis.lr == 1e-3


def test_integers_are_accepted_for_floats(tiny_recipe):
    lr = tiny_recipe({"synthesis.lr": 1}).synthesis.lr
    assert lr == 1.0
    assert isinstance(lr, float)


def test_dump_and_load_round_trip(tiny_recipe, tmp_path):
    recipe_ = tiny_recipe(
        {
            "synthesis.ladder": {"step": 1, "period": 2},
            "relabel.ensemble": "weighted",
            "relabel.weights": [1.0, 2.0],
            "data.license": "très libre",
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe_), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe_
    assert again.fingerprint() == recipe_.fingerprint()
    assert differing_keys(again, recipe_) == []


@pytest.fixture
def tiny_yaml(tiny_recipe, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(values=True)))
    return path


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("synthesis.iterations=20", ("synthesis", "iterations"), 20),
        ("synthesis.lr=1e-3", ("synthesis", "lr"), 1e-3),
        ("synthesis.view.flip=false", ("synthesis", "view", "flip"), False),
        ("synthesis.view.crop_scale=[0.2, 0.4]", ("synthesis", "view", "crop_scale"), (0.2, 0.4)),
        ("synthesis.ladder.step=1", None, None),
        ("synthesis.ladder={step: 1, period: 2}", ("synthesis", "ladder", "period"), 2),
        ("teachers.bn_pool=[]", ("teachers", "bn_pool"), ()),
        ("relabel.view.mix=none", ("relabel", "view", "mix"), "none"),
        ("evaluation.epochs=null", ("evaluation", "epochs"), None),
        ("data.source=a=b", ("data", "source"), "a=b"),
        ("seed=7", ("seed",), 7),
        ("packaging.image_format=webp", ("packaging", "image_format"), "webp"),
        ("data.license=2024-01-01", ("data", "license"), "2024-01-01"),
        ("data.license=no", ("data", "license"), "no"),
        ("data.license=12:30", ("data", "license"), "12:30"),
        ("data.license=1_000", ("data", "license"), "1_000"),
        ("seed=0x10", ("seed",), 16),
    ],
)
def test_override(tiny_yaml, override, key, value):
    if key is None:
        with pytest.raises(RecipeError, match="'synthesis.ladder.period' is missing"):
            load_recipe(tiny_yaml, [override])
        return
    found: object = load_recipe(tiny_yaml, [override])
    for part in key:
        found = getattr(found, part)
    assert found == value


def test_a_later_override_takes_precedence(tiny_yaml):
    assert load_recipe(tiny_yaml, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("synthesis.iterations", "expected dotted.key=value"),
        ("=3", "expected dotted.key=value"),
        ("", "expected dotted.key=value"),
        ("synthesis.view=[", "not valid YAML"),
        ("synthesis.lr.x=3", "'synthesis.lr' is a value, not a section"),
        ("synthesis.itertions=3", "did you mean 'iterations'?"),
        ("sythesis.iterations=3", "unknown key 'sythesis'"),
        ("data.license=!!timestamp 2024-01-01", "tag 'timestamp' does not give a plain value"),
        ("synthesis.lr='1e-3'", "valid number"),
    ],
)
def test_bad_override_gives_a_one_line_error(tiny_yaml, override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(tiny_yaml, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not found"),
        (b"a: [", "not valid YAML"),
        (b"- a\n", "expected a mapping of sections, got list"),
        (b"", "expected a mapping of sections, got NoneType"),
        (b"\xff\xfe\x00a", "cannot be read|not valid YAML"),
    ],
)
def test_bad_file_gives_a_one_line_error(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_a_public_recipe_differs_only_in_absolute_paths(tiny_recipe, tmp_path):
    private = tiny_recipe({"data.source": str(tmp_path / "cats"), "teachers.logit": f"local-dir:{tmp_path / 'net'}"})
    public = public_recipe(private)
    assert (public.data.source, public.teachers.logit) == ("cats", "local-dir:net")
    assert differing_keys(private, public) == ["data.source", "teachers.logit"]
    assert public_recipe(tiny_recipe({})) == tiny_recipe({})


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_torch_would_reject_is_an_error(tiny_recipe, seed):
    with pytest.raises(RecipeError, match="evaluation.seeds"):
        tiny_recipe({"evaluation.seeds": [seed]})


def test_gray_webp_is_refused(tiny_recipe):
    with pytest.raises(RecipeError, match="no gray mode"):
        tiny_recipe({"packaging.image_format": "webp", "data.channels": 1})


@pytest.mark.parametrize("license", ["https://creativecommons.org/licenses/by/4.0/", "CC BY 4.0", "custom: see /TERMS"])
def test_a_license_is_published_verbatim(tiny_recipe, license):
    recipe = tiny_recipe({"data.license": license})
    assert public_recipe(recipe).data.license == license


def test_an_override_changes_one_place_of_an_alias(tiny_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    values = tiny_recipe({"synthesis.view": {"flip": True}}, values=True)
    values["relabel"]["view"] = values["synthesis"]["view"]
    path.write_text(yaml.dump(values))
    assert "*id001" in path.read_text()
    recipe = load_recipe(path, ["synthesis.view.flip=false"])
    assert (recipe.synthesis.view.flip, recipe.relabel.view.flip) == (False, True)
