"""Shards of the tables, planned from the recipe before any file exists."""

import itertools

import pytest
from pipeline import tiny

from prism_hf.dataset.format import image_group_rows, image_shards, view_group_rows, view_shards
from prism_hf.recipe import VIEW_ROW_BYTES
from prism_hf.recipe.plan import batch_ranges

MOST = 8192
"""Views of a shard that holds more than one epoch."""


def recipe(*, classes=10, ipc=10, size=32, channels=3, epochs=300, batch=50, mb=500):
    return tiny(
        f"data.num_classes={classes}", f"synthesis.ipc={ipc}", f"data.size={size}", f"data.channels={channels}",
        f"relabel.epochs={epochs}", f"relabel.batch_size={batch}", f"packaging.shard_megabytes={mb}",
        "synthesis.batch_size=2",
    )  # fmt: skip


KINDS = [
    {}, {"epochs": 1}, {"ipc": 1, "epochs": 7, "batch": 10}, {"batch": 7}, {"classes": 3, "ipc": 1, "batch": 2},
    {"classes": 100, "size": 224, "mb": 5, "ipc": 3}, {"classes": 1000, "ipc": 1, "epochs": 33, "mb": 1},
    {"classes": 1000, "ipc": 9, "epochs": 3, "batch": 1000, "mb": 3}, {"classes": 300, "ipc": 3, "mb": 1, "batch": 900},
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("missing", [0, 1])
def test_every_row_and_every_epoch_is_in_exactly_one_shard(kind, missing):
    made = recipe(**kind)
    count = made.num_images - missing  # a partial dataset
    for shards, total in ((image_shards(made, count), count), (view_shards(made, count), made.relabel.epochs)):
        assert list(itertools.chain(*(shard.rows for shard in shards))) == list(range(total))
        assert all(len(shard.rows) for shard in shards)
        assert [shard.name for shard in shards] == [
            f"train-{number:05d}-of-{len(shards):05d}.parquet" for number in range(len(shards))
        ]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_image_shards_end_between_labeling_batches(kind):
    """The labels of an image depend on the other images in its batch."""
    made = recipe(**kind)
    starts = {batch.start for batch in batch_ranges(made.num_images, made.relabel.batch_size)}
    assert {shard.rows.start for shard in image_shards(made, made.num_images)} <= starts


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_shard_of_views_limits_what_a_killed_run_loses(kind):
    made = recipe(**kind)
    bound = made.packaging.shard_megabytes * 10**6
    for shard in view_shards(made, made.num_images):
        views = len(shard.rows) * made.num_images
        assert len(shard.rows) == 1 or views <= MOST
        assert len(shard.rows) == 1 or views * (2 * made.data.num_classes + VIEW_ROW_BYTES) <= bound


def test_small_datasets_have_one_shard_and_large_ones_the_fewest_that_fit():
    small = recipe(epochs=81)
    assert len(image_shards(small, 100)) == len(view_shards(small, 100)) == 1
    assert len(view_shards(recipe(epochs=82), 100)) == 2, "8200 views"
    large = recipe(classes=1000, ipc=10, size=224, epochs=3)
    assert [len(shard.rows) for shard in view_shards(large, 10_000)] == [1, 1, 1], "an epoch is not split"
    raw = 10_000 * (3 * 224**2 + 2 * 1000)
    assert len(image_shards(large, 10_000)) == -(-raw // 500_000_000)


def test_there_are_at_most_as_many_image_shards_as_batches():
    made = recipe(classes=100, ipc=3, size=224, batch=100, mb=1)
    assert [shard.rows for shard in image_shards(made, 300)] == [range(0, 100), range(100, 200), range(200, 300)]


def test_a_row_group_holds_about_four_megabytes_and_at_least_one_row():
    assert image_group_rows(recipe(classes=10, size=32, channels=3)) == 4 * 2**20 // (3 * 32 * 32 + 20)
    assert image_group_rows(recipe(size=2048)) == 1
    assert view_group_rows(2000 + VIEW_ROW_BYTES) == 4 * 2**20 // (2000 + VIEW_ROW_BYTES)
    assert view_group_rows(10**7) == 1
