"""Helpers for tests of scores: the digits data, and small datasets made from it."""

import numpy as np
import torch

from prism_hf.dataset.reader import DistilledDataset
from prism_hf.evaluation.scores import student_tasks
from prism_hf.images.source import load_source
from prism_hf.images.views import draw_views, from_columns, to_columns
from prism_hf.recipe.yaml_file import load_recipe

TINY = [
    "evaluation.student=test_byobnet",
    "evaluation.seeds=[0,1]",
    "evaluation.epochs=1",
    "evaluation.full_data_epochs=1",
    "evaluation.batch_size=10",
]


def digits(*overrides):
    """Return a recipe and its real data."""
    recipe = load_recipe("recipes/digits/prism_ipc10.yaml", [*TINY, *overrides])
    return recipe, load_source(recipe.data)


def packed(data, seed):
    rows = np.concatenate([own[:2] for own in data.train.rows_by_class(10)])
    generator = torch.Generator().manual_seed(seed)
    view = draw_views(20, 32, generator, crop_scale=(0.6, 1.0), flip=False)
    views = from_columns(to_columns(view, torch.arange(20)))
    labels = torch.from_numpy(data.train.labels[rows])
    logits = torch.nn.functional.one_hot(labels, 10).half() * 5
    images = data.train.images(rows)

    def views_of(_epoch, wanted):
        return views[wanted.start : wanted.stop], logits[wanted.start : wanted.stop]

    return DistilledDataset(images, labels, data.class_names, logits, 1, views_of, 100 + seed, 200 + seed, None, str(seed))


def sources(data, *, without=()):
    """Return the training sets of the students, by name."""
    given = {"distilled": packed(data, 0), "random_real": packed(data, 1), "full": data.train}
    return {name: source for name, source in given.items() if name not in without}


def tasks(folder, recipe, data, *, without=(), settings=None, **more):
    """Return the tasks for every student of the table."""
    settings = settings or recipe.evaluation
    return student_tasks(
        sources(data, without=without), data.test, settings, recipe.relabel.view, folder, num_classes=10, **more
    )
