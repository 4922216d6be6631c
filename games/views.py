"""Cut street views out of a panorama, as seen by someone who faces a compass heading.

A panorama is equirectangular: columns are compass directions, rows elevations. Look at a view:

    python -c "from games import views; views.grid('FOLDER/street_views/ID.jpg', 90, 640).save('grid.png')"
"""
import json
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from games import cities

CROSS = 5           # black pixels between the four views of a grid
# a panorama with more columns than this per pixel in a view's middle is made smaller, lest it alias
FINEST = 1.75


def read_rotation(panorama):
    """Return `rotation` (degrees) from the metadata beside a panorama's jpg."""
    return float(json.loads(Path(panorama).with_suffix(".metadata.json").read_bytes())["rotation"])


# ---------------------------------------------------------------------------------------------------- cutting

def _cubic(t):
    """Return weights (4, ...) of the pixels at -1, 0, 1, 2 for a point at t in [0, 1): Keys' cubic, a = -0.5
    (Catmull-Rom)."""
    t = np.float32(t)
    weights = t * (t * (2 - t) - 1), t * t * (3 * t - 5) + 2, t * (t * (4 - 3 * t) + 1), t * t * (t - 1)
    return np.stack(weights) / 2


def _resample(x, length, full):
    """Return, for positions x (0: the middle of the first pixel) along `full` pixels that were resized to
    `length`, the first of the four pixels around each, and their weights (4, ...)."""
    x = (x + 0.5) * (length / full) - 0.5
    left = np.floor(x).astype(np.int32)
    return left - 1, _cubic(x - left)


@lru_cache(maxsize=8)
def _rays(size, fov, height, full):
    """Return where a view's pixels are: degrees to the right of its middle (size,), the same in all rows, for
    the view is upright; and _resample of a panorama's rows, the same for every heading."""
    middle = (np.arange(size) - (size - 1) / 2) * math.tan(math.radians(fov / 2)) / (size / 2)
    down = np.degrees(np.arctan2(middle[:, None], np.hypot(1, middle)))
    return np.degrees(np.arctan(middle)), *_resample((down / 180 + 0.5) * (full - 1), height, full)


def view(pixels, lon, size, fov=90, full=None):
    """Return what a camera at a panorama sees: (h, w, 3) uint8 -> (size, size, 3) uint8, looking level
    towards longitude `lon` (degrees).

    full: (H, W) of the panorama before it was resized to `pixels`; fov: degrees between the left and the
    right edge. Bicubic; nothing is done against aliasing where the panorama is much finer than the view
    (`grid` does). The outermost columns (rows) of the panorama are at longitudes -180 and 180 (straight up
    and down), as in the released code.

    All pixels in a column of an upright view have one longitude, so the bicubic filter separates: first the
    panorama's columns become the view's, then each column is resampled by its own rows."""
    height, width = pixels.shape[:2]
    rows, columns = full or (height, width)
    turn, above, down = _rays(size, fov, height, rows)
    left, across = _resample((lon + 180 + turn) % 360 / 360 * (columns - 1), width, columns)
    first = above.min()
    band = pixels.take(range(first, above.max() + 4), 0, mode="clip").transpose(2, 0, 1).copy()
    strip = sum(across[k] * band.take((left + k) % width, 2) for k in range(4))     # (3, rows, size)
    start = (above - first) * size + np.arange(size)
    pixels = sum(down[k] * strip.reshape(3, -1).take(start + k * size, 1) for k in range(4))
    return (np.clip(pixels, 0, 255) + 0.5).astype(np.uint8).transpose(1, 2, 0)


# ------------------------------------------------------------------------------------------- grids from files

def load(panorama, finest):
    """Return (pixels, (H, W) of the file, rotation) of a panorama's jpg; pixels (h, w, 3) have at most
    `finest` columns. A built-in city draws it if it is not there yet. What cannot be read is found by
    routes.load, before the game begins."""
    path = Path(panorama)
    if not path.exists() and (path.parent.parent / "city.json").exists():
        cities.draw(panorama)
    with Image.open(path, formats=["JPEG"]) as image:
        full = image.height, image.width
        if image.width > finest:
            # with a low-pass; libjpeg decodes small at once
            image.thumbnail((finest, image.height))
        return np.asarray(image.convert("RGB")), full, read_rotation(panorama)


@lru_cache(maxsize=128)     # of 5 MB each at the paper's size
def grid(panorama, heading, size):
    """Return four views of 90 degrees around someone who faces compass `heading` (degrees), [front, right /
    back, left], each `size` pixels square, with a black cross between: an RGB image of 2 * size + 5 pixels
    square.

    panorama: path of a jpg with its metadata beside it, see `load`. Released code: it announces this order
    and shows headings -135, -45, 45, 135 from the current one. Do not write into the picture:
    it is kept for the other episodes of a route."""
    # a view's middle has size/2 pixels per radian, as has a panorama of pi * size
    pixels, full, rotation = load(panorama, round(FINEST * math.pi * size))
    step = size + CROSS
    whole = Image.new("RGB", (step + size, step + size))
    for i in range(4):
        # as in `read_rotation`, heading h is at longitude h - 180 + rotation
        square = view(pixels, heading % 360 - 180 + rotation + 90 * i, size, full=full)
        whole.paste(Image.fromarray(square), (i % 2 * step, i // 2 * step))
    return whole
