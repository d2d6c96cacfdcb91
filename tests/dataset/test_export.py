# ruff: noqa: F811
import io
import json

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from each import each
from hub_fixtures import connected, hub, online, transport  # noqa: F401
from PIL import Image
from pipeline import add_card, mtimes, one_line, sha_tree, small_set
from safetensors.torch import load_file
from torchvision import transforms
from torchvision.datasets import ImageFolder

from prism_hf.dataset import export as module
from prism_hf.dataset.export import export
from prism_hf.errors import DataError, OutputError
from prism_hf.images.pixels import decode
from prism_hf.runtime.store import DRAFT

NASTY = [
    "../x",
    "a/b",
    "a:b",
    "CON",
    "",
    "ü<b>",
    "x" * 300,
    ".hidden",
    "tab\there\n",
    "test",
    "train",
    "漢字",
    "c\\d",
    "n. ",
]
SETS = [(1, "png"), (3, "png"), (3, "webp"), (3, "jpeg"), (1, "jpeg")]
EXTENSION = {"png": "png", "webp": "webp", "jpeg": "jpg"}
FORMATS = ["imagefolder", "rethinkdc", "ddranking"]
every_format = pytest.mark.parametrize("layout", FORMATS)


def make(folder, **options):
    recipe, names, table, _, _ = small_set(folder, **options)
    add_card(folder, recipe, names)
    return names, table


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A dataset with class names that are bad folder names, and enough slots to expose a lexical sort."""
    folder = tmp_path_factory.mktemp("export") / "set"
    return folder, *make(folder, channels=3, size=8, names=NASTY, ipc=11, epochs=1)


@pytest.fixture
def plain(tmp_path):
    folder = tmp_path / "set"
    make(folder, channels=1, size=8, ipc=2, epochs=1)
    return folder


def cached(tmp_path, *args, **options):
    return datasets.load_dataset(*args, cache_dir=str(tmp_path / "cache"), **options)


# -- imagefolder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "image_format"), SETS)
def test_a_class_folder_holds_the_stored_files_in_slot_order(tmp_path, channels, image_format):
    names, table = make(tmp_path / "set", channels=channels, image_format=image_format, epochs=1)
    target = export(tmp_path / "set", tmp_path / "folders", format="imagefolder")
    assert target == tmp_path / "folders"
    found = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    classes = json.loads(found.pop("classes.json"))
    assert classes == {str(index): name for index, name in enumerate(names)}
    assert found == {
        f"train/{label:05d}_class_{label}/{slot:05d}.{EXTENSION[image_format]}": data
        for data, label, slot in zip(table.encoded, table.labels.tolist(), table.slots.tolist(), strict=True)
    }
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert all(path.stat().st_mode & 0o777 == 0o755 for path in (target, target / "train"))


def test_no_class_name_escapes_or_breaks_a_folder(tmp_path, nasty):
    folder, names, _ = nasty
    target = export(folder, tmp_path / "out" / "folders", format="imagefolder")
    assert [path.name for path in sorted(target.iterdir())] == ["classes.json", "train"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    homes = sorted(path.name for path in (target / "train").iterdir())
    assert [int(home[:5]) for home in homes] == list(range(len(names)))
    for home in homes:
        assert home.isascii()
        assert len(home) <= 90
        assert set(home) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert not home.endswith((".", "_"))
    assert homes[0] == "00000_x"
    assert homes[1:3] == ["00001_a_b", "00002_a_b"], "numbers distinguish equal names"
    assert homes[4:6] == ["00004", "00005_u_b"]
    assert json.loads((target / "classes.json").read_text(encoding="utf-8")) == {str(i): n for i, n in enumerate(names)}
    assert {len(list((target / "train" / home).iterdir())) for home in homes} == {11}


def test_torchvision_gives_each_class_its_index(tmp_path, nasty):
    folder, names, table = nasty
    target = export(folder, tmp_path / "folders", format="imagefolder")
    read = ImageFolder(target / "train")
    assert len(read.classes) == len(names)
    assert read.targets == table.labels.tolist()
    assert [open(path, "rb").read() for path, _ in read.samples] == table.encoded
    for number in (0, 37, len(read) - 1):
        image, _ = read[number]
        assert torch.equal(transforms.functional.pil_to_tensor(image), decode(table.encoded[number], 3))


@pytest.mark.parametrize("how", ["folder", "imagefolder", "train folder"])
def test_datasets_library_gives_each_class_its_index(tmp_path, nasty, how):
    folder, names, table = nasty
    target = export(folder, tmp_path / "folders", format="imagefolder")
    if how == "folder":
        read = cached(tmp_path, str(target))
    else:
        read = cached(tmp_path, "imagefolder", data_dir=str(target if how == "imagefolder" else target / "train"))
    assert list(read) == ["train"], "no class name is mistaken for a split"
    read = read["train"].cast_column("image", datasets.Image(decode=False))
    assert len(read) == len(table.encoded)
    assert [int(name[:5]) for name in read.features["label"].names] == list(range(len(names)))
    rows = sorted((cell["path"], label) for cell, label in zip(read["image"], read["label"], strict=True))
    assert [label for _, label in rows] == table.labels.tolist()
    assert [open(path, "rb").read() for path, _ in rows] == table.encoded


@each("word", [word for words in datasets.data_files.SPLIT_KEYWORDS.values() for word in words])
@each("name", ["{}", "{}-tube", "a_{}", "A {} of", "{}7", "UPPER"])
def test_a_folder_is_never_named_like_a_split(word, name):
    name = word.upper() if name == "UPPER" else name.format(word)
    assert module._folder_name(3, name, 10) == "00003"
    assert module._folder_name(3, f"x{word}x", 10) == f"00003_x{word}x"


def test_numbers_have_more_digits_with_more_classes():
    names = [module._folder_name(index, "x", 100_001) for index in (99_999, 100_000)]
    assert names == sorted(names) == ["099999_x", "100000_x"]


# -- ddranking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "image_format"), SETS)
def test_ddranking_tensors_are_the_images_and_their_labels_class_by_class(tmp_path, channels, image_format):
    _, table = make(tmp_path / "set", channels=channels, image_format=image_format, epochs=1)
    target = export(tmp_path / "set", tmp_path / "tensors", format="ddranking")
    assert sorted(sha_tree(target)) == ["README.md", "classes.json", "tensors.safetensors"]
    found = load_file(target / "tensors.safetensors")
    order = sorted(range(len(table.labels)), key=lambda row: (int(table.labels[row]), int(table.slots[row])))
    assert found["image_tensor"].dtype == torch.uint8
    assert torch.equal(found["image_tensor"], torch.stack([decode(table.encoded[row], 3) for row in order]))
    assert found["hard_labels"].tolist() == [int(table.labels[row]) for row in order]
    assert torch.equal(found["soft_labels"], table.teacher_logits[order].float())
    # What the code of README.md gives to the evaluators, as their own dataset of tensors reads it.
    images = transforms.functional.normalize(found["image_tensor"] / 255, [0.5] * 3, [0.25] * 3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, found["soft_labels"]), batch_size=4)
    batch, logits = next(iter(loader))
    assert batch.dtype == logits.dtype == torch.float32
    assert "compute_metrics(image_tensor=images, soft_labels=" in (target / "README.md").read_text()


def test_ddranking_refuses_classes_of_different_sizes(plain, tmp_path):
    change(plain, rows=range(1, 8))
    with pytest.raises(DataError, match="DD-Ranking expects equally many images in each class, got 1 to 2"):
        export(plain, tmp_path / "tensors", format="ddranking")
    assert not (tmp_path / "tensors").exists()


# -- rethinkdc --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "image_format"), SETS)
def test_rethinkdc_finds_the_columns_it_expects(tmp_path, channels, image_format):
    _, table = make(tmp_path / "set", channels=channels, image_format=image_format, epochs=1)
    target = export(tmp_path / "set", tmp_path / "table", format="rethinkdc")
    assert sorted(sha_tree(target)) == ["README.md", "classes.json", "data/train-00000-of-00001.parquet"]
    loaded = cached(tmp_path, str(target))
    assert list(loaded) == ["train"]
    read = loaded["train"]
    assert read.features == datasets.Features({"image": datasets.Image(), "class_id": datasets.Value("int64")})
    assert read["class_id"][:] == table.labels.tolist()
    views = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.08, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    assert views(read[0]["image"]).shape == (3, 224, 224)
    stored = [cell["bytes"] for cell in read.cast_column("image", datasets.Image(decode=False))["image"]]
    for data, original in zip(stored, table.encoded, strict=True):
        assert torch.equal(decode(data, 3), decode(original, 3))
        if channels == 3:
            assert data == original
        else:
            picture = Image.open(io.BytesIO(data))
            assert (picture.mode, picture.format) == ("RGB", "PNG")


@pytest.mark.parametrize(("size", "groups"), [(1, 22), (7, 4), (22, 1)])
def test_one_row_group_is_in_memory_at_a_time(tmp_path, size, groups):
    _, table = make(tmp_path / "set", channels=3, classes=2, ipc=11, epochs=1)
    (path,) = (tmp_path / "set" / "data").iterdir()
    pq.write_table(pq.read_table(path), path, row_group_size=size)
    target = export(tmp_path / "set", tmp_path / "table", format="rethinkdc")
    file = pq.ParquetFile(target / "data" / "train-00000-of-00001.parquet")
    assert file.num_row_groups == groups
    assert file.read()["class_id"].to_pylist() == table.labels.tolist()
    assert [cell["bytes"] for cell in file.read()["image"].to_pylist()] == table.encoded


def test_an_export_names_nothing_local(plain, tmp_path):
    for layout in FORMATS:
        target = export(plain, tmp_path / layout, format=layout)
        assert not any(str(tmp_path).encode() in path.read_bytes() for path in target.rglob("*") if path.is_file())


# -- the target of an export ------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("kind", ["full folder", "hidden file", "file", "broken link", "inside", "itself"])
def test_a_target_that_is_in_use_is_refused(plain, tmp_path, kind, layout):
    target = tmp_path / "target"
    if kind in ("full folder", "hidden file"):
        target.mkdir()
        (target / (".x" if kind == "hidden file" else "x")).write_text("precious")
    elif kind == "file":
        target.write_text("precious")
    elif kind == "broken link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target = plain / "export" if kind == "inside" else plain
    before = mtimes(tmp_path), sha_tree(tmp_path)
    with pytest.raises(OutputError) as error:
        export(plain, target, format=layout)
    assert all(word in one_line(error) for word in (str(target), "; give "))
    assert (mtimes(tmp_path), sha_tree(tmp_path)) == before


@every_format
def test_an_empty_folder_is_filled(plain, tmp_path, layout):
    (tmp_path / "target").mkdir()
    export(plain, tmp_path / "target", format=layout)
    assert any((tmp_path / "target").iterdir())
    with pytest.raises(OutputError, match="not empty"):
        export(plain, tmp_path / "target", format=layout)


def test_the_current_directory_can_be_the_target(plain, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(plain, ".", format="imagefolder")
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["classes.json", "train"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "set"]


@every_format
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), DataError("a reason")])
@pytest.mark.parametrize("target_exists", [False, True])
def test_a_failure_halfway_leaves_nothing_behind(plain, tmp_path, monkeypatch, layout, failure, target_exists):
    path = plain / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=1)
    target, seen = tmp_path / "new" / "target", []
    if target_exists:
        target.mkdir(parents=True)
    read = module._pictures

    def half(*args, **options):
        for number, pictures in enumerate(read(*args, **options)):
            # A process killed here would leave the target unchanged, and a hidden folder beside it.
            seen.append(target.exists() and any(target.iterdir()))
            assert any(path.name.startswith(f"{DRAFT}target-") for path in target.parent.iterdir())
            if number == 5:
                raise failure
            yield pictures

    monkeypatch.setattr(module, "_pictures", half)
    expected = OutputError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as error:
        export(plain, target, format=layout)
    if expected is OutputError:
        assert all(word in one_line(error) for word in (str(target), "No space left on device"))
    assert seen == [False] * 6
    assert [path.name for path in target.parent.iterdir()] == (["target"] if target_exists else [])


def test_a_file_in_the_way_gives_a_one_line_error(plain, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError) as error:
        export(plain, tmp_path / "file" / "target", format="imagefolder")
    assert "Not a directory" in one_line(error) or "File exists" in one_line(error)


# -- datasets that cannot be exported ---------------------------------------------------------------------------------


def test_an_unknown_layout_gives_a_one_line_error(plain, tmp_path):
    with pytest.raises(DataError) as error:
        export(plain, tmp_path / "target", format="zip")
    assert all(word in one_line(error) for word in ("'zip'", "imagefolder", "rethinkdc"))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("transport", ["lfs"], indirect=True)
def test_a_hub_dataset_is_read_at_its_revision(connected, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    trees = []
    for seed in (0, 1):
        folder = tmp_path / f"set-{seed}"
        make(folder, size=8, ipc=2, epochs=1, seed=seed)
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        if seed:
            connected.commit("datasets", "org/set", files)
        else:
            connected.create("datasets", "org/set", files)
        trees.append(sha_tree(export(folder, tmp_path / f"here-{seed}", format="imagefolder")))
    newest, older, *_ = connected.history("datasets", "org/set")
    for number, revision in enumerate((older, newest)):
        target = export("org/set", tmp_path / f"there-{number}", format="imagefolder", revision=revision)
        assert sha_tree(target) == trees[number]
    assert trees[0] != trees[1]


@every_format
def test_a_foreign_dataset_gives_a_one_line_error(tmp_path, layout):
    (tmp_path / "foreign" / "data").mkdir(parents=True)
    path = tmp_path / "foreign" / "data" / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(path)
    with pytest.raises(DataError) as error:
        export(tmp_path / "foreign", tmp_path / "target", format=layout)
    assert all(word in one_line(error) for word in ("foreign", "image, label, slot"))
    with pytest.raises(DataError, match="cannot be loaded"):
        export(tmp_path / "missing", tmp_path / "target", format=layout)


def change(folder, *, rows=None, **columns):
    """Reduce the dataset to some rows, or replace the cells of a column."""
    path = folder / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    for name, values in columns.items():
        column = pa.array(values, type=table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    pq.write_table(table if rows is None else table.take(pa.array(rows, pa.int64())), path)


def cells(folder, data):
    first, *others = pq.read_table(folder / "data" / "train-00000-of-00001.parquet")["image"].to_pylist()
    return [None if data == "no cell" else first | {"bytes": data}, *others]


def bmp():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "BMP")
    return buffer.getvalue()


@every_format
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"rows": []}, ["no image of class 'class 0'"]),
        ({"rows": [0, 1, 4, 5, 6, 7]}, ["no image of class 'class 1'"]),
        ({"label": [0, 0, 1, 1, 2, 2, 3, -1]}, ["class -1", "0 to 3"]),
        ({"label": [0, 0, 1, 1, 2, 2, 3, None]}, ["class None", "0 to 3"]),
        ({"slot": [0, 0, 0, 1, 0, 1, 0, 1]}, ["several images of class 'class 0' in slot 0"]),
        (b"no picture", ["row 0", "no readable image"]),
        (None, ["row 0", "no readable image"]),
        ("no cell", ["row 0", "no readable image"]),
        ("bmp", ["row 0", "BMP", "expected PNG"]),
    ],
)
def test_a_damaged_dataset_gives_a_one_line_error(plain, tmp_path, layout, damage, words):
    if not isinstance(damage, dict):
        damage = {"image": cells(plain, bmp() if damage == "bmp" else damage)}
    change(plain, **damage)
    with pytest.raises(DataError) as error:
        export(plain, tmp_path / "target", format=layout)
    text = one_line(error)
    assert all(word in text for word in [str(plain), *words]), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_the_order_of_rows_does_not_change_the_export(plain, tmp_path):
    expected = sha_tree(export(plain, tmp_path / "before", format="imagefolder"))
    change(plain, rows=[7, 0, 3, 2, 6, 5, 4, 1])
    assert sha_tree(export(plain, tmp_path / "after", format="imagefolder")) == expected


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "I;16", "RGB"])
def test_every_mode_becomes_three_channels_for_rethinkdc(plain, tmp_path, mode):
    buffer = io.BytesIO()
    Image.new(mode, (4, 4)).save(buffer, "PNG")
    change(plain, image=cells(plain, buffer.getvalue()))
    target = export(plain, tmp_path / "table", format="rethinkdc")
    data = pq.read_table(target / "data" / "train-00000-of-00001.parquet")["image"][0].as_py()["bytes"]
    assert Image.open(io.BytesIO(data)).mode == "RGB"
    assert (data == buffer.getvalue()) == (mode == "RGB")
