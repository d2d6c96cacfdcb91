# ruff: noqa: F811
"""Attacks with hostile files, names and links. Each bomb creates a file if it is ever executed.

Other files test weights on the Hub (test_weights), text in cards (test_card, test_model_card, test_readme), class names as
folder names (test_export), the pushed files (test_bundle), and the token in a push (test_hub, test_push).
"""

import io
import json
import logging
import os
import re
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from each import diagonal, each, product
from foreign_teachers import Bomb, bomb_in, resnet
from hub_fixtures import connected, hub, online, transport  # noqa: F401
from pipeline import ROOT, TINY, add_card, launch, one_line, random_picture, save_timm, sha_tree, small_set, tiny

from prism_hf.cli.main import main
from prism_hf.dataset.export import export
from prism_hf.dataset.provenance import check_folder
from prism_hf.dataset.reader import load_distilled
from prism_hf.errors import DataError, HubError, PrismError, RecipeError, TeacherError
from prism_hf.hub.bundle import bundle_of
from prism_hf.hub.merge import merge_readme
from prism_hf.hub.repository import Repository, Target
from prism_hf.images.source import load_source
from prism_hf.models.load import load_teacher
from prism_hf.recipe.sections import DataRecipe
from prism_hf.recipe.yaml_file import load_recipe, parse_recipe
from prism_hf.run.context import make_accelerator
from prism_hf.run.distill import start_trackers
from prism_hf.runtime.untrusted import homes_of, is_inside, is_plain_path, stray_link, without_password

CPU = torch.device("cpu")
lfs_only = pytest.mark.parametrize("transport", ["lfs"], indirect=True)


@pytest.fixture
def bomb(tmp_path):
    """Yield bytes that create a file when they are unpickled; the test must never unpickle them."""
    data, fired = bomb_in(tmp_path)
    yield data
    assert not fired.exists()


def code(tmp_path):
    """Return the code of a module that creates the same file."""
    return f"open({str(tmp_path / 'fired')!r}, 'w')\n".encode()


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    return save_timm(tmp_path_factory.mktemp("security") / "timm")


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    return resnet(tmp_path_factory.mktemp("security") / "resnet")


@pytest.fixture
def network(request, tmp_path, timm_folder, transformers_folder):
    """Return the prefix of a teacher's name, and a copy of a folder of that kind."""
    kind = getattr(request, "param", "local-dir")
    source = timm_folder if kind == "local-dir" else transformers_folder
    return kind, Path(shutil.copytree(source, tmp_path / "net"))


both = pytest.mark.parametrize("network", ["local-dir", "transformers"], indirect=True)


def refused(kind, folder, *words):
    with pytest.raises(TeacherError) as error:
        load_teacher(f"{kind}:{folder}", device=CPU)
    text = one_line(error)
    assert all(word in text for word in words), text


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- pickles and code in teachers -------------------------------------------------------------------------------------

PICKLED = (
    "pytorch_model.bin", "model.bin", "model.ckpt", "model.pt", "net.pth", "training_args.bin", "model.npz", "tf_model.h5",
    "flax_model.msgpack", "pytorch_model-00001-of-00002.bin",
)  # fmt: skip


@both
@pytest.mark.parametrize("name", PICKLED)
def test_a_folder_with_only_pickled_weights_is_refused(network, bomb, name):
    kind, folder = network
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(bomb)
    if name == "pytorch_model-00001-of-00002.bin":
        index = {"metadata": {}, "weight_map": {"fc.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(kind, folder, "has no model.safetensors" if kind == "local-dir" else "safetensors")


@both
def test_pickles_beside_safe_weights_are_ignored(network, bomb):
    kind, folder = network
    for name in PICKLED:
        (folder / name).write_bytes(bomb)
    assert load_teacher(f"{kind}:{folder}", device=CPU).num_classes == 3


@both
@pytest.mark.parametrize("where", ["folder", "Hub"])
def test_a_pickle_named_model_safetensors_is_refused(request, network, bomb, where, tmp_path, monkeypatch):
    kind, folder = network
    (folder / "model.safetensors").write_bytes(bomb)
    if where == "folder":
        return refused(kind, folder, "cannot be loaded")
    server = served(request, tmp_path, monkeypatch)
    server.create("models", "org/net", {path.name: path.read_bytes() for path in folder.iterdir()})
    refused("hf-hub" if kind == "local-dir" else kind, "org/net", "cannot be loaded")


def served(request, tmp_path, monkeypatch):
    """Return the test Hub, with empty caches."""
    request.getfixturevalue("online")
    server = request.getfixturevalue("hub")
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data-cache")
    return server


@pytest.mark.parametrize("key", ["file", "url", "hf_hub_filename"])
def test_outside_weights_named_in_a_timm_config_are_not_opened(network, bomb, key, tmp_path):
    kind, folder = network
    (tmp_path / "bomb.bin").write_bytes(bomb)
    place = str(tmp_path / "bomb.bin")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {key: f"file://{place}" if key == "url" else place, "custom_load": True, "source": "file"}
    change(folder / "config.json", pretrained_cfg=config["pretrained_cfg"])
    assert load_teacher(f"{kind}:{folder}", device=CPU).num_classes == 3
    change(folder / "config.json", model_args={"checkpoint_path": place, "pretrained_cfg": {"file": place}})
    refused(kind, folder, "cannot be loaded")


def test_a_checkpoint_in_the_arguments_of_a_wrapped_timm_model_is_not_opened(network, bomb, tmp_path):
    _, folder = network
    (tmp_path / "bomb.bin").write_bytes(bomb)
    change(folder / "config.json", model_type="timm_wrapper", model_args={"checkpoint_path": str(tmp_path / "bomb.bin")})
    refused("transformers", folder, "names another checkpoint")


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("network", ["transformers"], indirect=True)
def test_code_in_a_teacher_folder_is_not_run(network, bomb, tmp_path, file):
    kind, folder = network
    (folder / "custom_code.py").write_bytes(code(tmp_path))
    names = ("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor")
    change(folder / file, auto_map=dict.fromkeys(names, "custom_code.Evil"))
    if file == "config.json":
        change(folder / file, model_type="evil")
    else:
        change(folder / file, image_processor_type="Evil")
    refused(kind, folder, "cannot be loaded")


@both
@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 3, '{"a": ' * 100_000, "3", '"x"', "null"])
def test_an_invalid_config_gives_one_error_line(network, text):
    kind, folder = network
    (folder / "config.json").write_text(text)
    refused(kind, folder)


# -- pickles and code in data -----------------------------------------------------------------------------------------


def picture(seed=0):
    buffer = io.BytesIO()
    random_picture(8, 8, seed=seed).save(buffer, "PNG")
    return buffer.getvalue()


def class_folders(folder):
    """Write an ImageFolder with two classes, and return its path."""
    for number, part in enumerate(("train", "test")):
        for label in ("ant", "bee"):
            (folder / part / label).mkdir(parents=True)
            for row in range(2):
                (folder / part / label / f"{row}.png").write_bytes(picture(2 * number + row))
    return folder


def source(place, **values):
    return DataRecipe(source=str(place), num_classes=2, size=16, **values)


def pixels(recipe):
    data = load_source(recipe)
    return data.train.images(range(len(data.train)))


def bad_data(place, *words, **values):
    with pytest.raises(DataError) as error:
        pixels(source(place, **values))
    text = one_line(error)
    assert all(word in text for word in words), text
    return text


def test_the_unmodified_image_folder_loads(tmp_path):
    assert pixels(source(class_folders(tmp_path / "data"))).shape == (4, 3, 16, 16)


def object_array(bomb_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(bomb_path)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def extension_table(bomb):
    """Return a table whose column has an extension type that older versions of pyarrow unpickle."""
    hostile = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bomb}
    return pa.table({"x": [1, 2]}, schema=pa.schema([pa.field("x", pa.int64(), metadata=hostile)]))


def write_arrow(path, table):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def hostile_data(folder, kind, bomb, tmp_path):
    """Write a folder with content that a loader might execute, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "script":
        (folder / f"{folder.name}.py").write_bytes(code(tmp_path))
        (folder / "dataset_infos.json").write_text("{}")
    elif kind == "pickle":
        for name in ("train.pkl", "train.pickle", "train.pt", "train.npy", "train.npz"):
            (folder / name).write_bytes(bomb)
        (folder / "test.npy").write_bytes(object_array(tmp_path / "fired"))
    elif kind == "arrow":
        write_arrow(folder / "train.arrow", extension_table(bomb))
    elif kind == "parquet":
        pq.write_table(extension_table(bomb), folder / "train.parquet")
    elif kind == "saved":
        part = datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]})
        datasets.DatasetDict(train=part, test=part).save_to_disk(folder)
        (file,) = (folder / "train").glob("*.arrow")
        write_arrow(file, extension_table(bomb))
        for name in ("state.json", "dataset_info.json"):
            (folder / "train" / f"{name}.pkl").write_bytes(bomb)
    return folder


KINDS = ["script", "pickle", "arrow", "parquet", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_could_run_code_gives_one_error_line(tmp_path, bomb, kind):
    place = hostile_data(tmp_path / "evil", kind, bomb, tmp_path)
    bad_data(place)
    with pytest.raises(DataError) as error:
        load_distilled(place)
    one_line(error)


@pytest.mark.parametrize("kind", ["script", "pickle", "arrow", "parquet", "tar"])
def test_hub_data_that_could_run_code_gives_one_error_line(request, tmp_path, monkeypatch, bomb, kind):
    server = served(request, tmp_path, monkeypatch)
    if kind == "tar":
        files = {"train.tar": tar({"0.png": picture(), "0.pyd": bomb, "0.pkl": bomb, "0.pth": bomb})}
    else:
        folder = hostile_data(tmp_path / "evil", kind, bomb, tmp_path)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.create("datasets", "org/evil", files)
    bad_data("org/evil", label_column="json", image_column="png")
    with pytest.raises(DataError) as error:
        load_distilled("org/evil")
    one_line(error)


def tar(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["pandas", "text", "csv", "imagefolder", "webdataset"])
def test_a_folder_named_like_a_datasets_loader_does_not_read_nearby_files(tmp_path, monkeypatch, bomb, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "around.pkl").write_bytes(bomb)
    (tmp_path / "around.csv").write_text("x\nsecret\n")
    class_folders(tmp_path / name)
    assert load_source(source(name)).class_names == ("ant", "bee")
    shutil.rmtree(tmp_path / name)
    bad_data(name, "neither a folder here nor a Hub id")
    with pytest.raises(DataError, match="neither a folder here nor a Hub id"):
        load_distilled(name)


FEATURES = [
    b"{", b"[]", b"3", b'{"info": 3}', b'{"info": {"features": 3}}', b"[" * 100_000,
    b'{"info": {"features": {"x": {"_type": "os.system"}}}}', b'{"info": {"features": {"x": {"_type": "Pdf"}}}}',
    b'{"info": {"features": {"x": {"_type": "ClassLabel", "names_file": "/etc/passwd"}}}}',
    b'{"info": {"features": {"x": {"_type": "Value", "dtype": "__import__(\'os\')"}}}}',
    b'{"info": {"features": {"x": [[[[3]]]]}}}',
]  # fmt: skip


@pytest.mark.parametrize("features", FEATURES, ids=lambda text: text[:50].decode())
def test_invalid_features_in_a_table_give_one_error_line(tmp_path, features):
    (tmp_path / "set" / "data").mkdir(parents=True)
    table = pa.table({"x": [1, 2]}).replace_schema_metadata({b"huggingface": features})
    pq.write_table(table, tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    assert "root:" not in bad_data(tmp_path / "set" / "data")
    with pytest.raises(DataError, match="not readable as Parquet|no column image, label") as error:
        load_distilled(tmp_path / "set")
    assert "root:" not in one_line(error)


def test_class_names_are_not_read_from_another_file(distilled):
    path = distilled / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    notes = json.loads(table.schema.metadata[b"huggingface"])
    notes["info"]["features"]["label"] = {"_type": "ClassLabel", "names_file": "/etc/passwd"}
    pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(notes).encode()}), path)
    with pytest.raises(DataError) as error:
        load_distilled(distilled)
    assert "root:" not in one_line(error)


# -- data that refers to files outside its folder ---------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path):
    """Return the path of a private image that is not part of the data."""
    place = tmp_path / "private" / "secret.png"
    place.parent.mkdir()
    place.write_bytes(picture(9))
    return place


@pytest.mark.parametrize(
    "how", ["{}", "../private/*.png", "file://{}", "private/../../private/secret.png", "http://e/x.png"]
)
@pytest.mark.parametrize("shape", ["text", "list", "split", "folder"])
def test_a_card_that_names_data_outside_the_folder_is_refused(tmp_path, secret, how, shape):
    folder, path = class_folders(tmp_path / "data"), how.format(secret)
    config = {
        "text": {"data_files": path},
        "list": {"data_files": ["train/*/*.png", path]},
        "split": {"data_files": [{"split": "train", "path": [path]}]},
        "folder": {"data_dir": path},
    }[shape]
    header = yaml.safe_dump({"configs": [{"config_name": "default"} | config]})
    (folder / "README.md").write_text(f"---\n{header}---\n")
    bad_data(folder, "README.md", "not below the folder")


@pytest.mark.parametrize("how", ["{}", "../private/*.parquet", "file://{}", "http://e/x.parquet"])
@pytest.mark.parametrize("key", ["data_files", "data_dir"])
def test_loading_a_distilled_dataset_ignores_paths_in_its_card(distilled, tmp_path, how, key):
    (tmp_path / "private").mkdir()
    small_set(tmp_path / "other", seed=1)
    secret = tmp_path / "private" / "train-00000-of-00001.parquet"
    shutil.copy(tmp_path / "other" / "data" / secret.name, secret)
    content = load_distilled(distilled).content
    files = sha_tree(export(distilled, tmp_path / "before", format="imagefolder"))
    configs = [{"config_name": name, key: how.format(secret)} for name in ("default", "views")]
    (distilled / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    assert load_distilled(distilled).content == content
    assert sha_tree(export(distilled, tmp_path / "after", format="imagefolder")) == files


@pytest.mark.parametrize(
    "text",
    [
        "configs: [{config_name: default, data_files: %s}]",
        "---\nconfigs: [{config_name: default, data_files: %s}]",
        "configs: [{config_name: default, data_files: !!set {%s}}]",
        "configs: &a [{config_name: default, data_files: [%s, *a]}]",
    ],
    ids=["plain", "a document", "a set", "itself"],
)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_every_form_of_card_is_parsed_as_datasets_parses_it(tmp_path, secret, name, text):
    folder = class_folders(tmp_path / "data")
    header = text % secret
    (folder / name).write_text(f"---\n{header}\n---\n" if name == "README.md" else header)
    bad_data(folder, name)


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_an_alias_bomb_in_a_second_yaml_document_is_refused_at_once(tmp_path, name):
    folder = class_folders(tmp_path / "data")
    (folder / name).write_text(f"---\n---\n{alias_bomb()}---\n" if name == "README.md" else f"---\n{alias_bomb()}")
    bad_data(folder, name, "more than 16 aliases")


@pytest.mark.parametrize("how", ["absolute", "relative"])
@pytest.mark.parametrize("kind", ["parquet", "saved", "metadata"])
def test_a_table_cannot_read_an_image_outside_its_folder(tmp_path, monkeypatch, secret, how, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = str(secret) if how == "absolute" else "../private/secret.png"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    cells = pa.array([{"bytes": None, "path": path}] * 2, type=features.arrow_schema.field("image").type)
    table = pa.table({"image": cells, "label": pa.array([0, 1])}, schema=features.arrow_schema)
    if kind == "parquet":
        for part in ("train", "test"):
            pq.write_table(table, folder / f"{part}.parquet")
    elif kind == "saved":
        part = datasets.Dataset.from_dict({"image": [picture()] * 2, "label": [0, 1]}, features=features)
        datasets.DatasetDict(train=part, test=part).save_to_disk(folder)
        write_arrow(next((folder / "train").glob("*.arrow")), table)
    else:
        for part in ("train", "test"):
            (folder / part).mkdir()
            (folder / part / "0.png").write_bytes(picture())
            (folder / part / "metadata.csv").write_text(f"file_name,label\n0.png,0\n../{path},1\n")
    assert "cannot be loaded" in (text := bad_data(folder)) or "does not belong to the source" in text


def test_a_hub_dataset_cannot_read_a_local_image(request, tmp_path, monkeypatch, secret):
    server = served(request, tmp_path, monkeypatch)
    cell = {"bytes": None, "path": str(secret)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    cells = pa.array([cell] * 2, type=features.arrow_schema.field("image").type)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": cells, "label": pa.array([0, 1])}, schema=features.arrow_schema), buffer)
    server.create("datasets", "org/evil", {"train.parquet": buffer.getvalue(), "test.parquet": buffer.getvalue()})
    bad_data("org/evil", "row 0", "does not belong to the source")
    header = f"---\nconfigs:\n- config_name: default\n  data_files: {secret}\n---\n"
    server.create("datasets", "org/other", {"README.md": header.encode(), "train.parquet": buffer.getvalue()})
    bad_data("org/other")


@pytest.mark.parametrize(
    "change_it",
    [
        lambda f: (f / "dataset_dict.json").write_text('{"splits": ["../other/train", "test"]}'),
        lambda f: (f / "dataset_dict.json").write_text('{"splits": [3]}'),
        lambda f: (f / "dataset_dict.json").write_text("[" * 100_000),
        lambda f: change(
            f / "train" / "state.json", _data_files=[{"filename": "../../other/train/data-00000-of-00001.arrow"}]
        ),
        lambda f: change(f / "train" / "state.json", _data_files=[{"filename": "/etc/passwd"}]),
        lambda f: change(f / "train" / "state.json", _data_files=3),
        lambda f: (f / "train" / "state.json").write_text("[]"),
        lambda f: change(f / "train" / "dataset_info.json", features={"x": {"_type": "os.system"}}),
    ],
)
def test_a_saved_dataset_that_names_outside_files_gives_one_error_line(tmp_path, change_it):
    part = datasets.Dataset.from_dict({"x": [1]})
    for name in ("data", "other"):
        datasets.DatasetDict(train=part, test=part).save_to_disk(tmp_path / name)
    change_it(tmp_path / "data")
    assert "column of type Image" not in bad_data(tmp_path / "data")


ARCHIVES = {
    "train.zip": lambda path: zipped(path, {"../../../escaped.png": picture(), "ant/0.png": picture()}),
    "bomb.zip": lambda path: zipped(path, {"train/ant/0.png": bytes(30_000_000)}),
    "train.tar": lambda path: path.write_bytes(tar({"../../escaped.png": picture(), "/tmp/escaped.png": b"x"})),
    "train.tar.gz": lambda path: path.write_bytes(b"\x1f\x8b"),
}


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_not_opened(tmp_path, name):
    folder = class_folders(tmp_path / "data")
    ARCHIVES[name](folder / "train" / name)
    before = sha_tree(tmp_path)
    bad_data(folder, name, "archive", "unpack it")
    with pytest.raises(DataError, match="no file data/train"):
        load_distilled(folder)
    assert sha_tree(tmp_path) == before


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_beside_a_distilled_dataset_are_not_opened(distilled, tmp_path, name):
    content = load_distilled(distilled).content
    ARCHIVES[name](distilled / "data" / f"x-{name}")
    before = sha_tree(tmp_path)
    assert load_distilled(distilled).content == content
    assert sha_tree(tmp_path) == before


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder", "chain", "nowhere"])
def test_links_out_of_an_image_folder_are_refused(tmp_path, secret, kind):
    folder = class_folders(tmp_path / "data")
    link = folder / "train" / "ant" / "9.png"
    if kind == "folder":
        link = folder / "train" / "cat"
    target = {"folder": secret.parent, "chain": tmp_path / "first", "nowhere": tmp_path / "gone"}
    (tmp_path / "first").symlink_to(secret)
    link.symlink_to(target.get(kind, secret))
    bad_data(folder, link.name, "leads out of")


def test_links_inside_a_folder_and_to_a_folder_are_accepted(tmp_path):
    folder = class_folders(tmp_path / "data")
    (folder / "train" / "ant" / "9.png").symlink_to("0.png")
    (folder / "train" / "ant" / "loop.png").symlink_to("loop.png")
    (folder / "train" / ".hidden").symlink_to("/etc/passwd")
    (tmp_path / "link").symlink_to(folder)
    assert len(load_source(source(tmp_path / "link")).train) == 5


def snapshot(folder, repo, shared=False):
    """Copy the files into the layout of the Hub cache, as links to blobs, and return the snapshot folder."""
    place = repo / "snapshots" / "0123"
    blobs = repo.parent / "blobs" if shared else repo / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        link = place / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return place


@pytest.mark.parametrize("shared", [False, True])
def test_snapshots_in_the_hub_cache_are_read_through_their_links(tmp_path, timm_folder, distilled, shared):
    data = snapshot(class_folders(tmp_path / "plain"), tmp_path / "1" / "datasets--a--b", shared)
    assert load_source(source(data)).train.images([0, 1, 2, 3]).shape[0] == 4
    net = snapshot(timm_folder, tmp_path / "2" / "models--a--b", shared)
    assert load_teacher(f"local-dir:{net}", device=CPU).num_classes == 3
    packed = snapshot(distilled, tmp_path / "3" / "datasets--a--b", shared)
    assert check_folder(packed).differences == ()
    assert len(load_distilled(packed).labels) == 12


@both
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "other.json"])
def test_links_out_of_a_teacher_folder_are_refused(network, tmp_path, name):
    kind, folder = network
    if name == "other.json":
        (folder / name).write_text("{}")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(kind, folder, name, "leads out of")


@pytest.fixture
def distilled(tmp_path):
    """Return a dataset folder with a card and provenance."""
    recipe, names, *_ = small_set(tmp_path / "set")
    add_card(tmp_path / "set", recipe, names)
    return tmp_path / "set"


@pytest.mark.parametrize("name", ["README.md", "provenance.json", "recipe.yaml", "data", "views", "assets"])
def test_no_command_follows_a_link_out_of_a_dataset(distilled, tmp_path, name):
    if name == "assets":
        (distilled / name).mkdir()
        (distilled / name / "grid.png").write_bytes(picture())
    (distilled / name).rename(tmp_path / "elsewhere")
    (distilled / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HubError) as error:
        bundle_of(distilled)
    assert "leads out of the folder" in one_line(error)
    for read in (load_distilled, lambda f: export(f, tmp_path / "out", format="imagefolder")):
        with pytest.raises(DataError) as error:
            read(distilled)
        assert "leads out of" in one_line(error)
    if name != "assets":
        assert any("leads out of the folder" in line for line in check_folder(distilled).differences)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "student.json"])
def test_a_model_folder_with_a_link_out_of_it_is_not_pushed(timm_folder, tmp_path, name):
    folder = Path(shutil.copytree(timm_folder, tmp_path / "student"))
    (folder / "student.json").write_text("{}")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HubError, match="leads out of the folder"):
        bundle_of(folder)


# -- names ------------------------------------------------------------------------------------------------------------

PATHS = [
    "../../x", "/etc/passwd", "..", ".", "", "a/../../b", "a//b", "./a", "a\\..\\b", "C:/x", "C:x", "\\\\host\\x", "a\0b",
    "a\nb", "a\u202eb", "x" * 5000, "data/../../x", "data/" + "x" * 300,
]  # fmt: skip


@each("name", PATHS)
def test_unsafe_paths_are_recognized(name):
    assert not is_plain_path(name)
    assert is_plain_path("data/train-00000-of-00001.parquet")


@each("name", ["../../x", "/x", "..", "", "a/b", "a\\b", "a\0", "a\n", "a b", "x" * 97, "CON", "nul.txt",
                                  "com1", "a.", ".a", "ä", "a:b", 3, None])  # fmt: skip
def test_a_recipe_name_must_be_a_valid_folder_name(name):
    values = yaml.safe_load((ROOT / "recipes" / "digits" / "prism_ipc10.yaml").read_text())
    with pytest.raises(RecipeError) as error:
        parse_recipe(values | {"name": name})
    assert "name" in one_line(error)


@each("name", ["squeeze:../../x", "squeeze:/x", "squeeze:", "squeeze:a/b", "squeeze:a\0b", "squeeze:a\n"])
@each("role", ["teachers.logit", "teachers.bn_pool", "teachers.verifier", "relabel.teachers"])
def test_a_squeezed_teacher_must_have_a_valid_folder_name(name, role):
    value = [name] if role in ("teachers.bn_pool", "relabel.teachers") else name
    with pytest.raises(RecipeError) as error:
        tiny(f"{role}={json.dumps(value)}")
    assert "squeeze:ARCHITECTURE" in one_line(error)


PREFIXES = ["", "data/", "views/"]


@each("name, prefix", product(PATHS, PREFIXES), some=diagonal(PATHS, PREFIXES))
def test_outside_files_named_in_provenance_are_not_opened(distilled, tmp_path, name, prefix):
    """The outside files are valid tables, so that opening one would change the result."""
    distilled = Path(shutil.copytree(distilled, tmp_path / "set"))
    for place in (tmp_path / "x", tmp_path / "x.parquet", tmp_path.parent / "x"):
        shutil.copy(distilled / "data" / "train-00000-of-00001.parquet", place)
    expected = check_folder(distilled).rows
    provenance = json.loads((distilled / "provenance.json").read_text())
    for ending in ("", ".parquet"):
        provenance["files"][prefix + name + ending] = provenance["files"]["data/train-00000-of-00001.parquet"]
    (distilled / "provenance.json").write_text(json.dumps(provenance))
    found = check_folder(distilled)
    assert found.differences
    assert all("\n" not in line and line.isprintable() and len(line) < 400 for line in found.differences)
    assert found.rows == expected
    with pytest.raises(HubError) as error:
        bundle_of(distilled)
    one_line(error)


@each("repo", ["../x", "a/../b", "/etc/passwd", "a/b/c", "a\0/b", "a/b\n", "..", "a/.."])
@each("kind", ["hf-hub", "transformers"])
def test_a_hub_teacher_must_have_a_valid_repo_name(repo, kind):
    refused(kind, repo)
    refused(kind, "org/net@../../x")


def test_file_names_on_the_hub_do_not_lead_out_of_the_cache(request, tmp_path, monkeypatch, timm_folder):
    server = served(request, tmp_path, monkeypatch)
    files = {path.name: path.read_bytes() for path in timm_folder.iterdir()}
    server.create("models", "org/net", files | {"../../../escaped": b"x", "a/../../escaped": b"x", "/escaped": b"x"})
    load_teacher("hf-hub:org/net", device=CPU)
    assert not [path for path in tmp_path.rglob("escaped")]


# -- text that would take forever to parse ----------------------------------------------------------------------------


def alias_bomb(merge=False):
    """Return YAML with ten levels of nine aliases each, which expands to three billion values."""
    first = "a0: &a0 {x: 1}" if merge else "a0: &a0 [x]"
    lines = [first]
    for level in range(1, 11):
        aliases = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{aliases}]}}" if merge else f"[{aliases}]"))
    return "\n".join(lines) + "\n"


ENDLESS = {
    "aliases": alias_bomb(),
    "merged aliases": alias_bomb(merge=True),
    "lists": "a: " + "[" * 600,
    "mappings": "{a: " * 20_000,
    "itself": "a: &a [*a]",
    "number": "a: " + "1" * 100_000,
    "date": "a: !!timestamp 2024-99-99",
    "tag": "a: !!python/object/apply:os.system ['true']",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_hostile_yaml_gives_one_error_line_at_once(distilled, tmp_path, kind):
    text = ENDLESS[kind]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert len(one_line(error)) < 1000
    with pytest.raises(RecipeError):
        tiny(f"data.license={text.removeprefix('a: ')}")
    (distilled / "recipe.yaml").write_text(text)
    with pytest.raises(PrismError) as error:
        load_distilled(distilled)
    one_line(error)


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_hostile_card_header_is_harmless(distilled, kind):
    text = f"---\n{ENDLESS[kind]}\n---\nwords of somebody\n"
    merged = merge_readme("---\ntags: [a]\n---\nours\n", text.encode(), owned=())
    assert b"words of somebody" in merged
    (distilled / "README.md").write_text(text)
    assert any("README.md" in line for line in check_folder(distilled).differences)
    assert len(load_distilled(distilled).labels) == 12, "the header must not be read"
    bad_data(distilled)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"files": ' * 100_000, '{"files": {"a": [' + "[" * 100_000, "1" * 10_000, "\ufeff{}"]
)
def test_a_hostile_provenance_gives_one_error_line(distilled, text):
    (distilled / "provenance.json").write_text(text)
    assert "cannot be read" in check_folder(distilled).differences[0]
    for read in (bundle_of, load_distilled):
        with pytest.raises(PrismError) as error:
            read(distilled)
        one_line(error)


# -- datasets with invalid content -----------------------------------------------------------------------------------


def rewritten(folder, table, **columns):
    """Replace columns of a dataset's table; an Arrow array also replaces the type of the column."""
    path = folder / table / "train-00000-of-00001.parquet"
    old = pq.read_table(path)
    notes = json.loads(old.schema.metadata[b"huggingface"])
    for name, values in columns.items():
        kind = values.type if isinstance(values, pa.Array) else old.schema.field(name).type
        if isinstance(values, pa.Array):
            notes["info"]["features"][name] = datasets.Features.from_arrow_schema(pa.schema({name: kind})).to_dict()[name]
        old = old.set_column(old.schema.get_field_index(name), pa.field(name, kind), pa.array(values, type=kind))
    pq.write_table(old.replace_schema_metadata({b"huggingface": json.dumps(notes).encode()}), path)


FOREIGN = {
    "labels in words": ("data", {"label": pa.array(["x"] * 12)}, "label"),
    "logits of other widths": (
        "data",
        {"teacher_logits": pa.array([[1.0] * (1 + i % 3) for i in range(12)])},
        "teacher_logits",
    ),
    "pictures elsewhere": ("data", {"image": [{"bytes": None, "path": "/etc/passwd"}] * 12}, "row 0 has no image"),
    "no pictures": ("data", {"image": [None] * 12}, "row 0 has no image"),
    "broken pictures": ("data", {"image": [{"bytes": b"x", "path": None}] * 12}, "cannot be decoded"),
    "a label too large": ("data", {"label": [99] + [0] * 11}, "label"),
    "no label": ("data", {"label": [None] * 12}, "label"),
    "an index too large": ("views", {"image_index": [10**9] * 36}, "image_index"),
    "an index below zero": ("views", {"image_index": [-1] * 36}, "image_index"),
    "a partner too large": ("views", {"mix_image_index": [12] * 36}, "mix_image_index"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_invalid_values_in_a_table_give_one_error_line(distilled, kind):
    table, columns, word = FOREIGN[kind]
    rewritten(distilled, table, **columns)
    with pytest.raises(DataError) as error:
        load_distilled(distilled)
    assert word in one_line(error)


@pytest.mark.parametrize("text", ["{}", "[]", '{"teachers": 3}', '{"teachers": [3]}', '{"teachers": [{}]}'])
def test_missing_teachers_in_provenance_give_one_error_line(distilled, text):
    (distilled / "provenance.json").write_text(text)
    with pytest.raises(DataError) as error:
        load_distilled(distilled)
    assert "provenance.json" in one_line(error)


def test_evaluating_a_hostile_folder_gives_one_error_line(tmp_path, bomb, capsys):
    for kind in KINDS:
        place = hostile_data(tmp_path / kind, kind, bomb, tmp_path)
        assert launch(place, "--output", tmp_path / "out", name="evaluate", recipe=None) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("DataError: ")
    assert not (tmp_path / "out").exists()


# -- helpers of runtime/untrusted -------------------------------------------------------------------------------------


def test_a_fake_snapshot_folder_gets_no_extra_access(tmp_path, secret):
    place = tmp_path / "repo" / "snapshots" / "x"
    place.mkdir(parents=True)
    (tmp_path / "repo" / "blobs").symlink_to(secret.parent)
    (place / "a.png").symlink_to("../../blobs/secret.png")
    assert not is_inside(place / "a.png", homes_of(place))
    assert stray_link(place) == place / "a.png"


# -- secrets ----------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "SecretSecretSecretSecret"
SECRETS = {
    "WANDB_API_KEY": "wandb5ecret0123456789012345678901234567890",
    "TRACKIO_WRITE_TOKEN": "trackio-5ecret-0123456789",
    "TRACKIO_SERVER_URL": "https://user:trackio-5ecret-password@host.example",
    "AWS_SECRET_ACCESS_KEY": "aws5ecret/0123456789+abcdefghijklmnopqrs",
    "AWS_ACCESS_KEY_ID": "AKIA5ECRET0123456789",
}


def leaks(text):
    return [name for name, secret in {**SECRETS, "HF_TOKEN": TOKEN}.items() if secret.encode() in text]


@lfs_only
def test_no_secret_from_the_environment_is_written_or_printed(connected, tmp_path, monkeypatch, capfd, caplog):
    """Make a complete run with trackers and debug logging, and push it."""
    pytest.importorskip("tensorboard")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", connected.add_user("bob", token=TOKEN, orgs=("org",)))
    caplog.set_level(logging.DEBUG)
    for name in ("datasets", "transformers", "huggingface_hub", "accelerate", "httpx2", "httpcore2", "timm", "prism_hf"):
        caplog.set_level(logging.DEBUG, logger=name)
    run = tmp_path / "run"
    words = ("evaluation.seeds=[0]", "squeeze.batch_size=256", "--log-with", "tensorboard", "--push-to-hub", "org/tiny")
    assert launch("--output", run, *TINY, *words, "--debug") == 0
    assert any(path.name.startswith("events") for path in (run / "logs").rglob("*"))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [(path, leaks(path.read_bytes())) for path in written if leaks(path.read_bytes())]
    said = capfd.readouterr()
    assert not leaks((said.out + said.err + caplog.text).encode())
    assert "stage evaluate" in caplog.text
    assert not [path for path, data in connected.files("datasets", "org/tiny").items() if leaks(data)]
    # A refused token is not repeated in the error either.
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    assert main(["push", str(run / "dataset"), "org/tiny"]) == 2
    told = capfd.readouterr()
    assert not leaks((told.out + told.err + caplog.text).encode())


@each(
    "change_it",
    [
        lambda secret: f"data.revision={secret}",
        lambda secret: f"data.source=org/name@{secret}",
        lambda secret: f"data.license=see {secret}.",
        lambda secret: f"teachers.logit=hf-hub:org/name@{secret}",
        lambda secret: f"teachers.bn_pool=[test_resnet, {secret}]",
        lambda secret: f"relabel.teachers=['{secret}']",
        lambda secret: f"synthesis.ipc={secret}",
        lambda secret: f"{secret}=1",
        lambda secret: f"data.{secret}=1",
        lambda secret: f"name={secret}",
    ],
)
@each("secret", [TOKEN, "https://user:p4ssw0rd@host/data", "s3://key:p4ssw0rd@bucket"])
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(change_it, secret):
    override = change_it(secret)
    if "=" in secret or ("://" in override.partition("=")[0]):
        pytest.skip("not a recipe key")
    with pytest.raises(RecipeError) as error:
        tiny(override)
    text = one_line(error)
    assert "SecretSecret" not in text
    assert "p4ssw0rd" not in text
    assert "access token or a password" in text


def test_a_secret_in_a_recipe_file_is_refused_and_not_repeated(tmp_path, capsys):
    values = yaml.safe_load((ROOT / "recipes" / "digits" / "prism_ipc10.yaml").read_text())
    values["data"]["revision"] = TOKEN
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert launch("--output", tmp_path / "run", recipe=path) == 2
    told = capsys.readouterr()
    assert "data.revision" in told.err
    assert not leaks((told.out + told.err).encode())
    assert not (tmp_path / "run").exists()


@each("value", ["https://host/terms", "hf_hub:org/name", "org/hf_name", "mailto:a@b.example", "a" * 40])
def test_text_that_only_resembles_a_secret_is_accepted(value):
    assert tiny(f"data.license={json.dumps(value)}").data.license == value


def test_an_address_is_shown_without_its_password(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://user:p4ssw0rd@host.example")
    assert Repository(Target("a/b")).commit_url("1") == "https://host.example/datasets/a/b/commit/1"
    assert without_password("plain words") == "plain words"


@pytest.mark.parametrize(
    "text", ["</script><b>", "a\0b", "\x1b[31mred", "a\n---\nb", "$x^$", "\u202e", "{{7*7}}", "x" * 100_000]
)
def test_any_text_reaches_a_tracker_as_text(tmp_path, text):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    recipe = tiny("name=hostile")
    recipe = replace(recipe, data=replace(recipe.data, license=text))
    AcceleratorState._reset_state(True)
    accelerator = make_accelerator(tmp_path / "run", log_with="tensorboard")
    start_trackers(accelerator, recipe)
    accelerator.end_training()
    AcceleratorState._reset_state(True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.is_relative_to(tmp_path / "run" / "logs" / "prism-hf") for path in files)
    for path in files:
        if path.suffix in (".yml", ".yaml"):
            assert yaml.safe_load(path.read_text())["data.license"] == text
        else:
            assert list(EventFileLoader(str(path)).Load())


# -- workflows --------------------------------------------------------------------------------------------------------

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_pinned_actions_with_least_privilege(path):
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert not [job for job in workflow["jobs"].values() if "permissions" in job]
    assert "pull_request_target" not in text
    assert "secrets." not in text
    used = re.findall(r"uses:\s*(.*)", text)
    assert len(used) == sum("uses" in step for step in steps(workflow))
    assert all(re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line) for line in used), used
    checkouts = [step for step in steps(workflow) if step.get("uses", "").startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_puts_no_untrusted_text_into_a_command(path):
    commands = [step["run"] for step in steps(yaml.safe_load(path.read_text(encoding="utf-8"))) if "run" in step]
    assert commands
    assert not [command for command in commands if "${{" in command]


def test_there_is_a_workflow_for_every_push_and_a_weekly_audit():
    (path,) = WORKFLOWS
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(workflow[True]) == {"push", "pull_request", "schedule"}  # YAML 1.1 reads `on` as true
    commands = [step.get("run") for step in steps(workflow)]
    assert ".ci/run" in commands
    assert "make audit" in commands
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_audit_requires_an_answer_from_osv():
    """By default, `pip-audit` passes if its service cannot find a package; OSV has to answer."""
    assert "pip-audit --vulnerability-service osv" in (ROOT / "Makefile").read_text(encoding="utf-8")
