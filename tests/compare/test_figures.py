import copy

import numpy as np
import pytest
import torch
from comparison_fixture import make_comparison, make_sparse
from PIL import Image

from prism_hf.compare.figures import (
    draw_accuracy,
    draw_comparison,
    draw_grids,
    draw_map,
    draw_similarity,
    in_order,
    picture_names,
)  # fmt: skip

ALL = ("accuracy", "grids", "similarity", "map")


def size(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert not {"Software", "date", "Creation Time"} & set(picture.info)
        assert picture.convert("L").getextrema() != (255, 255)
        return picture.size


@pytest.fixture(scope="module")
def made():
    return make_comparison(methods=2, classes=4, ipc=3)


def test_the_same_comparison_gives_the_same_bytes(tmp_path, made):
    one, two = (draw_comparison(tmp_path / name, *made) for name in ("one", "two"))
    assert tuple(one) == ALL == tuple(picture_names(made[0]))
    for name in ALL:
        assert one[name].name == f"{name}.png"
        assert one[name].read_bytes() == two[name].read_bytes()
        assert size(one[name])[0] <= 1200


CHANGES = {
    "accuracy": lambda comparison, _: comparison["scores"][2].update(mean=0.9),
    "similarity": lambda comparison, _: comparison["methods"][1]["histogram"]["density"].reverse(),
    "map": lambda comparison, _: comparison["methods"][1]["points"]["xy"][0].reverse(),
    "grids": lambda _, grids: grids["SRe2L"].fill_(0),
}


def test_a_long_name_does_not_run_into_the_next_panel(tmp_path, made):
    comparison, grids = copy.deepcopy(made)
    first, second, *_ = in_order(comparison)
    for method, name in ((first, "all images of mine, with nothing left out"[:33]), (second, "b")):
        grids[name] = grids.pop(method["label"])
        method["label"] = name
    draw_grids(tmp_path / "grids.png", comparison, {name: grids[name] for name in (first["label"], "b")})
    with Image.open(tmp_path / "grids.png") as picture:
        ink = np.asarray(picture.convert("L")) < 200
    drawn_columns = np.flatnonzero(ink[ink.shape[0] // 2 :].any(0))
    start = drawn_columns[np.flatnonzero(np.diff(drawn_columns) > 8)[-1] + 1]
    assert not ink[:, start - 6 : start].any()


@pytest.mark.parametrize("letters", [25, pytest.param(80, marks=pytest.mark.slow)])
def test_class_names_that_differ_only_at_their_end_are_told_apart(tmp_path, letters):
    comparison, grids = make_comparison(methods=2, classes=4, ipc=3)
    pictures = {}
    for end in "12":
        comparison["data"]["classes"][3] = f"{'one long name after another ' * 5}"[: letters - 1] + end
        draw_grids(tmp_path / "grids.png", comparison, grids)
        draw_map(tmp_path / "map.png", comparison)
        for name in ("grids", "map"):
            with Image.open(tmp_path / f"{name}.png") as picture:
                pictures[name, end] = np.asarray(picture.convert("L"))
    for name in ("grids", "map"):
        assert (pictures[name, "1"] != pictures[name, "2"]).any(), name
        assert (pictures[name, "1"][:, :3] == 255).all(), "nothing is cut off at the left"


def test_each_picture_depends_on_its_facts(tmp_path, made):
    comparison, grids = copy.deepcopy(made)
    before = draw_comparison(tmp_path / "before", comparison, grids)
    draw = {"accuracy": draw_accuracy, "similarity": draw_similarity, "map": draw_map}
    for name, change in CHANGES.items():
        changed = copy.deepcopy((comparison, grids))
        change(*changed)
        if name == "grids":
            draw_grids(tmp_path / "after.png", *changed)
        else:
            draw[name](tmp_path / "after.png", changed[0])
        assert before[name].read_bytes() != (tmp_path / "after.png").read_bytes(), name


def test_many_methods_and_students_wrap(tmp_path):
    comparison, grids = make_comparison(methods=15, students=("a", "b", "c"), kinds=("soft", "image", "hard"), ipc=2)
    for path in draw_comparison(tmp_path, comparison, grids).values():
        assert max(size(path)) < 3000


def test_one_image_per_class_and_one_seed(tmp_path):
    comparison, grids = make_comparison(methods=2, ipc=1, seeds=1)
    assert (
        tuple(draw_comparison(tmp_path, comparison, grids))
        == ("accuracy", "grids", "map")
        == tuple(picture_names(comparison))
    )


def test_many_classes_are_limited_to_twenty(tmp_path):
    comparison, grids = make_comparison(methods=2, classes=30, ipc=(2, 3))
    draw_grids(tmp_path / "whole.png", comparison, grids)
    for label in grids:
        ipc = len(grids[label]) // 30
        grids[label][20 * ipc :] = 0
    draw_grids(tmp_path / "cut.png", comparison, grids)
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "cut.png").read_bytes()


def test_unknown_facts_are_not_drawn(tmp_path, made):
    sparse = make_sparse(made[0])
    assert tuple(draw_comparison(tmp_path, sparse, made[1])) == ("accuracy", "grids", "map")
    assert draw_comparison(tmp_path, sparse | {"methods": [], "scores": []}, {}) == {}


def test_large_color_images_of_any_shape(tmp_path):
    comparison, _ = make_comparison(methods=2, classes=3, ipc=7)
    grids = {m["label"]: torch.randint(256, (21, 3, 64, 48), dtype=torch.uint8) for m in comparison["methods"]}
    assert max(size(draw_comparison(tmp_path, comparison, grids)["grids"])) <= 1200


@pytest.mark.parametrize(("change", "word"), [("drop", "random real"), ("add", "stranger"), ("cut", "multiple")])
def test_images_that_do_not_fit_the_methods_are_refused(tmp_path, made, change, word):
    comparison, grids = made[0], dict(made[1])
    if change == "drop":
        del grids["random real"]
    elif change == "add":
        grids["stranger"] = grids["SRe2L"]
    else:
        grids["SRe2L"] = grids["SRe2L"][1:]
    with pytest.raises(ValueError, match=word):
        draw_grids(tmp_path / "grids.png", comparison, grids)


NAMES = ["$x$", "$", "<script>", "line\nbreak", "a\u202eb", "x" * 400, "\\frac{ $\\frac{}$", "", "日本"]


def test_any_name_can_be_drawn(tmp_path, recwarn):
    comparison, grids = make_comparison(methods=9, classes=9, ipc=2)
    comparison["data"]["classes"] = NAMES
    named = dict(zip(grids, NAMES, strict=True))
    for method in comparison["methods"]:
        method["label"] = named[method["label"]]
    for score in comparison["scores"]:
        score |= {"method": named[score["method"]], "student": "$\\frac{"}
    written = draw_comparison(tmp_path, comparison, {named[label]: images for label, images in grids.items()})
    assert max(max(size(path)) for path in written.values()) < 3000
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_methods_are_ordered_by_images_per_class_with_the_control_first():
    comparison, _ = make_comparison(methods=2, ipc=(5, 2))
    comparison["methods"].reverse()
    order = [(method["ipc"], method["control"]) for method in in_order(comparison)]
    assert order == [(2, True), (2, False), (5, True), (5, False)]


def test_pictures_do_not_change_matplotlib_settings(tmp_path, made):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_comparison(tmp_path, *made)
    assert dict(matplotlib.rcParams) == before
