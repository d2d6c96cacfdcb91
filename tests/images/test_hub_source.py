"""Images in a Hub repo, whose splits `datasets` takes from words in the names of folders and files."""
# ruff: noqa: F811

import json
import subprocess
import sys

import pytest
from hub_fixtures import hub  # noqa: F401
from pipeline import random_picture

LOOK = """
import json, sys
from prism_hf.errors import DataError
from prism_hf.images import describe_source, faults_of, load_source
from prism_hf.recipe import DataRecipe
recipe = DataRecipe(source="ann/photos", num_classes=2, size=16, test_split=sys.argv[1])
data = load_source(recipe)
try:
    warnings = faults_of(data, recipe)
except DataError as error:
    warnings = [str(error)]
print(json.dumps([describe_source(data, recipe), warnings]))
"""


def look(hub, tmp_path, files, test_split):
    hub.add_user("ann")
    contents = {}
    for seed, file in enumerate(files):
        random_picture(16, 16, seed=seed).save(tmp_path / "picture.png")
        contents[file] = (tmp_path / "picture.png").read_bytes()
    hub.create("datasets", "ann/photos", files=contents)
    environment = hub.env(token=None, home=tmp_path / "home", xet=False)
    command = [sys.executable, "-c", LOOK, test_split]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_files_that_the_library_leaves_out_are_named(hub, tmp_path):
    files = [f"{name}/{file}.png" for name in "ab" for file in ("train_1", "train_2", "test_1", "7")]
    told, (warning,) = look(hub, tmp_path, files, "test")
    assert "4 training and 2 test images of 2 classes" in told
    assert told.endswith("8 files found, 4 in 'train', 2 in 'test'")
    assert warning == "files in no split, which are not used: 2, such as 'a/7.png'"


@pytest.mark.slow
def test_a_class_called_train_is_found_by_the_images_it_shares(hub, tmp_path):
    files = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("cat", "train") for i in range(4)]
    _, (error,) = look(hub, tmp_path, files, "test")
    assert "test images that are also training images: 4 of 8" in error
