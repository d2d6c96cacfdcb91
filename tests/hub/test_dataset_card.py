import copy
import html
import re
from pathlib import Path

import datasets
import pytest
import yaml
from each import diagonal, each, product
from huggingface_hub import DatasetCard
from jinja2 import UndefinedError
from pipeline import add_card, small_set, tiny

# markdown-it-py is always installed with huggingface-hub (through typer and rich).
from cards import HOSTILE, NAMES, evaluation, packed_card, render, shape, shown, tokens
from prism_hf.compare.methods import random_recipe
from prism_hf.dataset.writer import image_features, view_features
from prism_hf.hub.card import checked_header, escape, fence_for
from prism_hf.hub.citations import CITATIONS
from prism_hf.hub.dataset_card import (
    METADATA_KEYS,
    card_facts,
    metadata,
    method_in_words,
    render_card,
    render_control_card,
)
from prism_hf.recipe.schema import to_dict
from prism_hf.recipe.yaml_file import load_recipe


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    return folder, *packed_card(folder)


@pytest.fixture
def facts(packed):
    return copy.deepcopy(packed[2])


# -- the header -------------------------------------------------------------------------------------------------------


def test_the_header_is_yaml_from_the_allow_list(packed, facts):
    card, header, _ = render(facts, packed[1])
    assert set(header) <= set(METADATA_KEYS)
    assert header == metadata(facts, packed[1])
    assert DatasetCard(card).data.to_dict() == header
    assert header["license"] == "cc-by-4.0"
    assert "license_name" not in header
    assert header["size_categories"] == ["n<1K"]


def test_a_key_outside_the_allow_list_is_an_error_and_an_unknown_value_is_omitted():
    assert list(checked_header({"b": ("x",), "a": None, "c": 1}, ("a", "b", "c"))) == ["b", "c"]
    with pytest.raises(ValueError, match="'d'"):
        checked_header({"d": 1}, ("a",))


def test_configs_and_dataset_info_describe_the_tables(packed, facts):
    header = metadata(facts, packed[1])
    assert [(c["config_name"], c["data_files"][0]["path"], c.get("default")) for c in header["configs"]] == [
        ("default", "data/train-*", True),
        ("views", "views/train-*", None),
    ]
    infos = {info["config_name"]: info for info in header["dataset_info"]}
    for config, features, rows in (("default", image_features(NAMES), 12), ("views", view_features(4), 36)):
        assert datasets.Features._from_yaml_list(infos[config]["features"]) == features
        assert infos[config]["splits"][0]["num_examples"] == rows
        assert infos[config]["download_size"] == facts["tables"][config]["file_bytes"]


@pytest.mark.parametrize(
    ("license", "expected"),
    [("CC BY 4.0", ("cc-by-4.0", None)), ("MIT", ("mit", None)), ("my own terms", ("other", "my-own-terms"))],
)
def test_hub_licenses_are_recognized_and_others_are_named(packed, facts, license, expected):
    recipe = load_recipe(packed[0] / "recipe.yaml", [f"data.license={license}"])
    header = metadata(facts, recipe)
    assert (header["license"], header.get("license_name")) == expected


@pytest.mark.parametrize(
    ("source", "on_hub", "expected"),
    [("org/name", True, "org/name"), ("org/name", False, "extended|other"), ("digits", False, "extended|other")],
)
def test_only_hub_sources_are_listed_as_source_datasets(packed, facts, source, on_hub, expected):
    recipe = load_recipe(packed[0] / "recipe.yaml", [f"data.source={source}"])
    facts = copy.deepcopy(facts)
    facts["provenance"]["source"]["on_hub"] = on_hub
    assert metadata(facts, recipe)["source_datasets"] == [expected]


# -- the body ---------------------------------------------------------------------------------------------------------


def test_the_card_shows_the_table_the_teachers_and_the_recipe(packed, facts):
    _, recipe, _ = packed
    _, _, body = render(facts, recipe)
    text = shown(body)
    for word in ("62.5 ± 17.7", "squeeze:test_resnet", "trained for this set", "91.2", "logit, bn_pool", "450 real test"):
        assert word in text, word
    assert "Left out: all real (not yet run" in text
    assert "- Not yet run" not in text
    assert recipe.fingerprint() in body
    fenced = [t for t in tokens(body) if t.type == "fence"]
    assert [t.info for t in fenced] == ["python", "python", "bash", "yaml", "bibtex"]
    assert yaml.safe_load(fenced[3].content) == yaml.safe_load((packed[0] / "recipe.yaml").read_text())
    assert body.count("<details>") == body.count("</details>") == 2


@each("name, license, sentence", [
    ("resnet18.a1_in1k", "apache-2.0", ""),
    ("res2net50.in1k", "unknown", "The license of res2net50.in1k is unknown; ask its authors"),
    ("hf-hub:org/net", "cc-by-nc-4.0", "The license of hf-hub:org/net forbids commercial use"),
    ("hf-hub:org/net", "other, non-commercial", "forbids commercial use"),
    ("squeeze:resnet18", "unknown", ""),
    ("squeeze:hf-hub:org/net", "mit (data) and unknown (weights of hf-hub:org/net)", "hf-hub:org/net is unknown; ask"),
    ("squeeze:a.b", "mit (data) and cc-by-nc-4.0 (weights of a.b)", "The license of squeeze:a.b forbids commercial use"),
])  # fmt: skip
def test_teachers_with_an_unknown_or_non_commercial_license_are_named(packed, facts, name, license, sentence):
    recipe, changed = packed[1], copy.deepcopy(facts)
    changed["provenance"]["teachers"][0] |= {"name": name, "license": license}
    text = " ".join(html.unescape(render_card(changed, recipe)).replace("\\", "").split())
    assert sentence in text
    assert ("forbids commercial use" in text or "is unknown; ask" in text) == bool(sentence)


def test_without_a_report_the_card_says_not_yet_run(packed, facts):
    facts["evaluation"] = None
    _, _, body = render(facts, packed[1])
    assert "*Not yet run*" in body
    assert "±" not in body
    assert "diversity.png" not in body


def test_one_image_per_class_has_no_similarity(tmp_path):
    recipe, *_ = small_set(tmp_path, ipc=1, names=NAMES)
    add_card(tmp_path, recipe, NAMES)
    facts = card_facts(tmp_path, recipe, NAMES, {"evaluation": evaluation(similarity=None)})
    _, _, body = render(facts, recipe)
    assert "4 distilled images (1 per class" in shown(body)
    row = next(line for line in body.splitlines() if line.startswith("| distilled"))
    assert [cell.strip() for cell in row.strip("|").split("|")][-2] == "-"


def test_missing_verifier_and_similarity_network_are_not_mentioned(packed, facts):
    facts["evaluation"] |= {"verifier": None, "similarity_network": None}
    body = render(facts, packed[1])[2]
    assert "*Verifier*" not in body
    assert "*Intra-class cos*" not in body


def test_all_classes_are_in_a_collapsed_list_numbered_by_label(packed, facts):
    facts["class_names"] = [f"a rather long class name {i:03d}" for i in range(1000)]
    body = render(facts, packed[1])[2]
    first, last = (body.index(text) for text in ("<details><summary>All 1000 classes by label</summary>", "</details>"))
    lines = body[first:last].splitlines()[2:-1]
    assert lines == [f"{i}. a rather long class name {i:03d}" for i in range(1000)]
    assert [t.attrs for t in tokens(body) if t.type == "ordered_list_open"] == [{"start": 0}]
    assert "The picture shows the first 20 of 1000 classes." in body
    assert "The picture shows" not in render(facts | {"class_names": NAMES}, packed[1])[2]
    many = load_recipe(packed[0] / "recipe.yaml", ["synthesis.ipc=50"])
    words = "The picture shows the first 20 of 1000 classes and the first 10 of 50 images per class."
    assert words in render(facts, many)[2]


@each(
    "counts, sentence",
    [
        (
            [120, 7, 3400, 7],
            "3,534 training images. The smallest class is *bee* (7 images), the largest is *cat* (3,400).",
        ),
        (
            [2, 1, 2, 2],
            "has 7 training images. The smallest class is *bee* (1 image), the largest is *ant* (2).",
        ),
        ([500] * 4, "The source has 2,000 training images, 500 of each class.\n"),
    ],
)
def test_the_training_images_per_class_are_stated_with_the_smallest_and_largest(packed, facts, counts, sentence):
    facts["provenance"]["source"] = facts["provenance"]["source"] | {"images_per_class": counts}
    body = render(facts, packed[1])[2]
    assert sentence in body
    assert "<summary>All 4 classes by label and the number of training images of each</summary>" in body
    assert f"\n1. bee ({counts[1]:,})\n" in body


@each(
    "data, source, full",
    [
        ({"source": "org/birds"}, {"on_hub": True}, "made from org/birds. Raw"),
        ({"source": "org/birds", "config": "v_1", "revision": "main"}, {"on_hub": True, "revision": "c0ffee"},
         "made from org/birds (config v_1, revision c0ffee). Raw"),
        ({"source": "org/birds", "revision": "main"}, {"on_hub": True, "revision": None},
         "made from org/birds (revision main). Raw"),
        ({"source": "org/birds"}, {}, "made from org/birds. Raw"),
        ({"source": "my birds of 2024"}, {"on_hub": False}, "made from the local folder my birds of 2024. Raw"),
        ({"source": "~alice/private/birds", "config": "small"}, {"on_hub": False},
         "made from the local folder birds (config small). Raw"),
        ({"source": "../private/birds/"}, {"on_hub": False}, "made from the local folder birds. Raw"),
        ({"source": "digits"}, {"on_hub": False}, "made from scikit-learn's digits. Raw"),
    ],
)  # fmt: skip
def test_the_source_is_named_in_full_without_the_folders_above_it(packed, facts, data, source, full):
    facts["recipe"]["data"] |= {"config": None, "revision": None} | data
    kept = {key: value for key, value in facts["provenance"]["source"].items() if key not in ("on_hub", "revision")}
    facts["provenance"]["source"] = kept | source
    body = render(facts, packed[1])[2]
    assert full in shown(body)
    control = render_control_card(facts, packed[1])
    assert f"training images of {full[len('made from ') : -len('. Raw')]}, relabeled by" in shown(control)
    prose = control.partition("\n---\n")[2] + body.partition("recipe.yaml</summary>")[0]
    assert "private" not in prose


def test_one_thing_is_not_called_several(packed, facts):
    facts["tables"]["default"]["rows"] = 1
    facts["evaluation"]["rows"] = [row | {"seeds": [0], "std": None} for row in facts["evaluation"]["rows"]]
    facts["evaluation"]["test_count"] = 1
    one = ("relabel.epochs=1", "relabel.teachers=[squeeze:test_resnet]", "synthesis.iterations=1")
    recipe = tiny(*one)
    text = shown(render(facts | {"recipe": to_dict(recipe)}, recipe)[2])
    assert not re.search(r"\b1 [a-z ]*(images|views|seeds|teachers|threads|iterations)\b", text), text
    for words in (
        "1 distilled image (",
        "1 recorded augmented view of",
        "1 seed)",
        "logits of 1 teacher.",
        "on 1 real image.",
    ):
        assert words in text, words
    assert "mean ±" not in text


def test_the_same_facts_give_the_same_card_whatever_the_times(packed, facts):
    folder, recipe, _ = packed
    one = card_facts(folder, recipe, NAMES, {"evaluation": evaluation(), "wall_time_s": {"squeeze": 1.0}})
    two = card_facts(folder, recipe, NAMES, {"evaluation": evaluation(), "wall_time_s": {"squeeze": 2.0}})
    assert one == two
    assert render_card(one, recipe) == render_card(two, recipe)


def test_the_control_card_loads_and_says_that_it_is_a_control(packed, facts):
    card = render_control_card(facts, packed[1])
    assert DatasetCard(card).data.to_dict() == metadata(facts, packed[1])
    assert "random real" in card
    assert "Not distilled" in card


# -- strictness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "provenance.versions.torch", "provenance.hardware.threads", "provenance.recipe_fingerprint",
        "provenance.format_version", "provenance.teachers.0.license", "provenance.teachers.0.test_top1",
        "evaluation.test_count", "evaluation.in_words", "evaluation.left_out", "evaluation.student",
    ],
)  # fmt: skip
def test_a_missing_fact_raises_an_error(packed, facts, path):
    render_card(facts, packed[1])
    *parents, last = path.split(".")
    place = facts
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    del place[last]
    with pytest.raises(UndefinedError):
        render_card(facts, packed[1])


@pytest.mark.parametrize(("text", "fence"), [("", "```"), ("a ``` b", "````"), ("`````", "``````"), ("` ``", "```")])
def test_a_fence_is_longer_than_any_fence_inside_it(text, fence):
    assert fence_for(text) == fence


# -- hostile text -----------------------------------------------------------------------------------------------------


@each("place, text", product(["Classes: {}.", "({}) apply.", "| a | {} | b |", "words\n{}, more", "{}"], HOSTILE))
def test_escaped_text_renders_literally_everywhere(place, text):
    rule = "| h | h | h |\n| - | - | - |\n" if "|" in place else ""
    body = rule + place.format(escape(text))
    assert shape(body) == shape(rule + place.format("word"))
    assert re.sub("[\x00\x1b\u202e]", "\ufffd", " ".join(text.split())) in shown(body)


PLACES = ["class", "source", "license", "teacher", "teacher license", "student", "reason"]


@each("place, text", product(PLACES, HOSTILE), some=diagonal(PLACES, HOSTILE))
def test_hostile_text_breaks_neither_header_nor_table_nor_html(packed, facts, place, text):
    folder, recipe, _ = packed
    facts = copy.deepcopy(facts)  # for this case only
    plain = shape(render(facts, recipe)[2])
    if place == "class":
        facts["class_names"][1] = text
    elif place == "source":
        facts["recipe"]["data"]["source"] = text
    elif place == "license":
        facts["recipe"]["data"]["license"] = text
    elif place.startswith("teacher"):
        facts["provenance"]["teachers"][0]["license" if "license" in place else "name"] = text
    elif place == "student":
        facts["evaluation"]["student"] = text
    else:
        facts["evaluation"]["left_out"]["all real"] = text
    card, header, body = render(facts, recipe)
    assert shape(body) == plain
    assert DatasetCard(card).data.to_dict() == header
    assert set(header) <= set(METADATA_KEYS)
    assert header["license"] == "cc-by-4.0"
    assert "<script>" not in body
    if place == "class":
        names = header["dataset_info"][0]["features"][1]["dtype"]["class_label"]["names"]
        assert names == {"0": "ant", "1": text, "2": "cat", "3": "dog"}


@each("text", [t for t in HOSTILE if "\x00" not in t], some=HOSTILE[:5])
def test_a_hostile_license_in_the_recipe_stays_inside_its_yaml(packed, facts, text):
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    recipe = load_recipe(packed[0] / "recipe.yaml", [f'data.license="{quoted}"'])
    assert recipe.data.license == text
    facts["recipe"]["data"]["license"] = text
    card, header, body = render(facts, recipe)
    assert header["license"] == "other"
    assert re.fullmatch(r"[a-z0-9.-]+", header["license_name"]), "an id; the text is verbatim below"
    assert DatasetCard(card).data.to_dict() == header
    fenced = [t for t in tokens(body) if t.type == "fence"]
    assert yaml.safe_load(fenced[3].content)["data"]["license"] == text
    assert shape(body) == shape(render(facts, packed[1])[2])


# -- the method in words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), ["1 other network, drawn once per slot", "PRISM", "logit teacher itself"]),
        (("teachers.selection=per_iteration",), ["anew at each iteration"]),
        (("teachers.include_logit=false",), ["PRISM"]),
        (("teachers.bn_pool=[]",), ["SRe2L"]),
        (("teachers.selection=cycle",), ["2 teachers take turns", "BN-only G-VBSM"]),
        (("teachers.selection=cycle", "teachers.bn_pool=[]"), ["SRe2L"]),
    ],
)
def test_the_method_is_described_in_words(overrides, words):
    text = method_in_words(tiny(*overrides))
    assert all(word in text for word in words)
    assert ("logit teacher itself" in text) == (not overrides or "per_iteration" in overrides[0])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("synthesis.bn_reduction=balanced",), ["(sum over layers, divided by that of the start images)"]),
        (("synthesis.conv={patch: 4, drop: 0.2}",), ["per patch of 4 pixels", "with probability 0.2"]),
        (("synthesis.init=real_kmeans", "synthesis.easiest=0.5"), ["real\\_kmeans among the easiest 50% of each class"]),
        (("synthesis.init=mosaic", "synthesis.mosaic={}", "synthesis.iterations=0"), ["mosaics of real images and not"]),
    ],
)
def test_method_specific_settings_are_on_the_card(facts, overrides, words):
    recipe = tiny(*overrides)
    text = render_card(facts | {"recipe": to_dict(recipe)}, recipe)
    assert all(word in text for word in words), text


# -- citations --------------------------------------------------------------------------------------------------------

CITED = {
    "PRISM": [(), ("teachers.selection=per_iteration",), ("teachers.include_logit=false",)],
    "SRe2L": [("teachers.bn_pool=[]",), ("teachers.selection=cycle", "teachers.bn_pool=[]")],
    "G-VBSM": [("teachers.selection=cycle",), ("teachers.selection=cycle", "synthesis.conv={patch: 4}")],
    None: [("synthesis.iterations=0",)],  # plus random real images
}


def test_a_card_cites_and_links_only_the_paper_of_its_method(facts):
    for method, recipes in CITED.items():
        for recipe in [*(tiny(*words) for words in recipes), *([] if method else [random_recipe(tiny(), 2)])]:
            card, header, body = render(facts | {"recipe": to_dict(recipe)}, recipe)
            entries = [t.content.strip() for t in tokens(body) if t.type == "fence" and t.info == "bibtex"]
            links = {t.attrs["href"] for t in tokens(body) if t.type == "link_open"}
            cited = {name: paper for name, paper in CITATIONS.items() if name == method}
            assert entries == [paper["bibtex"] for paper in cited.values()], method
            assert links == {f"https://arxiv.org/abs/{paper['arxiv']}" for paper in cited.values()}, method
            assert ("there is no paper to cite" in body) == (method is None)
            assert [name for name, paper in CITATIONS.items() if paper["arxiv"] in card] == list(cited)
            assert {"image", "datasets", "dataset-distillation"} <= set(header["tags"])
            assert not any(tag.startswith("arxiv:") for tag in header["tags"]), "the Hub creates this tag from the link"


def test_every_citation_is_one_bibtex_entry():
    for paper in CITATIONS.values():
        assert re.fullmatch(r"@\w+\{\w+,\n(  \w+=\{[^{}]+\},\n)+  \w+=\{[^{}]+\}\n\}", paper["bibtex"])
        assert re.fullmatch(r"\d{4}\.\d{5}", paper["arxiv"])


def test_the_citation_file_names_the_paper_cited_by_prism_cards():
    cff = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text(encoding="utf-8"))
    paper, prism = cff["preferred-citation"], CITATIONS["PRISM"]
    assert (cff["cff-version"], cff["title"]) == ("1.2.0", "prism-hf")
    assert paper["identifiers"][0]["value"] == f"arXiv:{prism['arxiv']}"
    for field in (f"title={{{paper['title']}}}", f"eprint={{{prism['arxiv']}}}"):
        assert field in prism["bibtex"]
    names = " and ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    assert f"author={{{names}}}" in " ".join(prism["bibtex"].split())


@pytest.mark.parametrize("text", ["https://evil.example", "http://x", "www.evil.example", "@somebody", "a@b.example"])
def test_addresses_and_names_in_untrusted_text_do_not_become_links(text):
    line = escape(text)
    assert not re.search(r"://|www\.|@", line)
    assert shown(line).strip() == text


def test_text_cannot_reverse_the_direction_of_the_text_after_it():
    assert "\u202e" not in escape("a\u202eb")
