"""Street views: what someone at a panorama sees who faces a compass heading, cut out of the panorama
(equirectangular: columns are compass directions, rows elevations). Look at one:

    python -c "from games import views; views.grid('FOLDER/street_views/ID.jpg', 90, 640).save('grid.png')"
"""
import json
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from games import cities

CROSS = 5           # black pixels between the four views of a grid
# a panorama with more columns than this a pixel in a view's middle is made smaller, lest it alias
FINEST = 1.75
BLOCK = 128         # columns that are cut at a time: their pixels stay in the processor's cache


def read_rotation(panorama):
    """Return `rotation` (degrees) from the metadata beside a panorama's jpg; ValueError (one line) if there
    is none."""
    path = Path(panorama).with_suffix(".metadata.json")
    try:
        rotation = json.loads(path.read_bytes())["rotation"]
        if type(rotation) in (int, float) and abs(rotation) < 1e9:      # False for NaN, too
            return float(rotation)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{path}: expected a JSON object with a number `rotation` in degrees")


# ---------------------------------------------------------------------------------------------------- cutting

def _cubic(t):
    """Return weights (4, ...) of the pixels at -1, 0, 1, 2 for a point at t in [0, 1): Keys' cubic, a = -0.5
    (Catmull-Rom)."""
    t = np.asarray(t, np.float32)
    weights = t * (t * (2 - t) - 1), t * t * (3 * t - 5) + 2, t * (t * (4 - 3 * t) + 1), t * t * (t - 1)
    return np.stack(weights) / 2


@lru_cache(maxsize=8)
def _rays(size, fov):
    """Return where the pixels of a view are: degrees to the right of its middle (size,), the same in all
    rows, for the view is upright; and degrees below the horizon (size, size)."""
    middle = (np.arange(size) - (size - 1) / 2) * math.tan(math.radians(fov / 2)) / (size / 2)
    down = np.arctan2(middle[:, None], np.hypot(1, middle))
    return np.degrees(np.arctan(middle)), np.degrees(down)


def _resized(x, length, full):
    """Return where position x (0: the middle of the first pixel) along `full` pixels lies after resizing them
    to `length`."""
    return (x + 0.5) * (length / full) - 0.5


@lru_cache(maxsize=8)
def _rows(size, fov, height, full):
    """Return where a view's pixels lie among a panorama's rows, the same for every heading: the rows that the
    view needs (first, last + 1); and for each pixel the first of the four rows around it, counted from
    `first` (size, size), and their weights (4, size, size)."""
    y = _resized((_rays(size, fov)[1] / 180 + 0.5) * (full - 1), height, full)
    above = np.floor(y).astype(np.int32)
    return above.min() - 1, above.max() + 3, above - above.min(), _cubic(y - above)


def _cut(pixels, full, lons, size, fov):
    """Return views (len(lons), size, size, 3) uint8 of a panorama (h, w, 3) that was resized from `full` =
    (H, W), with their middles at these longitudes (degrees).

    All pixels in a column of an upright view have one longitude, so the bicubic filter separates: first the
    panorama's columns become the view's, then each column is resampled by its own rows."""
    (height, width), columns = pixels.shape[:2], len(lons) * size
    first, last, above, down = _rows(size, fov, height, full[0])
    # (3, rows, width)
    band = pixels[np.clip(np.arange(first, last), 0, height - 1)].transpose(2, 0, 1).copy()
    turned = (np.asarray(lons)[:, None] + 180 + _rays(size, fov)[0]).ravel() % 360
    x = _resized(turned / 360 * (full[1] - 1), width, full[1])
    left = np.floor(x).astype(int)
    across = _cubic(x - left)
    views = np.empty((size, columns, 3), np.uint8)
    for block in np.array_split(np.arange(columns), max(1, columns // BLOCK)):
        strip = sum(across[k, block] * band.take((left[block] + k - 1) % width, axis=2) for k in range(4))
        start = above.take(block % size, axis=1) * len(block) + np.arange(len(block))
        strip, weights = strip.reshape(3, -1), down.take(block % size, axis=2)
        # (3, size, block)
        pixel = sum(weights[k] * strip.take(start + k * len(block), axis=1) for k in range(4))
        views[:, block] = (np.clip(pixel, 0, 255) + 0.5).transpose(1, 2, 0)
    return views.reshape(size, len(lons), size, 3).swapaxes(0, 1)


def view(pixels, rotation, heading, size, fov=90):
    """Return what a camera at a panorama sees: (H, W, 3) uint8 -> (size, size, 3) uint8, looking level.

    rotation: from the panorama's metadata; heading: compass direction of the view's middle; fov: angle
    between the left and the right edge, all in degrees. Bicubic; nothing is done against aliasing where the
    panorama is much finer than the view (`grid` does). Geometry as in the released code: compass heading h is
    at longitude h - 180 + rotation, and the outermost columns (rows) of the panorama are at longitudes -180
    and 180 (straight up and down)."""
    return _cut(pixels, pixels.shape[:2], [heading - 180 + rotation], size, fov)[0]


# ------------------------------------------------------------------------------------------- grids from files

@dataclass
class _Cache:
    """Keeps what was used last, as long as it is no more than `limit` bytes."""
    limit: int
    used: int = 0
    items: OrderedDict = field(default_factory=OrderedDict)     # {key: (value, bytes)}

    def get(self, key, make):
        """Return the value of `key`; made by make() -> (value, bytes) if it is not there."""
        if key not in self.items:
            self.items[key] = make()
            self.used += self.items[key][1]
        self.items.move_to_end(key)
        value = self.items[key][0]
        while self.used > self.limit:
            self.used -= self.items.popitem(last=False)[1][1]
        return value


_panoramas, _grids = _Cache(512 << 20), _Cache(512 << 20)


def _load(panorama, finest):
    """Return ((pixels, (H, W) of the file, rotation), bytes); pixels (h, w, 3) have at most about `finest`
    columns."""
    path = Path(panorama)
    if not path.exists() and (path.parent.parent / "city.json").exists():
        cities.draw(panorama)
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            full = image.height, image.width
            if image.width > finest:
                # with a low-pass; libjpeg decodes small at once
                image.thumbnail((round(finest), image.height))
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return (pixels, full, read_rotation(panorama)), pixels.nbytes


def _make_grid(panorama, heading, size):
    # a view's middle has size/2 pixels a radian, as has a panorama of pi * size
    finest = FINEST * math.pi * size
    pixels, full, rotation = _panoramas.get((panorama, size), lambda: _load(panorama, finest))
    views = _cut(pixels, full, [heading - 180 + rotation + turn for turn in (0, 90, 180, 270)], size, 90)
    whole = np.zeros((2 * size + CROSS, 2 * size + CROSS, 3), np.uint8)
    for i, square in enumerate(views):
        row, column = i // 2 * (size + CROSS), i % 2 * (size + CROSS)
        whole[row:row + size, column:column + size] = square
    return Image.fromarray(whole), whole.nbytes


def grid(panorama, heading, size):
    """Return four views of 90 degrees around someone who faces compass `heading` (degrees), [front, right /
    back, left], each `size` pixels square, with a black cross between: an RGB image of 2 * size + 5 pixels
    square.

    panorama: path of a jpg with its metadata beside it. A built-in city draws it if it is not there yet.
    ValueError (one line) that names the file if it cannot be read. Released code: it announces this order and
    shows headings -135, -45, 45, 135 from the current one (quirk 21)."""
    panorama, heading = str(panorama), heading % 360
    return _grids.get((panorama, heading, size), lambda: _make_grid(panorama, heading, size)).copy()
