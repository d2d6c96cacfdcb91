"""Classes are found by WordNet id or name, wherever they stand."""

import datasets
import numpy as np
import pytest
from each import each
from PIL import Image
from pipeline import one_line

from prism_hf.errors import DataError
from prism_hf.images.classes import choose_classes, find_classes, imagenet_classes, names_of
from prism_hf.images.source import load_source, load_test_split, no_images
from prism_hf.recipe.named_classes import NAMED_CLASSES
from prism_hf.recipe.sections import DataRecipe

IDS, NAMES = zip(*imagenet_classes(), strict=True)
PETS = ("cat", "n02110185", "English springer", "dog, hound")


def found(wanted, names):
    return find_classes(wanted, names, "x", DataError)


SHORT = tuple(name.split(",")[0].replace(" ", "_").lower() for name in NAMES)


@each("names", [NAMES, IDS, NAMES[::-1], SHORT])
def test_named_parts_of_imagenet_are_found_in_every_spelling(names):
    for part, ids in NAMED_CLASSES.items():
        numbers = choose_classes(part, names, "x", DataError)
        expected = [IDS.index(i) for i in ids]
        if names == NAMES[::-1]:
            expected = [999 - number for number in expected]
        assert list(numbers) == expected


def test_named_parts_have_their_published_sizes():
    assert {part: len(set(ids)) for part, ids in NAMED_CLASSES.items()} == {
        "imagenette": 10, "imagewoof": 10, "imagenet-100": 100,
    }  # fmt: skip


def test_all_of_imagenet_is_found_in_itself():
    assert found(NAMES, IDS) == found(IDS, NAMES) == tuple(range(1000))


@each("wanted, numbers", [
    (["cat"], [0]), (["Cat"], [0]), (["Siberian husky"], [1]), (["n02102040"], [2]), (["hound", "dog"], [3, 3]),
])  # fmt: skip
def test_a_class_is_found_by_id_name_and_each_of_its_names(wanted, numbers):
    assert list(found(wanted, PETS)) == numbers


@each("wanted, words", [
    (["crane"], "may be 'crane' (number 134) and 'crane' (517) of x; name it by its WordNet id"),
    (["goldfishes"], "class 'goldfishes' is not one of the 1000 classes of x"),
    (["n99999999"], "class 'n99999999' is not one of"),
])  # fmt: skip
def test_unknown_and_ambiguous_classes_are_refused(wanted, words):
    with pytest.raises(DataError) as error:
        found(wanted, NAMES)
    assert words in one_line(error)


def test_ambiguous_names_of_a_part_carry_their_id():
    own = names_of([134, 517, 0], NAMES)
    assert own == ("crane (n02012849)", "crane (n03126707)", "tench, Tinca tinca")
    assert found(own, NAMES) == (134, 517, 0)


@each("part, words", [
    ((0, "tench"), "names class 'tench, Tinca tinca' of x twice"),
    ((0, 1000), "data.classes has 1000, but x has 1000 classes, 0 to 999"),
])  # fmt: skip
def test_a_part_is_checked(part, words):
    with pytest.raises(DataError) as error:
        choose_classes(part, NAMES, "x", DataError)
    assert words in one_line(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images whose gray level is their class, in five classes named by WordNet id; 3 and 2 per class."""
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 3), ("test", 2)):
        for number in range(5):
            place = root / split / IDS[number]
            place.mkdir(parents=True)
            for image in range(count):
                Image.fromarray(np.full((16, 16), 40 * number + image, np.uint8)).save(place / f"{image}.png")
    return root


def data(folder, **changes):
    return DataRecipe(
        **{"source": str(folder), "num_classes": 2, "size": 16, "channels": 1, "classes": ("stingray", 1)} | changes
    )


def levels(split):
    return (split.images(np.arange(len(split)))[:, 0, 0, 0] // 40).tolist()


def test_only_images_of_the_part_are_read_and_numbered_by_their_place(folder):
    with pytest.raises(DataError, match="class 'stingray' is not one of the 5 classes"):
        load_source(data(folder))
    real = load_source(data(folder, classes=("great white shark", 0)))
    assert real.class_names == ("n01484850", "n01440764")
    for split, count in ((real.train, 3), (real.test, 2)):
        assert sorted(split.labels.tolist()) == [0] * count + [1] * count
        assert levels(split) == [[2, 0][label] for label in split.labels]
    assert real.distilled_classes == real.num_classes == 2


def test_with_all_logits_the_other_classes_come_after_the_part(folder):
    real = load_source(data(folder, classes=("great white shark", 0), class_logits="full", num_classes=5))
    assert real.class_names == tuple(IDS[number] for number in (2, 0, 1, 3, 4))
    assert set(real.train.labels.tolist()) == {0, 1}
    assert (real.distilled_classes, real.num_classes) == (2, 5)


def test_held_out_images_are_of_the_part(folder):
    real = load_source(data(folder, classes=("tench", "goldfish"), validation_fraction=0.34))
    assert sorted(levels(real.train) + levels(real.test)) == [0, 0, 0, 1, 1, 1]


def test_a_test_set_with_more_classes_is_matched_by_name(folder):
    other = load_test_split(data("none"), str(folder), "test", ("tiger shark, Galeocerdo cuvieri", "tench"))
    assert levels(other) == [[3, 0][label] for label in other.labels]
    assert len(other) == 4


def test_without_images_the_classes_are_those_of_the_teacher():
    real = no_images(data("none", classes=("tench", 1)), NAMES)
    assert real.class_names == NAMES[:2]
    assert len(real.train) == len(real.test) == 0
    with pytest.raises(DataError, match="the logit teacher has 1000 classes; set data.classes"):
        no_images(data("none", classes=None), NAMES)


@each("changes, words", [
    ({"classes": (0, 1, 2)}, "classes has 3 classes, num_classes is 2"),
    ({"classes": "imagenette"}, "classes has 10 classes, num_classes is 2"),
    ({"classes": (0, 1, 2), "class_logits": "full"}, "classes has 3 classes, num_classes is 2"),
    ({"classes": None, "class_logits": "full"}, "class_logits belongs to classes"),
    ({"classes": (0,)}, "at least 2 items"),
])  # fmt: skip
def test_contradictory_parts_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        data("none", **changes)


def test_a_column_of_strings_works_too(tmp_path):
    columns = {"image": [Image.new("L", (16, 16), n) for n in range(6)], "label": ["b", "a", "c"] * 2}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    table = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    real = load_source(data(tmp_path / "saved", classes=("c", "a")))
    assert real.class_names == ("c", "a")
    assert [real.train.images([n])[0, 0, 0, 0].item() for n in range(4)] == [1, 2, 4, 5]
    assert real.train.labels.tolist() == [1, 0, 1, 0]
