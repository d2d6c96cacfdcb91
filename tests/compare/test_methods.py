import dataclasses

import pytest
from comparisons import named
from pipeline import one_line, tiny

from prism_hf.compare.comparison import StudentSetup
from prism_hf.compare.methods import PROTOCOL, RANDOM, Method, random_recipe, under_one_protocol
from prism_hf.errors import RecipeError
from prism_hf.recipe.schema import to_dict

OTHERS = ("seed=3", "relabel.epochs=1", "squeeze.lr=0.1", "packaging.image_format=jpeg", "evaluation.seeds=[4]",
          "teachers.verifier=squeeze:test_resnet")  # fmt: skip


def test_the_first_recipe_sets_the_protocol_and_the_control_is_first():
    first, other = tiny("name=a"), tiny("name=b", "synthesis.lr=0.3", *OTHERS)
    methods, notes = under_one_protocol([("A", first), ("B", other)])
    assert [(method.label, method.control) for method in methods] == [(RANDOM, True), ("A", False), ("B", False)]
    assert methods[1].recipe == first
    for method in methods:
        assert all(getattr(method.recipe, key) == getattr(first, key) for key in PROTOCOL)
        assert method.recipe.teachers.verifier is None
        assert method.recipe.seed == first.seed
    assert (methods[2].recipe.synthesis, methods[2].recipe.teachers.bn_pool) == (other.synthesis, other.teachers.bn_pool)
    given_way = ("evaluation.seeds", "packaging.image_format", "relabel.epochs", "squeeze.lr", "teachers.verifier")
    assert sorted(notes) == [f"B: {key} is taken from A" for key in given_way]


def test_a_method_keeps_its_own_sections():
    first, other = tiny("name=a"), tiny("name=b", "relabel.epochs=1", "packaging.image_format=jpeg")
    methods, notes = under_one_protocol([("A", first), ("B", other)], own=("relabel",))
    assert methods[2].recipe.relabel == other.relabel
    assert methods[2].recipe.packaging == first.packaging
    assert notes == ["B: packaging.image_format is taken from A"]


def test_a_protocol_that_does_not_fit_a_method_gives_a_one_line_error():
    other = tiny("name=b", "synthesis.ipc=1", "relabel.batch_size=5")
    with pytest.raises(RecipeError) as error:
        under_one_protocol([("A", tiny("relabel.batch_size=20")), ("B", other)])
    assert "relabel.batch_size is 20 but there are 10 images" in one_line(error)


def test_every_size_has_its_control():
    methods, _ = under_one_protocol([("A", tiny()), ("B", tiny("synthesis.ipc=3"))])
    controls = {method.label: method.recipe.synthesis.ipc for method in methods if method.control}
    assert controls == {f"{RANDOM}, ipc 2": 2, f"{RANDOM}, ipc 3": 3}
    assert len({method.slug for method in methods}) == 4


def test_a_random_recipe_given_by_the_user_is_the_control():
    own = random_recipe(tiny(), 2)
    methods, _ = under_one_protocol([("prism", tiny()), ("chance", own)])
    assert [(method.label, method.control) for method in methods] == [("chance", True), ("prism", False)]
    (job_of_control,) = [method for method in methods if method.control]
    assert job_of_control.recipe.method == "random"


def test_the_control_shares_everything_that_it_reads():
    made = random_recipe(tiny("teachers.verifier=squeeze:test_resnet"), 5)
    assert (made.method, made.synthesis.ipc, made.num_images) == ("random", 5, 50)
    assert (made.teachers.logit, made.teachers.bn_pool) == ("squeeze:test_byobnet", ())
    assert made.teachers.verifier == "squeeze:test_resnet"
    assert all(getattr(made, key) == getattr(tiny(), key) for key in PROTOCOL)


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        ([], "at least one recipe"),
        (["a", "a"], "'a'"),
        (["A b", "a-B"], "give each recipe its own name"),
        (["random real"], "random"),
    ],
)
def test_indistinguishable_methods_give_a_one_line_error(labels, word):
    with pytest.raises(RecipeError) as error:
        under_one_protocol([(label, tiny()) for label in labels])
    assert word in one_line(error)


@pytest.mark.parametrize(("own", "expected"), [((), 0), (("squeeze.seed=7",), 7)])
def test_a_run_has_its_own_seed_and_shared_teachers(own, expected):
    (_, method), _ = under_one_protocol([("PRISM!", tiny(*own))])
    for seed in (0, 5):
        made = method.seeded(seed)
        assert (made.seed, made.evaluation.seeds, made.squeeze.seed) == (seed, (seed,), expected)
        assert made.name == method.slug == "prism-ipc2"
        same = dataclasses.replace(made.squeeze, seed=None), dataclasses.replace(method.recipe.squeeze, seed=None)
        assert same[0] == same[1]
        assert to_dict(made)["synthesis"] == to_dict(method.recipe)["synthesis"]


def test_folder_names_and_labels_are_plain():
    assert Method("Ünïcode / ../x", tiny()).slug == "n-code-x-ipc2"
    assert len(Method("x" * 300, tiny()).slug) == 80
    assert [StudentSetup("s", "soft").key, StudentSetup("s", "hard").key, StudentSetup("s", "soft", 10).key] == [
        "soft",
        "hard",
        "soft-10",
    ]
    assert [label for label, _ in named("prism")] == ["prism"]


def test_cells_of_views_belong_to_the_images_of_a_method():
    mosaic = "synthesis.mosaic={crops: 1, crop_scale: [1, 1]}"
    grid = tiny("name=grid", "synthesis.init=mosaic", mosaic, "relabel.view.cell=2")
    plain = tiny("name=plain", "relabel.view.flip=false")
    for recipes in ([grid, plain], [plain, grid]):
        methods, notes = under_one_protocol([(recipe.name, recipe) for recipe in recipes])
        cells = {method.label: method.recipe.relabel.view.cell for method in methods}
        assert cells == {RANDOM: None, "grid": 2, "plain": None}
        assert len({method.recipe.relabel.view.flip for method in methods}) == 1, "everything else is the protocol's"
        assert not any("cell" in note for note in notes)
