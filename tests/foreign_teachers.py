"""Teachers as other programs save them, and hostile pickles."""

import pickle

import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor


def resnet(folder, *, classes=3, names=None, size=None, **save):
    labels = {} if names is None else {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        **({"num_labels": classes} | labels),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ResNetForImageClassification(config).save_pretrained(folder, **save)
    size = size or {"height": 24, "width": 24}
    ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def bomb_in(folder):
    """Return bytes that create a file when they are unpickled, and the path of that file."""
    fired = folder / "fired"
    data = pickle.dumps(Bomb(fired))
    pickle.loads(data)
    assert fired.exists(), "the bomb does not work"
    fired.unlink()
    return data, fired
