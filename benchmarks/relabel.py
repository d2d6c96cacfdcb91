"""Compare relabeling and the training of students with standard pipelines, side by side in one process.

    python benchmarks/relabel.py --record benchmarks/results/relabel.json

- relabel: ours is views, folded teachers and float16 logits of `relabel_batches`. The standard pipeline decodes PNG files
  with Pillow, crops and flips them with torchvision, and collates them in a DataLoader without workers (there is one core
  to share); the same teachers run in NCHW.
- students: ours is the training loop of `train_student`. The standard pipeline is a DataLoader with torchvision transforms
  and CutMix of timm, and AdamW.

Variants run in turn. The ratio is the median over rounds of images per second, ours / standard.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from throughput import MEAN, STD, THREE, network, wait_for
from timm.data import Mixup
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from prism_hf.dataset.reader import DistilledDataset
from prism_hf.evaluation.students import train_student
from prism_hf.images.views import ViewRows, from_columns
from prism_hf.method import relabel_epoch
from prism_hf.models import Teacher, folded
from prism_hf.recipe import EvaluationRecipe
from prism_hf.recipe.sections import RelabelRecipe

CLASSES = 10


class Pictures(Dataset):
    """PNG files in memory, with a random crop and flip."""

    def __init__(self, images: torch.Tensor, side: int) -> None:
        self.files = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "png")
            self.files.append(buffer.getvalue())
        crop = transforms.RandomResizedCrop(side, scale=(0.25, 1.0), antialias=True)
        steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(io.BytesIO(self.files[index])).convert("RGB")), index * CLASSES // len(self)


def relabel_pair(names: tuple[str, ...], side: int, batch: int, device: torch.device) -> tuple[int, Callable, Callable]:
    """Return the number of images, and functions that label them once: ours, and the standard pipeline."""
    images = torch.randint(256, (2 * batch, 3, side, side), dtype=torch.uint8)
    probe = torch.randn(8, 3, side, side, device=device)
    models = [network(name, probe) for name in names]
    loader = DataLoader(Pictures(images, side), batch_size=batch, shuffle=True)
    cutmix = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=CLASSES)
    teachers = []
    for name in names:
        model = network(name, probe).to(memory_format=torch.channels_last)
        teachers.append(folded(Teacher(name, model, MEAN, STD, side, CLASSES, name, "none", None, "", None)))
    settings = RelabelRecipe(teachers=names, batch_size=batch, ensemble="mean")

    @torch.no_grad()
    def standard() -> None:
        for pictures, labels in loader:
            mixed, _ = cutmix(pictures.to(device), labels.to(device))
            torch.stack([model(mixed) for model in models]).mean(0).half().cpu()

    return len(images), lambda: relabel_epoch(0, images, teachers, settings, seed=0), standard


def student_pair(name: str, side: int, batch: int, device: torch.device) -> tuple[int, Callable, Callable]:
    """Return the number of images of ten epochs, and functions that train a student for them."""
    count, epochs = 4 * batch, 10
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    labels = torch.arange(count) * CLASSES // count
    model = network(name, torch.randn(8, 3, side, side))
    teacher = Teacher(name, model, MEAN, STD, side, CLASSES, name, "none", None, "", None)
    settings = RelabelRecipe(teachers=(name,), batch_size=batch, ensemble="mean", epochs=epochs)
    views = [relabel_epoch(epoch, images, [teacher], settings, seed=0) for epoch in range(epochs)]

    def rows_of(epoch: int, rows: range) -> tuple[ViewRows, torch.Tensor]:
        part = slice(rows.start, rows.stop)
        return from_columns(views[epoch])[part], torch.from_numpy(views[epoch]["teacher_logits"])[part]

    names = tuple(map(str, range(CLASSES)))
    distilled = DistilledDataset(images, labels, names, torch.zeros(count, CLASSES), epochs, rows_of, 1, 1, None, "toy")
    protocol = EvaluationRecipe(student=name, batch_size=batch, epochs=epochs)
    loader = DataLoader(Pictures(images, side), batch_size=batch, shuffle=True)
    cutmix = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=CLASSES)

    def standard() -> None:
        model = timm.create_model(name, num_classes=CLASSES).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(epochs):
            for pictures, classes in loader:
                mixed, targets = cutmix(pictures.to(device), classes.to(device))
                loss = -(targets * F.log_softmax(model(mixed), dim=1)).sum(1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def ours() -> None:
        train_student(distilled, protocol, labels="soft", seed=0, device=device)

    return count * epochs, ours, standard


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="the small cases only, one round")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    makers = {
        "relabel, resnet18, 224 px": lambda: relabel_pair(("resnet18",), 224, 50, device),
        "relabel, resnet18 + mobilenetv2_100, 224 px": lambda: relabel_pair(THREE[:2], 224, 50, device),
        "relabel, test_resnet, 32 px": lambda: relabel_pair(("test_resnet",), 32, 50, device),
        "student, test_resnet, 32 px, batch 24": lambda: student_pair("test_resnet", 32, 24, device),
        "student, test_resnet, 32 px, batch 100": lambda: student_pair("test_resnet", 32, 100, device),
    }
    cases = {}
    for label, make in makers.items():
        if args.toy and "224" in label:
            continue
        count, *variants = make()
        seconds: list[list[float]] = [[], []]
        for number in range(2 if args.toy else args.rounds + 1):
            for variant, spent in zip(variants, seconds, strict=True):
                wait_for(device)
                started = time.perf_counter()
                variant()
                wait_for(device)
                if number:  # the first round allocates memory
                    spent.append(time.perf_counter() - started)
        ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
        ours, standard = (count / statistics.median(spent) for spent in seconds)
        cases[label] = {"ratio": ratio, "ours_per_s": ours, "standard_per_s": standard}
        sys.stdout.write(f"{label}: {ours:.0f} images/s, {ratio:.2f} x standard\n")
        sys.stdout.flush()
    if args.record:
        from prism_hf.runtime import write_json

        command = f"python benchmarks/relabel.py {' '.join(sys.argv[1:])}"
        write_json(args.record, {"command": command, "device": args.device, **machine.facts(), "cases": cases})


if __name__ == "__main__":
    main()
