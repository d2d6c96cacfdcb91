"""Helpers for tests of cards and pages: hostile texts, an evaluation, and a card as a reader sees it."""

import re

import yaml
from pipeline import add_card, small_set

from prism_hf.evaluation.report import evaluation_facts, score_row
from prism_hf.hub.dataset_card import card_facts, render_card

# markdown-it-py is always installed with huggingface-hub (through typer and rich).
from markdown_it import MarkdownIt  # isort: skip


NAMES = ["ant", "bee", "cat", "dog"]


HOSTILE = [
    "</details><script>alert(1)</script>",
    "a|b\n---\nlicense: mit",
    "`[x](http://e)`",
    "$x$",
    "{{7*7}}",
    "{% raw %}",
    "<!-- ",
    "```\n\n# title",
    "*bold* _it_ ~~del~~",
    "![i](http://e/i.png)",
    'carpenter\'s "kit" & co',
    "a\\",
    "<http://e>",
    "--- ",
    "- item",
    "1. item",
    "> quote",
    "# title",
    "&amp;",
    "naïve 鹤 \u202e",
    "\x00\x1b[31m",
]


def evaluation(similarity=0.5, verifier="squeeze:judge"):
    facts = {
        "image_bytes": 100, "label_bytes": 200, "verifier_top1": 0.25,
        "intra_class_similarity": {"mean": similarity, "per_class": [similarity] * 4},
    }  # fmt: skip
    return evaluation_facts(
        rows=[
            score_row("distilled", "soft", (0, 1), (0.5, 0.75), 12),
            score_row("random_real", "soft", (0, 1), (0.25, 0.5), 12),
        ],
        sets={"distilled": facts, "random_real": facts},
        student="test_resnet",
        epochs=3,
        test_count=450,
        verifier=verifier,
        similarity_network=verifier,
        left_out={"all real": "not yet run: the recipe sets evaluation.full_data_epochs to 0"},
    )


TEACHER = {
    "name": "squeeze:test_resnet", "roles": ["logit", "bn_pool"], "architecture": "test_resnet", "revision": None,
    "license": "apache-2.0", "weights_sha256": "0" * 64, "test_top1": 0.9125,
}  # fmt: skip


def render(facts, recipe):
    card = render_card(facts, recipe)
    header, body = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    return card, yaml.safe_load(header), body


def tokens(body):
    """Yield the Markdown tokens, flattened, in the dialect of GitHub and the Hub."""
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body):
        yield token
        yield from token.children or ()


def shape(body):
    """Return the structure of a document without its text."""
    return [t.type for t in tokens(body) if t.type not in ("text", "text_special", "softbreak")]


def shown(body):
    return "".join(t.content if t.type in ("text", "text_special") else "\n" for t in tokens(body))


def packed_card(folder):
    """Write a small dataset with its card; return its recipe and the facts of a card with figures and a teacher."""
    recipe, *_ = small_set(folder, names=NAMES)
    add_card(folder, recipe, NAMES)
    facts = card_facts(folder, recipe, NAMES, {"evaluation": evaluation()})
    facts["provenance"]["teachers"] = [TEACHER]
    return recipe, facts
