import io

import numpy as np
import pytest
import torch
from PIL import Image

from prism_hf.evaluation.diversity import Diversity
from prism_hf.hub.figures import draw_diversity, draw_grid, grid


def images(classes, ipc, channels=3, size=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (classes * ipc, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("classes", "ipc", "shown"), [(3, 2, (3, 2)), (2, 1, (2, 1)), (25, 12, (20, 10))])
def test_the_grid_shows_each_image_in_its_cell(classes, ipc, shown, channels):
    pixels = images(classes, ipc, channels)
    picture = grid(pixels, ipc)
    assert picture.shape == (channels, shown[0] * 7 - 1, shown[1] * 7 - 1)
    for c in range(shown[0]):
        for s in range(shown[1]):
            assert torch.equal(picture[:, c * 7 : c * 7 + 6, s * 7 : s * 7 + 6], pixels[c * ipc + s])
    assert bool((picture[:, 6::7] == 255).all())
    assert bool((picture[:, :, 6::7] == 255).all())


def read(path):
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        assert picture.format == "PNG"
        assert not {"Software", "date", "Creation Time"} & set(picture.info)
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_images_give_the_same_bytes(tmp_path, channels):
    for name in ("one", "two"):
        draw_grid(tmp_path / f"{name}.png", images(3, 4, channels), ["a", "b", "c"], 4)
    draw_grid(tmp_path / "other.png", 255 - images(3, 4, channels), ["a", "b", "c"], 4)
    one, two, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other
    assert read(tmp_path / "one.png").std() > 10


def test_more_classes_make_the_grid_taller_and_more_slots_wider(tmp_path):
    sizes = {}
    for classes, ipc in ((2, 2), (6, 2), (2, 8), (40, 40)):
        draw_grid(tmp_path / "p.png", images(classes, ipc, 1), [f"c{i}" for i in range(classes)], ipc)
        sizes[classes, ipc] = read(tmp_path / "p.png").shape[:2]
    assert sizes[6, 2][0] > sizes[2, 2][0]
    assert sizes[2, 8][1] > sizes[2, 2][1]
    assert max(sizes[40, 40]) < 3000


HOSTILE = ["$x$", "$", "\\frac{1}{0} $\\frac{}$", "</script><b>", "x" * 500, "line\nbreak", "", " ", "鹤", "a|b", "\\$5$"]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", HOSTILE)
def test_any_class_name_can_be_drawn(tmp_path, name):
    draw_grid(tmp_path / "grid.png", images(2, 2), [name, "plain"], 2)
    draw_diversity(tmp_path / "diversity.png", {name or "set": Diversity((0.5, 0.25), 0.375)}, [name, "plain"])
    for file in ("grid", "diversity"):
        assert max(read(tmp_path / f"{file}.png").shape) < 3000


def test_the_diversity_plot_is_deterministic_and_handles_datasets_without_pairs(tmp_path):
    sets = {
        "distilled": Diversity((None, None), None),
        "random real": Diversity((0.5, None), 0.5),
        "all real": Diversity((0.25, 0.75), 0.5),
    }
    for name in ("one", "two"):
        draw_diversity(tmp_path / f"{name}.png", sets, ["a", "b"])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    draw_diversity(tmp_path / "fewer.png", {"distilled": sets["distilled"]}, ["a", "b"])
    assert read(tmp_path / "fewer.png").shape[0] < read(tmp_path / "one.png").shape[0]


def test_pictures_do_not_change_matplotlib_settings(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_grid(tmp_path / "grid.png", images(2, 2), ["a", "b"], 2)
    assert dict(matplotlib.rcParams) == before


def test_a_name_that_the_font_cannot_draw_is_replaced_by_a_number(tmp_path, recwarn):
    draw_grid(tmp_path / "grid.png", images(2, 2), ["日本", "plain"], 2)
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
