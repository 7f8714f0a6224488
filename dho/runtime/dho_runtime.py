"""From image bytes to the student's input, and from both heads' logits to probabilities; NumPy and Pillow only.

This file is part of every registered model (as `dho_runtime.py` beside the model's code) and is also what `prepare`,
`teach`, `train` and `predict` call, so that a served image is decoded, cropped, resized and normalised exactly as in
training.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # MPO opens as JPEG; Pillow has no opener of that name
MAX_PIXELS = 50_000_000
"""Of an image, unless `data.max_pixels` says another number."""
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

HEADS = ("ce", "kd")
"""Both heads, in the order of Eq. 8: `ce` learns from labels, `kd` from the teacher. A student may have one of them."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the upright image; right and bottom exclusive."""


class ImageRejected(ValueError):
    """Bytes that are not a usable image; the message says why."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode image bytes to an upright 8-bit RGB image.

    EXIF rotation is applied; transparency is laid on white; grey, palette, CMYK and 16-bit grey images are converted;
    of an animation the first frame counts.

    Raises:
        ImageRejected: the bytes are empty, no image, truncated, of more than `max_pixels` pixels, or of a mode with no
            clear meaning in RGB.
    """
    if not data:
        raise ImageRejected("empty file")
    try:
        with warnings.catch_warnings():
            # Pillow warns on its own limits; ours is checked below, before a pixel is decoded.
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageRejected(f"too many pixels: {error}") from error
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise ImageRejected(
            "not an image of a known format" if isinstance(error, UnidentifiedImageError) else f"broken header: {error}"
        ) from error

    width, height = image.size
    if width * height > max_pixels:
        raise ImageRejected(f"too many pixels: {width} x {height} is more than {max_pixels}")
    try:
        image.load()
        if image.format not in ("PNG", "BMP", "GIF") or "exif" in image.info or "Raw profile type exif" in image.info:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # as above
        raise ImageRejected(f"truncated or broken: {error}") from error
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode with a clear meaning in RGB to 8-bit RGB, with transparency laid on white.

    Raises:
        ImageRejected: the mode has no clear meaning in RGB, or grey values are outside 16 bits.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageRejected(f"mode {image.mode}: grey values outside 16 bits")
        return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode in ("1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV"):
        return image.convert("RGB")
    raise ImageRejected(f"mode {image.mode} has no clear meaning in RGB")


def centre_box(width: int, height: int) -> Box:
    """Return the largest square in the middle of an image: the view of val, test and served images."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return (left, top, left + side, top + side)


def render(image: Image.Image, box: Box, size: int, interpolation: str, flip: bool = False) -> npt.NDArray[np.uint8]:
    """Crop, resize (antialiased) and, where requested, mirror an RGB image.

    Args:
        image: 8-bit RGB.
        box: what is cropped.
        size: side of the square result, pixels.
        interpolation: a key of `INTERPOLATIONS`.
        flip: whether to mirror left to right.

    Returns:
        uint8 [size, size, 3].
    """
    view = image.resize((size, size), INTERPOLATIONS[interpolation], box=box)
    pixels: npt.NDArray[np.uint8] = np.asarray(view)
    return pixels[:, ::-1] if flip else pixels


def normalise(pixels: npt.NDArray[np.uint8], mean: list[float], std: list[float]) -> npt.NDArray[np.float32]:
    """Normalise pixels per channel: (value / 255 - mean) / std.

    Args:
        pixels: [n, size, size, 3].
        mean, std: three numbers each, for values in 0-1.

    Returns:
        float32 [n, 3, size, size].
    """
    scaled = (pixels.astype(np.float32) / np.float32(255) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def softmax(logits: npt.ArrayLike, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """Return the softmax over the last axis of `logits / temperature`, float64 of the same shape."""
    scaled = np.asarray(logits, np.float64) / temperature
    exponents = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    result: npt.NDArray[np.float64] = exponents / exponents.sum(axis=-1, keepdims=True)
    return result


def mix(ce: npt.ArrayLike | None, kd: npt.ArrayLike | None, alpha: float, beta: float) -> npt.NDArray[np.float64]:
    """Mix the heads (Eq. 8): alpha * softmax(ce) + (1 - alpha) * softmax(kd / beta).

    Args:
        ce, kd: logits [n, classes]; None for a head that the student does not have.
        alpha: weight of the CE head; 1 for a student with `ce` alone, 0 for one with `kd` alone.
        beta: temperature of the KD head.

    Returns:
        Probabilities float64 [n, classes].

    Raises:
        ValueError: a head with a weight other than 0 is None.
    """
    if (ce is None and alpha != 0) or (kd is None and alpha != 1):
        raise ValueError(f"alpha {alpha} gives weight to a head that this student does not have")
    if kd is None:
        return softmax(ce)  # type: ignore[arg-type]
    if ce is None:
        return softmax(kd, beta)
    return alpha * softmax(ce) + (1 - alpha) * softmax(kd, beta)


def head_source(head: str) -> str:
    """Return the name of one head's own probabilities in metrics and answers: `ce_head` for `ce`."""
    return f"{head}_head"


def head_probabilities(head: str, logits: npt.ArrayLike, beta: float) -> npt.NDArray[np.float64]:
    """Return one head's own probabilities, float64 [n, classes], of its logits; `kd` has temperature beta."""
    return softmax(logits, beta if head == "kd" else 1.0)


def only_alpha(heads: Collection[str]) -> float | None:
    """Return the one alpha that a student with these heads can have: 1 with `ce` alone, 0 with `kd`; None with both."""
    return None if set(HEADS) <= set(heads) else float("ce" in heads)
