"""Synthesis jobs of a tiny recipe that start from noise images."""

import torch

from prism_hf.images.pixels import noise
from prism_hf.recipe.plan import plan_jobs

STILL = {"crop_scale": [1.0, 1.0], "flip": False, "jitter": 0}
TWO_SLOTS = {"synthesis.slots_per_batch": 2, "synthesis.batch_size": 6}
DENSE = {"synthesis.densification": {"size": 8}}


def start(recipe, seed=0):
    """Return the start images by (class, slot), (K, ipc, C, S, S)."""
    data = recipe.data
    shape = (data.num_classes, recipe.synthesis.ipc, data.channels, data.size, data.size)
    return noise(shape, torch.Generator().manual_seed(seed))


def first_job(recipe, number=0):
    """Return the first arguments of `synthesize`: a job, the settings, and the job's start images."""
    job = plan_jobs(recipe)[number]
    return job, recipe.synthesis, start(recipe)[torch.tensor(job.classes), torch.tensor(job.slots)]
