import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from comparison_fixture import make_comparison, make_sparse
from jinja2 import UndefinedError

from cards import HOSTILE, shape, tokens
from cards import shown as markdown_text
from prism_hf.compare.page import HEADER, render_html, render_markdown, table_of, value_text
from prism_hf.evaluation.report import difference, top1_text

PICTURES = {name: b"\x89PNG" + name.encode() for name in ("accuracy", "grids", "similarity", "map")}
VOID = {"meta", "img", "br", "hr", "link", "input"}
CASES = {
    "usual": {},
    "one seed": {"seeds": 1},
    "ipc 1": {"ipc": 1, "methods": 2},
    "fifteen": {"methods": 15, "students": ("test_resnet", "other"), "kinds": ("soft", "image", "hard")},
    "ipcs": {"ipc": (1, 2), "methods": 3, "classes": 25},
}


class Page(HTMLParser):
    """Balanced tags, the visible text, and the tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed tags: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> has no opening tag"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    @property
    def structure(self):
        return [tag for tag, _ in self.tags]


@pytest.fixture(scope="module")
def made():
    return make_comparison()[0]


@pytest.fixture
def comparison(made):
    return copy.deepcopy(made)


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def scores_of(markdown):
    lines = [cells(line) for line in markdown.splitlines() if line.startswith("|")]
    lines = [line for line in lines if len(line) == len(HEADER)]  # without the table of DD-Ranking's scores
    return lines[0], lines[2:]


def test_the_scores_of_dd_ranking_are_in_a_table_of_their_own(comparison):
    rows = [
        cells(line) for line in render_markdown(comparison).splitlines() if line.startswith("|") and line.count("|") == 5
    ]
    assert rows[0] == ["method", "HLR", "IOR", "LRS"]
    mean = {(row["method"], row["labels"]): row["mean"] for row in comparison["scores"]}
    for label, hlr, ior, _ in rows[2:]:
        name = label.replace("\\", "")
        assert hlr == f"{comparison['full_data'][0]['mean'] - mean[name, 'hard']:.3f}"
        assert ior == f"{mean[name, 'soft'] - mean['random real', 'soft']:.3f}"
    assert len(rows) == 2 + len(comparison["methods"])


@pytest.mark.parametrize("case", CASES)
def test_both_pages_have_the_same_content_and_are_well_formed(case):
    comparison = make_comparison(**CASES[case])[0]
    markdown, page = render_markdown(comparison), Page(render_html(comparison, PICTURES))
    header, rows = scores_of(markdown)
    assert tuple(header) == HEADER
    assert {len(row) for row in rows} == {len(HEADER)}
    assert len(rows) == len(comparison["scores"]) + len(comparison["full_data"])
    of_html = [row for row in page.rows if len(row) == len(HEADER)]
    assert of_html[1:] == [[cell.replace("\\", "") for cell in row] for row in rows]
    sentences = re.findall(r"labels (?:it \*\*(.+?)\*\*, )?([+-][\d.]+ points)", markdown)
    assert sentences
    assert re.findall(r"labels (?:it (wins|loses|is level), )?([+-][\d.]+ points)", page.text) == sentences


@pytest.mark.parametrize("case", CASES)
def test_html_is_one_file_without_external_resources(case):
    text = render_html(make_comparison(**CASES[case])[0], PICTURES)
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.structure)
    assert not re.search(r"https?:|url\(|@import|//cdn|javascript:", text)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset", "action")]
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
            assert len(attributes["alt"]) > 20
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert page.structure.count("img") == 4
    assert page.structure.count("h1") == 1
    assert page.tags[0] == ("html", {"lang": "en"})
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for _, a in page.tags]


def test_long_sections_are_folded_and_the_table_scrolls_by_keyboard(comparison):
    page = Page(render_html(comparison, PICTURES))
    assert page.structure.count("details") == page.structure.count("summary") == 4
    boxes = [(tag, attributes["aria-label"]) for tag, attributes in page.tags if attributes.get("class") == "wide"]
    assert boxes.count(("div", "Table")) == page.structure.count("table") == 2
    assert boxes.count(("p", "Figure")) == page.structure.count("img") == 4
    assert all(attributes["tabindex"] == "0" for _, attributes in page.tags if attributes.get("class") == "wide")
    assert {attributes["scope"] for tag, attributes in page.tags if tag == "th"} == {"row", "col"}
    comparison["differences"] = []
    assert Page(render_html(comparison, PICTURES)).structure.count("details") == 3


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
LOOK = """<iframe id="page" src="comparison.html" style="width: WIDEpx; height: 2000px; border: 0"></iframe><script>
onload = () => {
  const page = document.getElementById("page").contentDocument, box = page.querySelector("div.wide");
  const column = [...page.querySelectorAll("thead th")].findIndex(cell => cell.textContent === "top-1 %");
  const right = [...page.querySelectorAll("tbody tr")].map(row => row.children[column].getBoundingClientRect().right);
  document.body.innerHTML = JSON.stringify({scores: Math.max(...right), page: page.documentElement.scrollWidth,
    table: box.scrollWidth, box: box.clientWidth, cue: getComputedStyle(box, "::before").display});
}</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("wide", [360, 390])
def test_a_phone_shows_the_scores_beside_the_methods_and_how_to_see_the_rest(tmp_path, wide):
    comparison = make_comparison(methods=9, students=("test_resnet", "mobilenetv3_small_050"))[0]
    comparison = json.loads(json.dumps(comparison).replace('"DWA"', '"a_method_with_a_rather_long_name_of_one_word"'))
    (tmp_path / "comparison.html").write_text(render_html(comparison, PICTURES), encoding="utf-8")
    (tmp_path / "look.html").write_text(LOOK.replace("WIDE", str(wide)), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    command = [
        BROWSER,
        *options,
        "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}",
        (tmp_path / "look.html").as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(re.search(r"<body>(\{.*?\})", shown)[1])
    assert seen["scores"] <= wide - 16, "the page has a margin of 16 pixels"
    assert seen["page"] == wide, "only the boxes scroll, not the page"
    assert seen["table"] > seen["box"]
    assert seen["cue"] == "block"


def test_held_out_images_are_not_called_test_images(comparison):
    comparison["data"]["tested_on"] = "training images that were held out"
    for text in (render_markdown(comparison), Page(render_html(comparison, PICTURES)).text):
        assert "on\n450 training images that were held out. Random" in text or "on 450 training images that" in text
        assert "450 test images" not in text


def test_the_same_comparison_gives_the_same_bytes(comparison):
    before = copy.deepcopy(comparison)
    assert render_markdown(comparison) == render_markdown(json.loads(json.dumps(comparison)))
    assert render_html(comparison, PICTURES) == render_html(json.loads(json.dumps(comparison)), PICTURES)
    assert comparison == before


def test_the_numbers_match_the_comparison(comparison):
    rows = scores_of(render_markdown(comparison))[1]
    for row, score in zip(rows, comparison["scores"], strict=False):
        method = next(m for m in comparison["methods"] if m["label"] == score["method"])
        marked = " (control)" if method["control"] else ""
        assert row[0].replace("\\", "") == score["method"] + marked
        student = score["student"].replace("_", "\\_")
        assert row[1:6] == [top1_text(score), score["labels"], student, str(method["ipc"]), f"{score['count']:,}"]
        assert row[7] == ("-" if score["labels"] == "hard" else "338 kB")
        assert row[8] == f"{method['seconds_per_image']:.3g}"
        assert row[9] == f"{method['similarity']['mean']:.3f} ± 0.004"
        assert row[10] == f"{100 * method['verifier_top1']:.1f}"
    assert next(row for row in rows if row[0] == "all real")[1] == top1_text(comparison["full_data"][0])
    text = Page(render_html(comparison, PICTURES)).text
    for word in (
        "3 methods on digits",
        "1,347 training images",
        "450 test images",
        "91.2",
        "0.512",
        "72 min",
        "2.13.0",
        "cutmix",
        "0, 1, 2",
    ):
        assert word in text, word


def verdicts(comparison):
    return re.findall(r"- \*\*(.+?)\*\* against (.+?): (.*)", render_markdown(comparison))


def test_each_method_is_compared_in_words_to_the_control_and_the_other_methods(comparison):
    found = verdicts(comparison)
    assert [(a, b) for a, b, _ in found[:3]] == [(name, "random real") for name in ("SRe2L", "CDA", "G-VBSM")]
    assert len(found) == 6
    scores = {(s["method"], s["labels"]): s for s in comparison["scores"]}
    for labels, outcome in (("soft", "is level"), ("hard", "wins")):
        gap, half = difference(scores["CDA", labels], scores["random real", labels])
        words = f"with {labels} labels it **{outcome}**, {100 * gap:+.1f} points (95 % interval ± {100 * half:.1f})"
        assert words in found[1][2]


@pytest.mark.parametrize(
    ("gap", "half", "words"),
    [
        (0.012, 0.011, "it **wins**, +1.2 points (95 % interval ± 1.1)"),
        (0.012, 0.013, "it **is level**, +1.2 points (95 % interval ± 1.3)"),
        (-0.05, 0.01, "it **loses**, -5.0 points (95 % interval ± 1.0)"),
        (0.02, None, "with soft labels +2.0 points."),
    ],
)
def test_a_given_difference_is_put_into_words(comparison, gap, half, words):
    entry = {"a": "CDA", "b": "random real", "student": "test_resnet", "labels": "soft"}
    comparison["differences"] = [entry | {"difference": gap, "half_width": half}]
    said = {a: text for a, _, text in verdicts(comparison)}
    assert words in said["CDA"]
    assert "Methods compared with each other" not in render_markdown(comparison) + render_html(comparison, PICTURES)


def test_one_seed_is_remarked_on_once_and_has_no_spread():
    comparison = make_comparison(seeds=1, kinds=("soft", "image", "hard"))[0]
    for method in comparison["methods"]:
        method["similarity"]["std_over_seeds"] = None
    for text in (render_markdown(comparison), Page(render_html(comparison, PICTURES)).text):
        assert text.count("One seed is not enough for a verdict.") == 1
        assert len(re.findall("one seed|a verdict", text, re.IGNORECASE)) == 2, "both in that sentence"
        for word in ("±", "standard deviation", "interval", "Level", "too few"):
            assert word not in text, word
        assert "seed 0; scored" in text
    assert not any("seed" in cell for row in table_of(comparison) for cell in row)
    mixed = make_comparison(seeds=3)[0]
    mixed["scores"][2] |= {"std": None, "seeds": [0], "top1": [0.5], "mean": 0.5}
    mixed["differences"][0]["half_width"] = None
    text = render_markdown(mixed)
    assert text.count("One seed is not enough for a verdict.") == 1
    assert "| 50.0 (one seed) | soft |" in text
    assert "standard deviation over the seeds" in text


@pytest.mark.parametrize(
    ("methods", "title"),
    [
        (1, "random real on digits"),
        (2, "SRe2L on digits"),
        (4, "SRe2L, CDA and G-VBSM on digits"),
        (6, "SRe2L, CDA, G-VBSM, DWA and 1 more method on digits"),
        (9, "SRe2L, CDA, G-VBSM, DWA and 4 more methods on digits"),
    ],
)
def test_the_title_names_the_methods_and_the_data(methods, title):
    comparison = make_comparison(methods=methods, classes=2, ipc=1)[0]
    comparison["name"] = "compare"
    page = Page(render_html(comparison, PICTURES))
    assert page.text.startswith(f"{title} {title} "), "of the window and of the page"
    assert render_markdown(comparison).startswith(f"# {title}\n")
    one = "1 method on digits" if methods < 3 else f"{methods - 1} methods on digits"
    assert (one in page.text) == (methods > 1)


def test_the_data_is_named_with_its_config_and_revision(comparison):
    assert "- data: digits (license" in render_markdown(comparison)
    comparison["data"] |= {"config": "small", "revision": None}
    assert "- data: digits, config small (license" in render_markdown(comparison)
    comparison["data"] |= {"revision": "c0ffee"}
    assert "- data: digits, config small, revision c0ffee (license" in render_markdown(comparison)


def test_a_method_without_a_control_is_named(comparison):
    comparison["differences"] = [entry for entry in comparison["differences"] if entry["a"] != "CDA"]
    said = verdicts(comparison)
    assert ("CDA", "random real images", "no results to compare at ipc 10.") in said
    assert [(a, b) for a, b, _ in said if b.startswith("random")] == [
        ("SRe2L", "random real"), ("G-VBSM", "random real"), ("CDA", "random real images")
    ]  # fmt: skip


def test_the_caption_names_only_the_lines_that_are_drawn(comparison):
    assert "Dotted line: random real images. Dashed line: all real data." in render_markdown(comparison)
    comparison["methods"][1]["control"] = True
    comparison["full_data"] = []
    for page in (render_markdown(comparison), render_html(comparison, PICTURES)):
        assert "single seeds." in page
        assert "Dotted" not in page
        assert "Dashed" not in page


def test_several_students_are_labeled():
    comparison = make_comparison(methods=2, students=("test_resnet", "other"))[0]
    markdown, page = render_markdown(comparison), Page(render_html(comparison, PICTURES))
    assert markdown.count("- **SRe2L** against random real, student test\\_resnet: with soft labels it") == 1
    assert "against random real, student other: with soft labels it" in page.text


def test_unknown_facts_are_not_shown(comparison):
    sparse = make_sparse(comparison)
    sparse["scores"] = [score for score in sparse["scores"] if score["labels"] == "soft"]
    markdown, page = render_markdown(sparse), Page(render_html(sparse, {}))
    assert markdown.count("![") == 3
    assert "No histogram" in markdown
    assert "img" not in page.structure
    assert "verifier: none" in markdown
    assert "None" not in page.text + markdown
    assert "nan" not in page.text.split()
    assert "## Left out" not in markdown
    assert all(row[9:] == ["-"] * 2 for row in scores_of(markdown)[1])
    empty = sparse | {"scores": [], "methods": sparse["methods"][:1]}
    assert "Only the control was run." in render_markdown(empty)
    assert "Only the control was run." in Page(render_html(empty, {})).text


def test_the_page_says_that_low_similarity_alone_proves_nothing(comparison):
    for text in (render_markdown(comparison), render_html(comparison, PICTURES)):
        assert "Low similarity alone proves nothing: noise is diverse too." in text


def test_all_classes_are_in_a_collapsed_list_numbered_by_label(comparison):
    comparison["data"]["classes"] = [f"name{k}" for k in range(1000)]
    markdown, html = render_markdown(comparison), render_html(comparison, PICTURES)
    summary = "<details><summary>All 1000 classes by label</summary>"
    listed = markdown.partition(summary)[2].partition("</details>")[0]
    assert listed.split("\n")[2:-2] == [f"{k}. name{k}" for k in range(1000)]
    listed = html.partition(summary)[2].partition("</details>")[0]
    assert '<ol start="0">' in listed
    assert re.findall("<li>(.*?)</li>", listed) == [f"name{k}" for k in range(1000)]


def test_pictures_are_stored_next_to_the_page(comparison):
    markdown = render_markdown(comparison)
    assert "](assets/accuracy.png)" in markdown
    assert markdown.count("](assets/") == 4


# -- hostile text -----------------------------------------------------------------------------------------------------

TEXTS = [
    " and ".join(HOSTILE), "a|b](c $x$ \u200f\u202eabc", '" onload="x', "- item", "1. item", "x\n\n# y",
    "x\n```\n\n# y", "</details>", "<details><summary>x</summary>", "![x](accuracy)", "&lt;b&gt;",
]  # fmt: skip
PLACES = ["label", "class", "source", "license", "note", "recipe", "yaml", "command", "teacher", "setting",
          "setting name", "verifier", "map", "left out", "reason", "hardware", "version", "student"]  # fmt: skip


def put(comparison, place, text):
    data, protocol, method = comparison["data"], comparison["protocol"], comparison["methods"][1]
    if place == "label":
        renamed = json.dumps(comparison).replace('"SRe2L"', json.dumps(text))
        return json.loads(renamed)
    if place == "student":
        return json.loads(json.dumps(comparison).replace('"student": "test_resnet"', f'"student": {json.dumps(text)}'))
    match place:
        case "class":
            data["classes"][1] = text
        case "source" | "license":
            data[place] = text
        case "note":
            protocol["notes"] = [text]
        case "recipe":
            method["recipe"] = text
        case "yaml":
            method["recipe_yaml"] = text
        case "command":
            comparison[place] = text
        case "teacher":
            protocol["teachers"] = {text: 0.5, "squeeze:test_byobnet": None}
        case "setting":
            protocol["evaluation"]["optimizer"] = text
        case "setting name":
            protocol["relabel"] = {text: 1, "teachers": ["a"], "epochs": 2}
        case "verifier":
            protocol["verifier"] = text
        case "map":
            comparison["map"]["how"] = text
        case "left out":
            comparison["left_out"] = {text: "not yet run"}
        case "reason":
            comparison["left_out"] = {"full data": text}
        case "hardware":
            comparison["hardware"]["device"] = text
        case "version":
            comparison["versions"]["torch"] = text
    return comparison


@pytest.mark.parametrize("place", PLACES)
def test_hostile_text_is_escaped_on_both_pages(place):
    comparison = make_comparison(methods=2, classes=3, ipc=1)[0]
    plain = put(copy.deepcopy(comparison), place, "word")
    tags, blocks = Page(render_html(plain, PICTURES)).structure, shape(render_markdown(plain))
    for text in TEXTS:
        marked = re.sub("[\x00-\x08\x0e-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)
        wanted = " ".join(marked.split())
        changed = put(copy.deepcopy(comparison), place, text)
        html, markdown = render_html(changed, PICTURES), render_markdown(changed)
        page = Page(html)
        assert page.structure == tags, text
        assert wanted in page.text, text
        assert "\u202e" not in html + markdown
        assert shape(markdown) == blocks, text
        code = " ".join(t.content for t in tokens(markdown) if t.type == "fence")
        assert wanted in " ".join((markdown_text(markdown) + " " + code).split()), text


@pytest.mark.parametrize("path", ["versions", "protocol.notes", "data.source", "methods.0.similarity", "scores.0.mean"])
def test_a_missing_fact_raises_an_error(comparison, path):
    *parents, last = path.split(".")
    place = comparison
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    del place[last]
    for render in (render_markdown, lambda facts: render_html(facts, PICTURES)):
        with pytest.raises((KeyError, UndefinedError)):
            render(comparison)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), (True, "yes"), (0.001, "0.001"), (60, "60"), ([1, "a"], "1, a"), ({"a": [1, None]}, "a: 1, none")],
)
def test_settings_are_formatted_for_people(value, text):
    assert value_text(value) == text


def test_each_row_states_the_size_of_the_labels_it_used():
    comparison, _ = make_comparison(kinds=("soft", "image", "hard"))
    sizes = {line[2]: line[7] for line in table_of(comparison)[1:] if line[2] != "-"}
    assert sizes == {"soft": "338 kB", "image": "2 kB", "hard": "-"}
