"""List ImageNet-1K networks with BatchNorm that can be teachers, and check what the Hub says about them.

    python benchmarks/teacher_pool.py --record benchmarks/results/teacher-pool.json
    python benchmarks/teacher_pool.py --check        # needs the Hub

License, Hub id, input size and normalization are those that timm states; BN layers and parameters are counted. `--check`
compares the license with that of the repo on the Hub, which counts, and looks for its safetensors file.
"""

import argparse
import sys
from pathlib import Path

import machine
import timm
from torch import nn

from prism_hf.runtime import write_json

POOL = (
    "resnet18.tv_in1k", "resnet50.a1_in1k", "mobilenetv2_100.ra_in1k", "mobilenetv3_small_100.lamb_in1k",
    "efficientnet_b0.ra_in1k", "tf_efficientnet_lite0.in1k", "regnetx_002.pycls_in1k", "regnety_008.pycls_in1k",
    "densenet121.ra_in1k", "mnasnet_100.rmsp_in1k", "ghostnet_100.in1k", "mixnet_s.ft_in1k", "vgg11_bn.tv_in1k",
    "dla34.in1k", "inception_v3.tv_in1k", "seresnet50.ra2_in1k", "ese_vovnet19b_dw.ra_in1k", "rexnet_100.nav_in1k",
)  # fmt: skip


def facts_of(name: str) -> dict[str, object]:
    """Return what timm knows about a network, and its numbers of BN layers and parameters."""
    cfg, model = timm.get_pretrained_cfg(name), timm.create_model(name.partition(".")[0])
    assert cfg is not None
    return {
        "hub_id": cfg.hf_hub_id,
        "license": cfg.license,
        "size": cfg.input_size[-1],
        "mean": list(cfg.mean),
        "bn_layers": sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def problem_on_hub(name: str, facts: dict[str, object]) -> str | None:
    """Return what is wrong with a network on the Hub: no safetensors, or another license than timm states."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(str(facts["hub_id"]))
    files = {file.rfilename for file in info.siblings or []}
    if "model.safetensors" not in files:
        return f"{name}: {facts['hub_id']} has no model.safetensors"
    stated = info.card_data.license if info.card_data else None
    return None if stated == facts["license"] else f"{name}: license {stated} on the Hub, {facts['license']} in timm"


def main() -> None:
    """Print the pool, record it, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the Hub; the exit code is 1 if anything differs")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    pool = {name: facts_of(name) for name in POOL}
    for name, facts in pool.items():
        sys.stdout.write(f"{name}: {facts}\n")
    if args.record:
        write_json(args.record, {"command": "python benchmarks/teacher_pool.py", **machine.facts(), "teachers": pool})
    if args.check:
        problems = [problem for name, facts in pool.items() if (problem := problem_on_hub(name, facts))]
        sys.stdout.write("\n".join(problems or ["the Hub agrees"]) + "\n")
        sys.exit(bool(problems))


if __name__ == "__main__":
    main()
