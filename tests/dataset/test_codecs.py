"""Codecs of soft labels: what is lost, and that plain `datasets` reads them with the documented line."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from each import each
from pipeline import add_card, small_set

from prism_hf.dataset.codecs import LEVELS, READING, codec_of, decode_logits, encode_logits, label_features
from prism_hf.dataset.reader import load_distilled
from prism_hf.errors import DataError
from prism_hf.evaluation.students import train_student
from prism_hf.recipe import StoredLabels

ROOT = Path(__file__).parents[2]
STORED = {
    codec: StoredLabels(codec, 1, 2 if codec == "topk" else None, 4.0) for codec in ("float16", "int8", "int4", "topk")
}
CODECS = {
    "float16": [],
    "int8": ["relabel.codec=int8"],
    "int4": ["relabel.codec=int4"],
    "topk": ["relabel.codec=topk", "relabel.top_k=2", "evaluation.loss=kl"],
}


def rows(kind, classes, seed=0):
    made = np.random.default_rng(seed).normal(0, 3, (50, classes))
    kinds = {
        "normal": made,
        "huge": made * 20_000,
        "tiny": made * 1e-6,
        "constant": np.full_like(made, 7.25),
        "shifted": made + 60_000,
    }
    return kinds[kind].clip(-65504, 65504).astype(np.float16)


@pytest.mark.parametrize("kind", ["normal", "huge", "tiny", "constant", "shifted"])
@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("classes", [2, 3, 10, 101])
def test_a_quantized_logit_is_at_most_half_a_level_away(kind, codec, classes):
    logits = rows(kind, classes)
    columns = encode_logits(logits, STORED[codec])
    read, exact = decode_logits(columns, classes), logits.astype(np.float64)
    level = (exact.max(1) - exact.min(1)) / LEVELS[codec]
    # The scale is stored in float16, rounded up.
    allowed = 0.5 * level[:, None] * (1 + 2**-9) + 2**-24 + 2**-20 * np.abs(exact)
    assert (np.abs(read - exact) <= allowed).all()
    assert np.isfinite(read).all()
    assert columns[f"logits_{codec}"].dtype == np.uint8


def test_four_bits_take_half_a_byte_and_eight_bits_one():
    logits = rows("normal", 1000)
    assert encode_logits(logits, STORED["int8"])["logits_int8"].nbytes == 50 * 1000
    assert encode_logits(logits, STORED["int4"])["logits_int4"].nbytes == 50 * 500


def test_topk_keeps_the_probabilities_at_its_temperature():
    logits, temperature = rows("normal", 20), 4.0
    columns = encode_logits(logits, STORED["topk"])
    read = torch.from_numpy(decode_logits(columns, 20)).double()
    exact = torch.from_numpy(logits.astype(np.float64))
    ours, theirs = ((x / temperature).softmax(1) for x in (read, exact))
    best = exact.topk(2).indices
    torch.testing.assert_close(ours.gather(1, best), theirs.gather(1, best), rtol=2e-3, atol=0)
    others = ours.scatter(1, best, torch.nan)
    assert all(len(set(row[~row.isnan()].tolist())) == 1 for row in others), "the others share one probability"


@each("codec", STORED)
def test_the_columns_tell_the_codec(codec):
    logits = rows("normal", 9)
    columns = encode_logits(logits, STORED[codec])
    assert columns.keys() == label_features(codec, 9, 2).keys()
    assert codec_of(columns) == codec
    assert codec_of({"crop": 0}) == "seed"


@each("codec", CODECS)
def test_plain_datasets_reads_the_logits_with_the_documented_line(codec, tmp_path):
    from datasets import load_dataset

    recipe, names, _, views, _ = small_set(tmp_path, classes=5, overrides=CODECS[codec])
    add_card(tmp_path, recipe, names)
    stream = load_dataset(str(tmp_path), "views", split="train", streaming=True).with_format("numpy")
    scope = {"np": np, "K": 5, "rows": next(stream.iter(batch_size=15))}
    exec(READING[codec], scope)
    exact = np.concatenate([epoch["teacher_logits"] for epoch in views])[:15].astype(np.float32)
    distilled = load_distilled(tmp_path)
    assert distilled.codec == codec
    ours = torch.cat([distilled.epoch(0)[1], distilled.epoch(1)[1]])[:15].float().numpy()
    np.testing.assert_allclose(scope["logits"], ours, rtol=1e-3, atol=1e-3)
    worst = {"float16": 1e-6, "int8": 0.02, "int4": 0.3, "topk": 9.0}[codec]
    assert np.abs(scope["logits"] - exact).max() <= worst
    if codec != "float16":
        assert READING[codec].splitlines()[0] in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_docs_show_the_lines():
    text = (ROOT / "docs" / "labels.md").read_text(encoding="utf-8")
    for line in READING.values():
        assert line in text


def test_a_topk_class_out_of_range_is_an_error(tmp_path, monkeypatch):
    from prism_hf.dataset import codecs

    real = codecs._top
    monkeypatch.setattr(
        codecs, "_top", lambda *rest: real(*rest) | {"top_classes": np.full((len(rest[0]), 2), 5, np.int16)}
    )
    recipe, names, *_ = small_set(tmp_path, classes=5, overrides=CODECS["topk"])
    add_card(tmp_path, recipe, names)
    with pytest.raises(DataError, match="top_classes has values outside of 0 to 4"):
        load_distilled(tmp_path)


@each("loss", ["mse_ce", "cosine"])
def test_topk_labels_refuse_a_loss_that_compares_all_logits(loss, tmp_path):
    recipe, names, *_ = small_set(tmp_path, classes=5, overrides=CODECS["topk"])
    add_card(tmp_path, recipe, names)
    settings = dataclasses.replace(recipe.evaluation, loss=loss)
    with pytest.raises(DataError, match=rf"only the highest logits .* {loss} compares all of them; use kl or dist"):
        train_student(load_distilled(tmp_path), settings, labels="soft", seed=0, device=torch.device("cpu"))


def test_labels_that_are_not_stored_are_refused_without_teachers(tmp_path):
    recipe, names, *_ = small_set(tmp_path, classes=5, overrides=["relabel.codec=seed"])
    add_card(tmp_path, recipe, names)
    distilled = load_distilled(tmp_path)
    assert distilled.epoch(0)[1].shape == (15, 0)
    with pytest.raises(DataError, match="stores no soft labels"):
        train_student(distilled, recipe.evaluation, labels="soft", seed=0, device=torch.device("cpu"))
    assert not re.search("logits = ", (tmp_path / "README.md").read_text(encoding="utf-8"))


def test_a_missing_column_of_labels_is_not_taken_for_codec_seed(tmp_path):
    recipe, names, *_ = small_set(tmp_path, classes=5)
    add_card(tmp_path, recipe, names)
    (path,) = (tmp_path / "views").iterdir()
    pq.write_table(pq.read_table(path).drop_columns(["teacher_logits"]), path)
    with pytest.raises(DataError, match="table 'views' has no column teacher_logits"):
        load_distilled(tmp_path)


def test_topk_labels_are_for_one_temperature(tmp_path):
    recipe, names, *_ = small_set(tmp_path, classes=5, overrides=CODECS["topk"])
    add_card(tmp_path, recipe, names)
    settings = dataclasses.replace(recipe.evaluation, temperature=2.0)
    with pytest.raises(DataError, match="are stored for evaluation.temperature 20.0; set it to that"):
        train_student(load_distilled(tmp_path), settings, labels="soft", seed=0, device=torch.device("cpu"))
