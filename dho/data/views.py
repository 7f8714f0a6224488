"""Views: one seeded crop and flip of one image, the same for teacher and student, on every rank and platform.

    box, flip = random_view(config.views, sha256, view=epoch % config.views.count, width=640, height=480)

A view is a box in the image's own pixels and a flip, so each model can render it at its own input size. The randomness
is a function of (seed, sha256, view number) alone; there is no generator to seed or to advance. Only operations that
IEEE 754 rounds exactly are used (no exp, no log), so the boxes cannot differ between platforms.
"""

from __future__ import annotations

import hashlib
import math

from dho.config import ViewsConfig
from dho.runtime.dho_runtime import Box, centre_box

MAX_RATIO = 4 / 3
"""Aspect ratios run from 3/4 to 4/3, wide and tall alike."""
MAX_ATTEMPTS = 10


def random_view(config: ViewsConfig, sha256: bytes, view: int, width: int, height: int) -> tuple[Box, bool]:
    """Draw the random resized crop and the horizontal flip of view number `view` (Table 7: 0.5-1.0 of the area).

    Args:
        config: seed, scale and flip.
        sha256: the 32 bytes that name the image.
        view: number of the view, 0 to `config.count - 1`.
        width, height: size of the upright image, pixels.

    Returns:
        The box (left, top, right, bottom) and whether to mirror it. After ten boxes that do not fit, the centre square.
    """
    low, high = config.scale
    seed = config.seed.to_bytes(8, "little")
    for attempt in range(MAX_ATTEMPTS):
        digest = hashlib.blake2b(
            sha256, digest_size=40, key=seed, salt=view.to_bytes(8, "little") + attempt.to_bytes(8, "little")
        ).digest()
        area_u, ratio_u, left_u, top_u, sides_u = (
            int.from_bytes(digest[i : i + 8], "little") >> 11 for i in range(0, 40, 8)
        )
        area = width * height * (low + (high - low) * _unit(area_u))
        ratio = 1 + (MAX_RATIO - 1) * _unit(ratio_u)
        if sides_u & 1:
            ratio = 1 / ratio
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        flip = config.flip and bool(sides_u & 2)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(_unit(left_u) * (width - crop_width + 1))
            top = int(_unit(top_u) * (height - crop_height + 1))
            return (left, top, left + crop_width, top + crop_height), flip
    return centre_box(width, height), flip


def _unit(bits: int) -> float:
    """Return 53 random bits as a float in [0, 1)."""
    return bits * 2.0**-53
