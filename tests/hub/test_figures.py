import io
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each import each
from PIL import Image
from sklearn.datasets import load_digits

from prism_hf.evaluation.diversity import Diversity
from prism_hf.hub.figures import draw_diversity, draw_grid, grid, part_shown, plain_name
from prism_hf.images.pixels import encode


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
        draw_grid(tmp_path / f"{name}.png", images(3, 4, channels), ["a", "b", "c"], 4, ipc=4)
    draw_grid(tmp_path / "other.png", 255 - images(3, 4, channels), ["a", "b", "c"], 4, ipc=4)
    one, two, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other
    assert read(tmp_path / "one.png").std() > 10


def test_more_classes_make_the_grid_taller_and_more_slots_wider(tmp_path):
    sizes = {}
    for classes, ipc in ((2, 2), (6, 2), (2, 8), (40, 40)):
        draw_grid(tmp_path / "p.png", images(classes, ipc, 1), [f"c{i}" for i in range(classes)], ipc, ipc=ipc)
        sizes[classes, ipc] = read(tmp_path / "p.png").shape[:2]
    assert sizes[6, 2][0] > sizes[2, 2][0]
    assert sizes[2, 8][1] > sizes[2, 2][1]
    assert max(sizes[40, 40]) < 3000


HOSTILE = ["$x$", "$", "\\frac{1}{0} $\\frac{}$", "</script><b>", "x" * 500, "line\nbreak", "", " ", "鹤", "a|b", "\\$5$"]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", HOSTILE)
def test_any_class_name_can_be_drawn(tmp_path, name):
    draw_grid(tmp_path / "grid.png", images(2, 2), [name, "plain"], 2, ipc=2)
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
    draw_grid(tmp_path / "grid.png", images(2, 2), ["a", "b"], 2, ipc=2)
    assert dict(matplotlib.rcParams) == before


def test_a_name_that_the_font_cannot_draw_is_replaced_by_a_number(tmp_path, recwarn):
    draw_grid(tmp_path / "grid.png", images(2, 2), ["日本", "plain"], 2, ipc=2)
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


@each(
    "name, drawn",
    [
        ("a rather long class name 007", "a rather long class name 007"),
        ("a_rather_long_class_name_of_one_word_007", "a_rather_long_class_name_of_\none_word_007"),
        ("x" * 76 + "0007", "x" * 28 + "\n" + "x" * 28 + "\n" + "x" * 20 + "0007"),
        (
            "from " + "x" * 200 + " to 007",
            f"from {'x' * 23}\n{'x' * 28}\n{'x' * 14}…{'x' * 13}\n{'x' * 28}\n{'x' * 21} to 007",
        ),
        ("日本", "class 3"),
        ("🐶 Hund", "class 3: Hund"),
        ("🐶!", "class 3"),
        ("", "class 3"),
        (" two\nlines ", "two lines"),
        ("cafe\u0301", "café"),
        ("كلب الماء 3", "كلب الماء 3"),
        ("a\u202eb", "a\ufffdb"),
        ("$x$", "\\$x\\$"),
    ],
)
def test_a_class_name_is_wrapped_and_only_what_cannot_be_drawn_is_replaced(name, drawn):
    assert plain_name(name, "class 3", width=28, lines=5) == drawn
    assert len(plain_name(name, "class 3")) <= 24 + 2, "two signs more for the escaped dollars"


def labels_of(path, names):
    """Return the part of each row to the left of its image, from a grid of black images of 64 pixels."""
    draw_grid(path, torch.zeros(len(names), 1, 64, 64, dtype=torch.uint8), names, 1, ipc=1)
    picture = read(path)[..., 0]
    left = int(np.flatnonzero((picture == 0).sum(0) >= 64 * len(names))[0])
    tall = (len(picture) + 1) // len(names)
    return [picture[row * tall : (row + 1) * tall - 1, :left] for row in range(len(names))]


@pytest.mark.parametrize("letters", [25, 40, 80, 300])
def test_rows_whose_names_differ_only_at_the_end_are_told_apart(tmp_path, letters):
    names = [f"{'a long class name ' * 20}"[: letters - 3] + f"{k:03d}" for k in range(3)]
    rows = labels_of(tmp_path / "grid.png", names)
    ink = [(row < 128) for row in rows]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(ink, 2))
    same = labels_of(tmp_path / "same.png", [names[0]] * 3)
    assert np.array_equal(same[0], same[1])
    for row in rows:
        assert (row[:, :4] == 255).all(), "nothing is cut off at the left"
        assert (row[:1] == 255).all(), "nor at the top"


def test_the_grid_says_which_part_of_the_classes_and_slots_it_shows(tmp_path):
    assert part_shown(20, 10) == ""
    assert part_shown(200, 10) == "the first 20 of 200 classes"
    assert part_shown(200, 50) == "the first 20 of 200 classes and the first 10 of 50 images per class"
    names, heights = [f"c{k}" for k in range(20)], {}
    for count in (20, 21, 200):
        draw_grid(tmp_path / "grid.png", images(20, 1, 1), [*names, *["more"] * (count - 20)], 1, ipc=1)
        heights[count] = read(tmp_path / "grid.png").shape[0]
    assert heights[21] == heights[200] == heights[20] + 22, "a line below the rows"


@each("channels, size", [(3, 64), (3, 32), (1, 224), (1, 9)], some=[(3, 64)])
def test_the_grid_is_a_thumbnail_of_at_most_300_kb_even_if_the_images_are_noise(tmp_path, channels, size):
    names = [f"{'WM' * 46}{k:04d}" for k in range(200)]
    draw_grid(tmp_path / "grid.png", images(20, 10, channels, size), names, 10, ipc=50)
    assert (tmp_path / "grid.png").stat().st_size < 300_000
    assert max(read(tmp_path / "grid.png").shape) < 2000


def test_thumbnails_are_averages_of_large_images_and_whole_multiples_of_small_ones(tmp_path):
    large = torch.tensor([0, 100], dtype=torch.uint8).repeat(64)[None, None, None].expand(2, 3, 128, 128)
    draw_grid(tmp_path / "large.png", large, ["a"], 2, ipc=2)
    assert (read(tmp_path / "large.png")[:64, -64:] == 50).all()
    small = images(1, 1, 1, 20)
    draw_grid(tmp_path / "small.png", small, ["a"], 1, ipc=1)
    shown = read(tmp_path / "small.png")[:, -60:, 0]
    assert np.array_equal(shown, np.kron(small[0, 0].numpy(), np.ones((3, 3), dtype=np.uint8)))


def test_the_grid_is_smaller_than_the_images_themselves(tmp_path):
    digits = torch.from_numpy(load_digits().images[:100] * 15.9).byte()[:, None]
    digits = F.interpolate(digits, size=(32, 32), mode="nearest")
    draw_grid(tmp_path / "grid.png", digits, [str(k) for k in range(10)], 10, ipc=10)
    encoded = sum(len(encode(image, "png")) for image in digits)
    assert (tmp_path / "grid.png").stat().st_size < encoded
