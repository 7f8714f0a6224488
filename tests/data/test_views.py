"""Views: one crop and flip for (seed, image, number), whoever asks, wherever, however often."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny

from dho.config import ViewsConfig
from dho.data import pixels as pixels_module
from dho.data.loader import loader
from dho.data.pixels import Pixels, rendering_fingerprint
from dho.data.views import random_view
from dho.runtime.dho_runtime import centre_box, decode, render

DEFAULT = ViewsConfig()
GOLDEN = [
    # config, image, view, width, height -> box, flip; a change here makes every teacher store in the world stale
    (DEFAULT, "a", 0, 28, 28, (2, 0, 25, 28), True),
    (DEFAULT, "a", 1, 28, 28, (0, 3, 28, 25), False),
    (DEFAULT, "b", 0, 640, 480, (110, 5, 586, 473), False),
    (DEFAULT, "c", 3, 7, 5, (0, 0, 6, 5), False),
    (ViewsConfig(seed=7, scale=[0.08, 1.0]), "d", 2, 4000, 300, (1850, 0, 2150, 300), True),
]
SAMPLE = [(number, view) for number in range(40) for view in range(4)]


def name(image: str | int) -> bytes:
    return hashlib.sha256(str(image).encode()).digest()


def boxes_of(number: int) -> str:
    return json.dumps([random_view(DEFAULT, name(number), view, 640, 480) for view in range(4)])


@pytest.mark.parametrize(("config", "image", "view", "width", "height", "box", "flip"), GOLDEN)
def test_views_are_those_of_every_release(
    config: ViewsConfig, image: str, view: int, width: int, height: int, box: tuple[int, int, int, int], flip: bool
) -> None:
    assert random_view(config, name(image), view, width, height) == (box, flip)


def test_another_process_with_another_hash_seed_gets_the_same_views() -> None:
    program = (
        "import hashlib, json\nfrom dho.config import ViewsConfig\nfrom dho.data.views import random_view\n"
        "name = lambda number: hashlib.sha256(str(number).encode()).digest()\n"
        "print(json.dumps([random_view(ViewsConfig(), name(i), v, 640, 480) for i in range(40) for v in range(4)]))"
    )
    here = json.loads(json.dumps([random_view(DEFAULT, name(number), view, 640, 480) for number, view in SAMPLE]))
    for seed in ("0", "4711"):
        result = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        assert json.loads(result.stdout) == here


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_processes_get_the_same_views(workers: int) -> None:
    np.random.seed(workers)
    assert list(loader(boxes_of, 3, 11, workers)) == [boxes_of(number) for number in range(3, 11)]


def test_kept_views_are_the_same_pixels(tiny: Tiny) -> None:
    pixels, fresh = (Pixels(tiny.index, tiny.config.views, 16, "bilinear") for _ in range(2))
    rows, views = [3, 1, 3], [0, 1, 1]
    first = pixels.batch(rows, views, keep=True)
    first_again = pixels.batch(rows, views, keep=True)
    assert torch.equal(first, first_again) and torch.equal(first, fresh.batch(rows, views))
    first.zero_()  # a batch is the caller's to change
    assert torch.equal(pixels.batch(rows, views), first_again)


def test_decoded_images_are_kept_as_far_as_their_bytes_allow_and_change_no_pixel(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(
        "dho.data.pixels.decode", lambda data, max_pixels: decoded.append(data) or decode(data, max_pixels)
    )
    room_for_two = 2 * 4 * 40 * 36 + 100
    pixels, fresh = (
        Pixels(tiny.index, tiny.config.views, 16, "bilinear", keep_bytes) for keep_bytes in (room_for_two, 0)
    )
    rows = [3, 1, 8]
    for view in (0, 1, 0):
        assert torch.equal(pixels.batch(rows, view), fresh.batch(rows, view))
    of_row = [decoded.count(tiny.index.read(row)) - 3 for row in rows]  # `fresh` decodes each of them every time
    assert of_row == [1, 1, 3]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_processes_render_the_same_pixels(tiny: Tiny, workers: int) -> None:
    pixels = Pixels(tiny.index, tiny.config.views, 24, "bicubic")
    expected = pixels.batch(range(12), view=1)
    for number, batch in enumerate(loader(functools.partial(_one, pixels), 0, 12, workers)):
        assert (batch[0] == expected[number]).all()


def _one(pixels: Pixels, row: int) -> Any:
    return pixels.batch([row], view=1)


def test_the_order_of_asking_and_a_batchs_company_do_not_matter(tiny: Tiny) -> None:
    pixels = Pixels(tiny.index, tiny.config.views, 16, "bilinear")
    rows, views = [5, 40, 17], [1, 0, 1]
    together = pixels.batch(rows, views)
    for i in (2, 0, 1):
        assert (pixels.batch([rows[i]], views[i])[0] == together[i]).all()
        assert (pixels.all_views([rows[i]], 2)[0, views[i]] == together[i]).all()


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (224, 224), (28, 28)])
@pytest.mark.parametrize("scale", [[0.5, 1.0], [0.2, 0.6]])
def test_area_and_aspect_stay_within_bounds_and_inside_the_image(width: int, height: int, scale: list[float]) -> None:
    config = ViewsConfig(scale=scale)
    shares, aspects = [], []
    for number, view in SAMPLE:
        left, top, right, bottom = random_view(config, name(number), view, width, height)[0]
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        shares.append((right - left) * (bottom - top) / (width * height))
        aspects.append((right - left) / (bottom - top))
    rounding = 1.5 / min(width, height)
    assert min(shares) > scale[0] - 2 * rounding and max(shares) < scale[1] + 2 * rounding
    assert (
        min(shares) < scale[0] + 0.1 and max(shares) > scale[0] + 0.75 * (scale[1] - scale[0]) - 0.1
    )  # and they spread
    assert min(aspects) > 3 / 4 * (1 - 2 * rounding) and max(aspects) < 4 / 3 * (1 + 2 * rounding)
    assert min(aspects) < 0.95 and max(aspects) > 1.05


def test_crops_reach_every_border() -> None:
    boxes = [random_view(ViewsConfig(scale=[0.3, 0.6]), name(number), view, 28, 28)[0] for number, view in SAMPLE]
    assert {min(box[side] for box in boxes) for side in (0, 1)} == {0}
    assert {max(box[side] for box in boxes) for side in (2, 3)} == {28}


def test_about_half_of_the_views_are_mirrored_and_none_when_switched_off() -> None:
    flips = [random_view(DEFAULT, name(number), view, 28, 28)[1] for number in range(500) for view in range(4)]
    assert 0.46 < np.mean(flips) < 0.54
    assert not any(random_view(ViewsConfig(flip=False), name(number), 0, 28, 28)[1] for number in range(100))


def test_seed_image_and_number_each_change_the_view() -> None:
    first = random_view(DEFAULT, name(1), 0, 640, 480)
    assert random_view(ViewsConfig(seed=1), name(1), 0, 640, 480) != first
    assert random_view(DEFAULT, name(2), 0, 640, 480) != first
    assert random_view(DEFAULT, name(1), 1, 640, 480) != first
    assert random_view(ViewsConfig(flip=False), name(1), 0, 640, 480)[0] == first[0]
    assert len({random_view(DEFAULT, name(number), view, 640, 480) for number, view in SAMPLE}) == len(SAMPLE)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 1), (1, 3), (5, 4), (7, 7), (1, 5000), (5000, 2)])
def test_images_of_any_shape_have_views(width: int, height: int) -> None:
    for view in range(8):
        left, top, right, bottom = random_view(DEFAULT, name(view), view, width, height)[0]
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_the_largest_seed_that_the_parameters_allow_works() -> None:
    assert random_view(ViewsConfig(seed=2**63 - 1), name(1), 0, 28, 28) != random_view(DEFAULT, name(1), 0, 28, 28)


def test_two_input_sizes_look_at_the_same_part_of_the_image(tiny: Tiny) -> None:
    index, views = tiny.index, tiny.config.views
    for row in range(0, 20, 4):
        image = decode(index.read(row))
        box, flip = random_view(views, index.sha256(row), 1, image.width, image.height)
        for size in (16, 48):
            pixels = Pixels(index, views, size, "bilinear").batch([row], view=1)[0].numpy()
            assert (pixels == render(image, box, size, "bilinear", flip)).all()


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(40, 36, (2, 0, 38, 36)), (36, 41, (0, 2, 36, 38)), (5, 5, (0, 0, 5, 5)), (1, 4, (0, 1, 1, 2))],
)
def test_the_plain_view_is_the_largest_square_in_the_middle(
    width: int, height: int, box: tuple[int, int, int, int]
) -> None:
    assert centre_box(width, height) == box


def test_val_and_test_see_the_plain_view_unmirrored(tiny: Tiny) -> None:
    index = tiny.index
    row = int(index.rows("val")[0])
    image = decode(index.read(row))
    expected = np.asarray(image.crop(centre_box(image.width, image.height)).resize((16, 16), 2))
    pixels = Pixels(index, tiny.config.views, 16, "bilinear")
    difference = np.abs(pixels.batch([row], view=None)[0].numpy().astype(int) - expected)
    assert difference[1:-1, 1:-1].max() <= 1  # at the border Pillow's filter also sees what lies outside the box
    assert (pixels.all_views([row], None)[0, 0] == pixels.batch([row], view=None)[0]).all()


# The fingerprint of the rendering


@pytest.mark.parametrize("name", ["render", "decode", "random_view", "centre_box"])
def test_the_rendering_fingerprint_changes_with_what_a_step_answers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = rendering_fingerprint("bicubic", 24, DEFAULT)
    original = getattr(pixels_module, name)

    def nearest(image: Any, box: Any, size: int, _: str, flip: bool = False) -> Any:
        view = np.asarray(image.resize((size, size), 0, box=box))
        return view[:, ::-1] if flip else view

    others = {
        "render": nearest,
        "decode": lambda data: original(data).rotate(180),
        "random_view": lambda *arguments: (original(*arguments)[0], False),
        "centre_box": lambda width, height: (0, 0, min(width, height), min(width, height)),
    }
    monkeypatch.setattr(pixels_module, name, others[name])
    assert rendering_fingerprint("bicubic", 24, DEFAULT) != before
    monkeypatch.setattr(pixels_module, name, lambda *arguments: original(*arguments))
    assert rendering_fingerprint("bicubic", 24, DEFAULT) == before


def test_the_rendering_fingerprint_is_that_of_the_views_and_of_nothing_else() -> None:
    values = {
        rendering_fingerprint(interpolation, size, views)
        for interpolation in ("bilinear", "bicubic")
        for size in (16, 24)
        for views in (DEFAULT, ViewsConfig(seed=1), ViewsConfig(flip=False), ViewsConfig(scale=[0.2, 0.4]))
    }
    assert len(values) == 16
    assert rendering_fingerprint("bicubic", 24, ViewsConfig(count=9)) in values


def test_another_process_has_the_same_rendering_fingerprint() -> None:
    program = (
        "from dho.config import ViewsConfig\nfrom dho.data.pixels import rendering_fingerprint\n"
        "print(rendering_fingerprint('bicubic', 24, ViewsConfig()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, check=True
    )
    assert result.stdout.decode().strip() == rendering_fingerprint("bicubic", 24, DEFAULT)
