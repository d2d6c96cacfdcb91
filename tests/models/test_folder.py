import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pipeline import one_line, sha_tree, tiny
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from prism_hf.errors import RecipeError
from prism_hf.images.pixels import from_pil, to_reference
from prism_hf.images.source import SourceData
from prism_hf.models.facts import DistilledFacts, ScoredOn, SourceFacts, StudentFacts
from prism_hf.models.folder import is_stored, scored_on, source_facts, store_network
from prism_hf.models.teacher import digest_of_tensors

NAMES, SIZE = ["a|b", "naïve", "<c>", "4"], 24
FACTS = StudentFacts(
    architecture="test_resnet", labels="soft", epochs=2, channels=3,
    dataset=DistilledFacts(name=None, content="0123", images=4, hub_id=None),
    source=SourceFacts(id="pets", on_hub=False, revision=None, license="my terms"), test=ScoredOn(id="pets", split="val"),
    recipe_fingerprint=None, settings={"lr": 0.01}, seed=0, test_top1=0.5, test_count=9,
)  # fmt: skip


def network_of(architecture="test_resnet", channels=3, seed=0):
    """A random network whose running statistics and head give different outputs for different images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(architecture, num_classes=len(NAMES), in_chans=channels)
        with torch.no_grad():
            network.train()(torch.randn(16, channels, SIZE, SIZE))
            network.get_classifier().weight.mul_(20)
    return network.eval()


def store(folder, network=None, *, architecture="test_resnet", channels=3, facts=FACTS, **changes):
    network = network or network_of(architecture, channels)
    facts = facts.model_copy(update={"architecture": architecture, "channels": channels})
    store_network(network, folder, facts, size=SIZE, class_names=NAMES, **changes)
    return network


def picture(mode):
    shape = (SIZE, SIZE) if mode == "L" else (SIZE, SIZE, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.fixture(scope="module", params=[1, 3], ids=["gray", "rgb"])
def stored(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "student"
    return request.param, folder, store(folder, channels=request.param)


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_pipeline_gives_the_same_answer_as_the_network(stored, mode):
    channels, folder, network = stored
    shown = picture(mode)
    with torch.no_grad():
        if (channels, mode) == (1, "RGB"):
            # The widened network uses the mean of the three channels, which is not a uint8 image.
            gray = from_pil(shown, 3).float().mean(0, keepdim=True)
            expected = network(((gray / 255 - 0.449) / 0.226)[None]).softmax(1)[0]
        else:
            expected = network(to_reference(from_pil(shown, channels)[None])).softmax(1)[0]
    assert float(expected.max() - expected.min()) > 0.05, "this test needs a network that distinguishes classes"
    by_name = pipeline("image-classification", model=str(folder))
    model, processor = AutoModelForImageClassification.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    by_parts = pipeline("image-classification", model=model, image_processor=processor)
    for classify in (by_name, by_parts):
        found = {entry["label"]: entry["score"] for entry in classify(shown, top_k=len(NAMES))}
        assert list(found) == [NAMES[i] for i in expected.argsort(descending=True)]
        for name, value in zip(NAMES, expected.tolist(), strict=True):
            assert found[name] == pytest.approx(value, abs=1e-5)


def test_timm_and_transformers_give_the_networks_logits(stored):
    channels, folder, network = stored
    x = torch.randn(3, channels, SIZE, SIZE)
    rgb = x.expand(-1, 3, -1, -1)
    timms = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transformers = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(timms(rgb), network(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(transformers(pixel_values=rgb).logits, network(x), rtol=1e-4, atol=1e-4)
    assert transformers.config.id2label == dict(enumerate(NAMES))


def test_the_config_states_input_labels_and_license(stored):
    channels, folder, _ = stored
    config = json.loads((folder / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"] == [3, SIZE, SIZE]
    assert (cfg["mean"], cfg["std"]) == {
        1: ([0.449] * 3, [0.226] * 3),
        3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    }[channels]
    assert config["label_names"] == cfg["label_names"] == NAMES
    assert cfg["license"] == "my terms"
    assert "num_classes" not in config["model_args"], "transformers would pass this argument twice"
    assert timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}"))["crop_pct"] == 1.0


# -- gray networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "test_byobnet", "repvgg_a0"])
def test_a_gray_network_gives_equal_logits_on_three_copies_and_when_folded_back(tmp_path, architecture):
    """repvgg: two first convolutions."""
    network = store(tmp_path / "n", architecture=architecture, channels=1)
    x = torch.randn(3, 1, SIZE, SIZE)
    wide = timm.create_model(f"local-dir:{tmp_path / 'n'}", pretrained=True).eval()
    folded = timm.create_model(f"local-dir:{tmp_path / 'n'}", pretrained=True, in_chans=1).eval()
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(wide(x.expand(-1, 3, -1, -1)), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "word"),
    [("transformers:resnet", "only timm architectures"), ("test_nfnet", "cannot be widened"), ("nothing", "only timm")],
)
def test_a_network_that_cannot_be_shared_gives_a_one_line_error_and_no_folder(tmp_path, architecture, word):
    """nfnet normalizes the weights of its first convolution, so scaling them by a third does not scale its output."""
    network = network_of("test_nfnet" if architecture == "test_nfnet" else "test_resnet", 1)
    with pytest.raises(RecipeError) as error:
        store(tmp_path / "n", network, architecture=architecture, channels=1)
    assert word in one_line(error)
    assert architecture in one_line(error)
    assert not any(tmp_path.iterdir())


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_network_gives_the_same_bytes_and_is_not_modified(tmp_path, channels):
    network = network_of(channels=channels).to(memory_format=torch.channels_last)
    before, random_state = digest_of_tensors(network.state_dict()), torch.get_rng_state()
    for name in ("one", "two"):
        torch.rand(3)
        random_state = torch.get_rng_state()
        store(tmp_path / name, network, channels=channels)
        assert torch.equal(torch.get_rng_state(), random_state)
    assert sha_tree(tmp_path / "one") == sha_tree(tmp_path / "two")
    assert set(sha_tree(tmp_path / "one")) == {"config.json", "model.safetensors", "student.json"}
    assert digest_of_tensors(network.state_dict()) == before
    assert next(network.parameters()).is_contiguous(memory_format=torch.channels_last)
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o755
    assert str(tmp_path) not in (tmp_path / "one" / "config.json").read_text()


@pytest.mark.parametrize(
    "failing",
    ["models.folder.save_for_hf", "models.folder._repair_config", "runtime.facts.write_json", "models.folder.swap_folder"],
)
def test_a_failure_leaves_no_draft_and_no_folder(tmp_path, monkeypatch, failing):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(f"prism_hf.{failing}", fail)
    with pytest.raises(OSError, match="disk full"):
        store(tmp_path / "n")
    assert not any(tmp_path.iterdir())


def test_a_finished_folder_is_kept_or_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "n"
    store(folder)
    (folder / "more.txt").write_text("of the first")
    first = sha_tree(folder)
    other = FACTS.model_copy(update={"seed": 1})
    store(folder, network_of(seed=1), facts=other)
    assert sha_tree(folder) == first
    store(folder, network_of(seed=1), facts=other, replace=True)
    assert json.loads((folder / "student.json").read_text()) == other.plain()
    assert sha_tree(folder)["model.safetensors"] != first["model.safetensors"]
    assert "more.txt" not in sha_tree(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["n"]


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "student.json"])
def test_a_half_written_folder_is_rewritten(stored, tmp_path, gone):
    folder = shutil.copytree(stored[1], tmp_path / "n")
    assert is_stored(folder, "student.json")
    assert not is_stored(folder, "squeeze.json")
    (folder / gone).unlink()
    assert not is_stored(folder, "student.json")
    store(folder, channels=stored[0])
    assert sha_tree(folder) == sha_tree(stored[1])


# -- facts ------------------------------------------------------------------------------------------------------------


def test_facts_of_the_source_contain_no_local_path():
    recipe = tiny("data.source=/home/someone/pets", "data.license=my terms")
    facts = {"id": "pets", "on_hub": False, "revision": None, "license": "my terms"}
    assert source_facts(recipe, None).plain() == facts
    data = SourceData(train=None, test=None, class_names=(), revision="abc", on_hub=True)
    assert source_facts(recipe, data).plain() == facts | {"on_hub": True, "revision": "abc"}
    assert source_facts(tiny("data.source=org/name"), data).id == "org/name"


def test_facts_of_the_test_part_distinguish_held_out_images_from_a_test_split():
    tested = scored_on(tiny("data.source=/home/someone/pets", "data.test_split=val"))
    assert tested.plain() == {"id": "pets", "split": "val"}
    held = scored_on(tiny("data.validation_fraction=0.1", "data.test_split=val"))
    assert held.plain() == {"id": "digits", "split": "train, 0.1 of it held out"}


def test_the_config_does_not_claim_weights_from_timm(tmp_path):
    store(tmp_path / "net", network_of("resnet18"), architecture="resnet18")
    cfg = json.loads((tmp_path / "net" / "config.json").read_text())["pretrained_cfg"]
    assert not {"hf_hub_id", "tag", "origin_url", "url"} & set(cfg)
    assert "timm/" not in json.dumps(cfg)
