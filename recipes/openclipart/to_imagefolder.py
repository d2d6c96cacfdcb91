"""Make a folder of images from Debian's clip art (package openclipart-png, public domain): its folders are the classes.

    apt-get install openclipart-png
    python recipes/openclipart/to_imagefolder.py /usr/share/openclipart/png outputs/openclipart

Ten classes of colored drawings; folders of icons, shapes, flags and logos are left out. Transparent pixels become white,
and the longer side has at most 256 pixels. Of drawings that look the same at 12 x 12 pixels, the first is kept, so that
none is in both splits. A quarter of each class is for testing.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = (
    "animals", "buildings", "education", "food", "office", "people", "plants", "recreation", "tools", "transportation",
)  # fmt: skip
MOST_PIXELS = 40_000_000
"""One drawing has 168 million pixels."""
LEFT_OUT = ("flags", "icons", "logos", "stars")


def drawing(path: Path) -> Image.Image | None:
    """Return a drawing on white, at most 256 pixels wide and high; `None` if it is too large."""
    with Image.open(path) as picture:
        if picture.width * picture.height > MOST_PIXELS:
            return None
        picture.thumbnail((256, 256))
        colored = picture.convert("RGBA")
    white = Image.new("RGBA", colored.size, "white")
    return Image.alpha_composite(white, colored).convert("RGB")


def main() -> None:
    """Write train/CLASS and test/CLASS."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    Image.MAX_IMAGE_PIXELS = None
    seen: set[bytes] = set()
    for name in CLASSES:
        pictures = []
        for path in sorted((source / name).rglob("*.png")):
            picture = None if set(LEFT_OUT) & set(path.parts) else drawing(path)
            if picture is None:
                continue
            look = (np.asarray(picture.resize((12, 12)).convert("L")) // 32).tobytes()
            if look not in seen:
                seen.add(look)
                pictures.append(picture)
        order = np.random.default_rng(0).permutation(len(pictures))
        for place, number in enumerate(order.tolist()):
            folder = target / ("test" if place < len(pictures) // 4 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            pictures[number].save(folder / f"{number:04d}.png")
        sys.stdout.write(f"{name}: {len(pictures)} drawings\n")


if __name__ == "__main__":
    main()
