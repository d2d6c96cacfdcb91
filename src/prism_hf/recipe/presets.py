"""Published protocols of student training, as values of `evaluation`."""

from typing import Any

Values = dict[str, Any]

_PRESETS: dict[str, Values] = {
    # The published script of PRISM (arXiv 2511.09905), as in G-VBSM.
    "prism": {
        "batch_size": 50,
        "micro_batch": 25,
        "epochs": 300,
        "loss": "mse_ce",
        "ce_weight": 0.1,
        "optimizer": "adamw",
        "lr": 1.0e-3,
        "weight_decay": 0.01,
    },
    # RD3 (ICLR 2026) for ResNet-18; other students want cosine_stretch 2. The temperature is SRe2L's.
    "rd3": {
        "batch_size": 50,
        "micro_batch": None,
        "epochs": 400,
        "loss": "kl",
        "temperature": 20.0,
        "optimizer": "adam",
        "lr": 1.0e-3,
        "weight_decay": 0.0,
    },
    # CDA (arXiv 2311.18838), with the values of the public package rethinkdc.
    "cda": {
        "batch_size": 128,
        "micro_batch": None,
        "epochs": 300,
        "loss": "kl",
        "temperature": 20.0,
        "optimizer": "adamw",
        "lr": 1.0e-3,
        "weight_decay": 0.01,
    },
}


def preset_values(name: object) -> Values:
    """Return the values of a preset; none for an unknown name, which the check of the recipe refuses."""
    values = _PRESETS.get(str(name), {})
    return {"cosine_stretch": 1.0, "ema": 0.0, "hard_epochs": 0, **values} if values else {}
