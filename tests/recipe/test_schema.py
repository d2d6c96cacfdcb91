import copy
import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from each import each
from pipeline import one_line

from prism_hf.errors import RecipeError
from prism_hf.recipe import plan
from prism_hf.recipe import schema as recipe
from prism_hf.recipe.schema import Recipe, to_dict
from prism_hf.recipe.synthesis import Densification
from prism_hf.recipe.yaml_file import differing_keys, load_recipe, parse_recipe

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "\nsynthesis:" in path.read_text())
PUBLISHED = sorted((ROOT / "benchmarks" / "results").glob("digits-*.json"))
FINGERPRINTS = {
    "digits/prism_ipc1.yaml": "517f60cc339e7a15",
    "digits/prism_ipc10.yaml": "64458c9b8b15ade2",
    "digits/prism_noise_ipc10.yaml": "0f63769e049a5ecd",
    "digits/sre2l_ipc10.yaml": "d08230951aae8bbc",
    "fashion/gvbsm_bn_ipc10.yaml": "9520fc04014c1e27",
    "fashion/gvbsm_ipc10.yaml": "6798a4036c7caa4b",
    "your_data/prism_ipc10.yaml": "f2a9721ecb69f096",
    "fashion/prism_kmeans_ipc1.yaml": "ba90c4880ebb50c2",
    "fashion/prism_kmeans_ipc10.yaml": "36c75cb2c87653b0",
    "fashion/prism_kmeans_ipc50.yaml": "a2d33f0b84c12c8a",
    "fashion/prism_ipc10.yaml": "4b2b2e62e69fc327",
    "fashion/prism_per_iteration_ipc10.yaml": "0c1570408c27b751",
    "fashion/random_ipc10.yaml": "8f98b5cb553ff601",
    "fashion/sre2l_ipc10.yaml": "64cde14b174fc69a",
    "imagenet/gvbsm_ipc10.yaml": "b2ad2bd6bca732fc",
    "imagenet/prism_ipc10.yaml": "6916141498d3e5be",
    "imagenet/lite_ipc1.yaml": "726ef7837eb10289",
    "imagenet/gvbsm_ipc100.yaml": "e348dad73ebd5eec",
    "imagenet/gvbsm_ipc50.yaml": "759b8436716c5f40",
    "imagenet/prism_ipc1.yaml": "48b5e17502c80f19",
    "imagenet/prism_ipc100.yaml": "47a2f3aae90e050a",
    "imagenet/prism_ipc50.yaml": "a40f7849881b6a24",
    "imagenet/random_ipc1.yaml": "36958a21c8e348ce",
    "imagenet/random_ipc10.yaml": "0f159c0be8eea732",
    "imagenet/random_ipc100.yaml": "ffadb0f99e902147",
    "imagenet/random_ipc50.yaml": "998b86408df204bf",
    "imagenet/sre2l_ipc100.yaml": "a685f2dabd305665",
    "openclipart/prism_ipc5.yaml": "de7731333b5c754e",
    "openclipart/prism_64_ipc10.yaml": "a58c745b0f113143",
    "openclipart/prism_kmeans_64_ipc10.yaml": "afae14c7cdfd3496",
    "fashion/prism_easy_ipc10.yaml": "d92ef587f06539b6",
    "imagenet/sre2l_ipc50.yaml": "3a4979cf45384d54",
    "imagenet/sre2l_ipc1.yaml": "9e4f97dcae565a85",
    "imagenet/gvbsm_ipc1.yaml": "77a49ca30997dfb4",
    "imagenet/sre2l_ipc10.yaml": "dba6706eb5e9ccce",
}
"""What is recorded in published datasets; no change of the code may change them."""
# Every optional section and value is set, so that a walk over the fields visits each of them.
FULL = {
    "synthesis.ladder": {"step": 1, "period": 2},
    "teachers.verifier": "test_resnet#v",
    "relabel.ensemble": "weighted",
    "relabel.weights": [1.0, 2.0],
    "synthesis.init": "mosaic",
    "synthesis.mosaic": {},
    "synthesis.conv": {},
}


def full(tiny_recipe):
    made = tiny_recipe(FULL)
    # A ladder needs batches of one slot and densification needs several, so no recipe has both.
    object.__setattr__(made.synthesis, "densification", Densification())
    return made


def leaves(section: object, prefix: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        found += leaves(value, f"{key}.") if dataclasses.is_dataclass(value) else [key]
    return found


def other(value: object) -> object:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case tuple():
            return (*value, value[0]) if value else ("x",)
        case None:
            return "x"
    raise TypeError(type(value))


CYCLE = {"teachers.selection": "cycle", "teachers.extras": 3, "teachers.draw_probability": 0.5}
RANDOM = {"method": "random", "synthesis": {"ipc": 2}, "teachers": {"logit": "test_resnet"}}
UNREAD = {"init": "noise", "lr": 0.1, "iterations": 0, "batch_size": 3, "view": {"flip": False}, "verify_every": 5}
ADDED = {
    "method": RANDOM,
    "data.background": {"data.background": "#808080"},
    "data.white_level": {"data.white_level": 4095},
    "data.classes": {"data.classes": [0, 1, 2]},
    "data.class_logits": {"data.class_logits": "full"},
    "data.images_per_class": {"data.images_per_class": 5},
    "squeeze.seed": {"squeeze.seed": 0},
    "squeeze.bn_statistics": {"squeeze.bn_statistics": "clean"},
    "squeeze.input_size": {"squeeze.input_size": "own"},
    "synthesis.momentum": {"synthesis.momentum": 0.4},
    "synthesis.conv": {"synthesis.conv": {}},
    "synthesis.densification": {"synthesis.densification": {}},
    "synthesis.mosaic": {"synthesis.mosaic": {"grid": 3}},
    "synthesis.mosaic.easiest": {"synthesis.mosaic": {"easiest": 0.5}},
    "relabel.view.cell": {"relabel.view.cell": 2},
    "synthesis.easiest": {"synthesis.easiest": 0.5},
    "synthesis.view.curriculum": {"synthesis.view.curriculum": "cosine"},
    "evaluation.label_epochs": {"evaluation.label_epochs": 1},
    "evaluation.hard_epochs": {"evaluation.hard_epochs": 1},
    "evaluation.preset": {"evaluation.preset": "prism", "evaluation.epochs": 2},
    "evaluation.micro_batch": {"evaluation.micro_batch": 2},
    "evaluation.optimizer": {"evaluation.optimizer": "adam"},
    "evaluation.cosine_stretch": {"evaluation.cosine_stretch": 2.0},
    "relabel.codec": {"relabel.codec": "int4"},
    "relabel.top_k": {"relabel.codec": "topk", "relabel.top_k": 2, "evaluation.loss": "kl"},
    "relabel.stored_epochs": {"relabel.stored_epochs": 1},
    "relabel.budget": {"relabel.budget": "1GB"},
}
TOP = {"relabel.codec": "topk", "relabel.top_k": 1, "evaluation.loss": "kl"}
BESIDE = {
    "data.class_logits": {"data.classes": [0, 1, 2]},
    "synthesis.densification": {"synthesis.slots_per_batch": 2},
    "synthesis.mosaic": {"synthesis.init": "mosaic", "synthesis.mosaic": {}},
    "synthesis.mosaic.easiest": {"synthesis.init": "mosaic", "synthesis.mosaic": {}},
    "relabel.view.cell": {"synthesis.init": "mosaic", "synthesis.mosaic": {}},
    "synthesis.easiest": {"synthesis.init": "real_kmeans"},
    "relabel.top_k": TOP,
}
LEAVES = leaves(parse_recipe(yaml.safe_load((ROOT / "recipes/digits/prism_ipc10.yaml").read_text())))
for section, names in {
    "ladder": ("step", "period"),
    "conv": ("patch", "drop"),
    "densification": ("weight", "temperature", "size"),
    "mosaic": ("candidates", "crops", "crop_scale", "grid", "easiest"),
}.items():
    LEAVES.remove(f"synthesis.{section}")
    LEAVES += [f"synthesis.{section}.{name}" for name in names]


def test_shipped_recipes_are_found():
    assert SHIPPED


@each("path", SHIPPED)
def test_shipped_recipe_loads_and_plans(path):
    loaded = load_recipe(path)
    assert sum(len(job.classes) for job in plan.plan_jobs(loaded)) == loaded.num_images


def test_every_shipped_recipe_has_its_pinned_fingerprint():
    folder = ROOT / "recipes"
    assert {path.relative_to(folder).as_posix(): load_recipe(path).fingerprint() for path in SHIPPED} == FINGERPRINTS


@each("key", LEAVES)
def test_changing_any_leaf_changes_the_fingerprint(tiny_recipe, key):
    base = full(tiny_recipe)
    changed = copy.deepcopy(base)
    *parents, last = key.split(".")
    section = changed
    for parent in parents:
        section = getattr(section, parent)
    # This bypasses validation on purpose: the fingerprint must depend on every leaf, whatever values are allowed today.
    object.__setattr__(section, last, other(getattr(section, last)))
    assert (changed.fingerprint() == base.fingerprint()) == (key == "name")
    assert differing_keys(base, changed) == ([] if key == "name" else [key])


def test_the_walk_visits_every_leaf_of_the_resolved_recipe(tiny_recipe):
    def flat(values: dict[str, object], prefix: str = "") -> set[str]:
        found = set()
        for key, value in values.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
        return found

    assert flat(to_dict(full(tiny_recipe))) == set(LEAVES)


@each("path", PUBLISHED)
def test_published_recipes_keep_their_fingerprint(path):
    report = json.loads(path.read_text())["report"]
    assert parse_recipe({"name": "x", **report["settings"]}).fingerprint() == report["recipe_fingerprint"]
    shipped = ROOT / "recipes" / "digits" / f"{path.stem.removeprefix('digits-').replace('-', '_')}.yaml"
    if shipped.is_file():
        assert load_recipe(shipped).fingerprint() == report["recipe_fingerprint"]


def test_every_shipped_digits_recipe_has_a_published_report():
    names = {f"digits-{path.stem.replace('_', '-')}" for path in SHIPPED if path.parent.name == "digits"}
    assert len(names) == 4
    assert names <= {path.stem for path in PUBLISHED}


@each("key", recipe._ADDED)
def test_a_key_added_later_changes_the_fingerprint_where_it_is_used(tiny_recipe, key):
    assert set(recipe._ADDED) == set(ADDED)
    changed = tiny_recipe(BESIDE.get(key, {}) | ADDED[key])
    if key == "method":  # bypasses validation: a recipe that optimizes has more keys
        base = copy.deepcopy(changed)
        object.__setattr__(base, "method", "synthesize")
    else:
        base = tiny_recipe(BESIDE.get(key))
    assert changed.fingerprint() != base.fingerprint()


def test_section_fingerprint_depends_only_on_its_section_and_the_seed(tiny_recipe):
    base = tiny_recipe()
    assert base.fingerprint("squeeze") == tiny_recipe({"synthesis.lr": 1.0}).fingerprint("squeeze")
    assert base.fingerprint("squeeze") != tiny_recipe({"squeeze.epochs": 1}).fingerprint("squeeze")
    assert base.fingerprint("squeeze") != tiny_recipe({"seed": 1}).fingerprint("squeeze")


def test_fingerprint_does_not_depend_on_formatting(tiny_recipe):
    base, values = tiny_recipe(), tiny_recipe(values=True)
    spelled_out = parse_recipe(to_dict(base))
    reordered = parse_recipe(dict(reversed(values.items())))
    assert base.fingerprint() == spelled_out.fingerprint() == reordered.fingerprint()
    assert len(bytes.fromhex(base.fingerprint())) == 8


@each(
    "key, value",
    [
        ("synthesis.iterations", "20"),
        ("synthesis.iterations", 20.5),
        ("synthesis.iterations", True),
        ("synthesis.iterations", -1),
        ("synthesis.clamp", 1),
        ("synthesis.clamp", "yes"),
        ("synthesis.lr", "fast"),
        ("synthesis.lr", 0),
        ("synthesis.lr", float("nan")),
        ("synthesis.lr", "inf"),
        ("synthesis.lr", None),
        ("synthesis.betas", [0.5]),
        ("synthesis.init", "real"),
        ("synthesis.batch_size", 1),
        ("synthesis.view", {"crop_scale": [0, 1]}),
        ("data.channels", 2),
        ("data.num_classes", 1),
        ("data.size", 7),
        ("data.validation_fraction", 1.0),
        ("teachers.logit", 3),
        ("teachers.logit", ""),
        ("teachers.bn_pool", "test_byobnet"),
        ("teachers.draw_probability", 1.5),
        ("relabel.teachers", []),
        ("packaging.jpeg_quality", 101),
        ("evaluation.ema", 1.0),
        ("evaluation.seeds", []),
        ("name", "a/b"),
        ("seed", -1),
        ("squeeze.seed", -1),
        ("method", "magic"),
        ("synthesis.momentum", 1.0),
        ("synthesis.conv", {"patch": 0}),
        ("synthesis.conv", {"drop": 1.0}),
        ("synthesis.densification", {"weight": 0}),
        ("synthesis.densification", {"size": 0}),
        ("synthesis.mosaic", {"grid": 1}),
        ("synthesis.easiest", 0),
        ("synthesis.bn_reduction", "max"),
        ("synthesis.view.curriculum", "linear"),
        ("teachers.selection", "in turn"),
        ("evaluation.label_epochs", 0),
        ("evaluation.loss", "mae"),
        ("synthesis", None),
    ],
)
def test_the_error_for_a_wrong_value_names_the_key(tiny_recipe, key, value):
    with pytest.raises(RecipeError) as error:
        parse_recipe(tiny_recipe({key: value}, values=True), origin="x.yaml")
    assert str(error.value).startswith("x.yaml: ")
    assert key in str(error.value)


@each(
    "changes, message",
    [
        ({"teachers.bn_pool": ["a", "a"]}, "bn_pool names a teacher twice"),
        ({"teachers.bn_pool": ["test_resnet"]}, "bn_pool contains the logit teacher 'test_resnet'"),
        ({"teachers.verifier": "test_byobnet"}, "verifier 'test_byobnet' is also a teacher"),
        ({"teachers.verifier": "test_resnet"}, "verifier 'test_resnet' is also a teacher"),
        ({"teachers.bn_pool": [], "teachers.include_logit": False}, "no BN teacher"),
        ({"squeeze.crop_scale": [1.0, 0.5]}, "squeeze.crop_scale: must be [smallest, largest]"),
        ({"synthesis.view.crop_scale": [1.0, 0.5]}, "synthesis.view.crop_scale: must be [smallest, largest]"),
        ({"relabel.view.crop_scale": [1.0, 0.5]}, "relabel.view.crop_scale: must be [smallest, largest]"),
        ({"synthesis.betas": [0.5, 1.0]}, "synthesis.betas.1: Input should be less than 1, got 1.0"),
        (
            {"synthesis.batch_order": "within_class", "synthesis.slots_per_batch": 2},
            "slots_per_batch needs batch_order",
        ),
        (
            {"synthesis.batch_order": "within_class", "synthesis.ladder": {"step": 1, "period": 2}},
            "ladder gives every",
        ),
        (
            {"synthesis.slots_per_batch": 2, "synthesis.ladder": {"step": 1, "period": 2}},
            "ladder gives every slot",
        ),
        ({"synthesis.ladder": {"step": 2, "period": 3}}, "ladder leaves 0 iterations"),
        ({"relabel.teachers": ["a", "a"]}, "relabel.teachers names a teacher twice"),
        ({"relabel.ensemble": "weighted"}, "weights belong to ensemble weighted"),
        ({"relabel.weights": [1.0, 1.0]}, "weights belong to ensemble weighted"),
        ({"relabel.ensemble": "weighted", "relabel.weights": [1.0]}, "1 weights for 2 teachers"),
        ({"relabel.batch_size": 7}, "relabel.batch_size is 7 but there are 6 images"),
        (
            {"synthesis.slots_per_batch": 3},
            "slots_per_batch is 3 but there are 6 images (2 per class); set synthesis.slots_per_batch=2",
        ),
        ({"synthesis.batch_size": 4}, "batch_size is 4, more than the 3 images of slots_per_batch"),
        (
            {"synthesis.batch_order": "within_class", "synthesis.batch_size": 7},
            "synthesis.batch_size is 7 but there are 6",
        ),
        ({"evaluation.epochs": 3}, "evaluation.epochs is 3 but relabel stores 2"),
        ({"evaluation.epochs": 4, "evaluation.hard_epochs": 1}, "evaluation.epochs is 4 but relabel stores 2"),
        ({"evaluation.hard_epochs": 2}, "evaluation.hard_epochs is 2, but a student trains for 2 epochs; lower it"),
        ({"relabel.stored_epochs": 1, "evaluation.label_epochs": 2}, "evaluation.label_epochs is 2 but relabel stores"),
        ({"relabel.codec": "topk"}, "top_k belongs to codec topk: set both or neither"),
        ({"relabel.top_k": 1}, "top_k belongs to codec topk: set both or neither"),
        ({"relabel.codec": "topk", "relabel.top_k": 1}, "but evaluation.loss mse_ce compares all; use int8 or int4"),
        (TOP | {"evaluation.loss": "cosine"}, "but evaluation.loss cosine compares all; use int8 or int4"),
        (TOP | {"relabel.top_k": 3}, "relabel.top_k is 3, data.num_classes is 3; lower it"),
        ({"relabel.budget": "150"}, "relabel.budget: must be a size such as 150MB, got '150'"),
        ({"relabel.budget": "-1MB"}, "must be a size such as 150MB"),
        ({"relabel.budget": "1MB", "relabel.codec": "int4"}, "relabel.budget chooses how labels are stored, so codec"),
        (
            {"relabel.budget": "9kB"},
            "relabel.budget 9kB does not hold one epoch of labels; 6 images of 3 classes need 12.5 kB",
        ),
        ({"evaluation.seeds": [1, 1]}, "seeds must differ"),
        (
            {"data.images_per_class": 1},
            "data.images_per_class is 1 but there are 6 images (2 per class); set data.images_per_class=2",
        ),
        ({"evaluation.label_epochs": 3}, "evaluation.label_epochs is 3 but relabel stores 2"),
        ({"evaluation.label_epochs": 3, "evaluation.epochs": 2}, "evaluation.label_epochs is 3"),
        ({"teachers.selection": "cycle"}, "selection cycle draws no teachers, so"),
        (CYCLE | {"teachers.extras": 2}, "extras is not used"),
        (CYCLE | {"teachers.include_logit": False}, "include_logit is not used"),
        (CYCLE | {"teachers.draw_probability": 0.4}, "draw_probability is not used"),
        (RANDOM | {"teachers.bn_pool": ["a"]}, "method random optimizes nothing, so bn_pool is not used"),
        (RANDOM | CYCLE, "selection is not used"),
        *((RANDOM | {f"synthesis.{key}": value}, f"{key} is not used") for key, value in UNREAD.items()),
        ({"synthesis.init": "mosaic"}, "mosaic belongs to init mosaic"),
        ({"synthesis.mosaic": {}}, "mosaic belongs to init mosaic"),
        ({"synthesis.mosaic": {"crop_scale": [1.0, 0.5]}}, "synthesis.mosaic.crop_scale: must be [smallest, largest]"),
        ({"synthesis.init": "noise", "synthesis.easiest": 0.5}, "easiest belongs to init real_random or real_kmeans"),
        ({"relabel.view.cell": 2}, "relabel.view.cell is 2, but there is no synthesis.mosaic; set both"),
        (
            {"synthesis.init": "mosaic", "synthesis.mosaic": {"grid": 3}, "relabel.view.cell": 2},
            "but synthesis.mosaic.grid is 3; set both to the same number",
        ),
        (
            {"synthesis.init": "mosaic", "synthesis.mosaic": {"grid": 3}, "relabel.view.cell": 3},
            "relabel.view.cell is 3, which does not divide data.size 32",
        ),
        (
            {
                "synthesis.init": "mosaic",
                "synthesis.mosaic": {},
                "relabel.view.cell": 2,
                "evaluation.hard_epochs": 1,
            },
            "evaluation.hard_epochs draws views of whole images; remove it",
        ),
        ({"synthesis.iterations": 0, "synthesis.init": "noise"}, "ships the start images, but init is noise"),
        (RANDOM | {"teachers.extras": 0}, "extras is not used"),
        ({"synthesis.densification": {}}, "densification compares images of one class"),
        ({"synthesis.bn_reduction": "balanced", "synthesis.conv": {}}, "balanced is for plain BN statistics"),
        ({"synthesis.bn_reduction": "balanced", "synthesis.momentum": 0.4}, "balanced is for plain BN statistics"),
    ],
)
def test_the_error_for_an_impossible_combination_says_what_to_do(tiny_recipe, changes, message):
    with pytest.raises(RecipeError) as error:
        tiny_recipe(changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_are_reported_at_once(tiny_recipe):
    with pytest.raises(RecipeError) as error:
        parse_recipe(tiny_recipe({"synthesis.lr": "fast", "data.size": "big", "relabel.epoch": 1}, values=True))
    assert all(part in str(error.value) for part in ("synthesis.lr", "data.size", "relabel.epoch"))


def test_a_missing_key_is_named(tiny_recipe):
    values = tiny_recipe(values=True)
    del values["teachers"], values["synthesis"]["ipc"]
    with pytest.raises(RecipeError, match="'teachers' is missing.*'synthesis.ipc' is missing"):
        parse_recipe(values)


def test_squeezed_teachers_of_every_role_are_listed(tiny_recipe):
    made = tiny_recipe(
        {
            "teachers.logit": "squeeze:a",
            "teachers.bn_pool": ["squeeze:b", "c"],
            "teachers.verifier": "squeeze:v",
            "relabel.teachers": ["squeeze:d", "squeeze:a"],
        }
    )
    assert made.squeezed_teachers == ("squeeze:a", "squeeze:b", "squeeze:d", "squeeze:v")
    assert made.teachers.synthesis_names == ("squeeze:a", "squeeze:b", "c")


def test_recipe_is_frozen(tiny_recipe):
    made = tiny_recipe()
    assert isinstance(made, Recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.synthesis.view.flip = False


CHANGED = [["synthesis.ipc=1"], ["synthesis.ipc=2"], ["synthesis.ipc=5"], ["synthesis.ipc=50"], ["data.num_classes=3"],
           ["data.num_classes=2", "synthesis.ipc=1"], ["relabel.epochs=3"]]  # fmt: skip


@pytest.mark.parametrize("overrides", CHANGED, ids=" ".join)
def test_one_error_names_every_value_that_another_number_of_images_needs(overrides):
    """With the values that the error gives, every shipped recipe is valid."""
    refused = 0
    for path in SHIPPED:
        try:
            load_recipe(path, overrides)
        except RecipeError as error:
            refused += 1
            fixes = one_line(error).rpartition("; set ")[2].partition(", or ")[0].split()
            assert load_recipe(path, [*overrides, *fixes])
    assert refused or overrides in (["synthesis.ipc=50"], ["relabel.epochs=3"])


def test_the_error_on_too_few_images_gives_values_that_work():
    with pytest.raises(RecipeError) as error:
        load_recipe(ROOT / "recipes/digits/prism_ipc10.yaml", ["synthesis.ipc=1"])
    assert one_line(error).endswith(
        "synthesis.slots_per_batch is 2, synthesis.batch_size is 20, relabel.batch_size is 25 but there are 10 images "
        "(1 per class); set synthesis.slots_per_batch=1 synthesis.batch_size=10 relabel.batch_size=10"
    )


def test_more_slots_fill_a_batch_of_fewer_classes():
    with pytest.raises(RecipeError) as error:
        load_recipe(ROOT / "recipes/fashion/prism_kmeans_ipc50.yaml", ["data.num_classes=3"])
    assert "set synthesis.slots_per_batch=17" in one_line(error)


def test_a_preset_sets_what_the_recipe_does_not(tiny_recipe):
    values = tiny_recipe({"relabel.epochs": 500}, values=True)
    values["evaluation"] = {"student": "resnet50", "preset": "rd3", "lr": 0.5, "full_data_epochs": 0}
    made = parse_recipe(values).evaluation
    assert (made.epochs, made.batch_size, made.optimizer, made.loss, made.cosine_stretch) == (400, 50, "adam", "kl", 1.0)
    assert made.lr == 0.5, "what the recipe sets stays"
    values["evaluation"]["preset"] = "prism"
    made = parse_recipe(values)
    assert (made.evaluation.batch_size, made.evaluation.micro_batch, made.evaluation.loss) == (50, 25, "mse_ce")
    assert parse_recipe(to_dict(made)) == made, "the resolved recipe has every value"


def test_a_preset_on_the_command_line_replaces_the_protocol(tiny_recipe):
    resolved = to_dict(tiny_recipe({"relabel.epochs": 500}))
    made = parse_recipe(resolved, ["evaluation.preset=cda", "evaluation.seeds=[7]"]).evaluation
    assert (made.preset, made.batch_size, made.loss, made.temperature, made.seeds) == ("cda", 128, "kl", 20.0, (7,))
    made = parse_recipe(resolved, ["evaluation.lr=0.5", "evaluation.preset=rd3"]).evaluation
    assert (made.lr, made.epochs) == (0.5, 400), "the order of overrides does not matter"
    with pytest.raises(RecipeError, match="evaluation.preset: Input should be 'prism', 'rd3' or 'cda'"):
        parse_recipe(resolved, ["evaluation.preset=best"])
