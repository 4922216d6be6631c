"""Cut pictures of any kind into the tiles that the vision encoder takes, as transformers' mllama does."""
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from harness.ranges import above, inside, integer
from llama.checks import Rule, only, several
from llama.config import tile_layouts

# preprocessor_config.json: what is not said there, and what may be.
DEFAULTS = {"image_processor_type": "MllamaImageProcessor",
            "do_convert_rgb": True, "do_resize": True, "do_pad": True,
            "size": {"height": 224, "width": 224}, "max_image_tiles": 4, "resample": 2,
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PIXELS = integer(1, 4096)
SQUARE = Rule('{"height": n, "width": n}, n from 1 to 4096',
              lambda v: type(v) is dict and PIXELS.holds(v.get("height")) and v["height"] == v.get("width"))
RULES = {"size": SQUARE, "max_image_tiles": integer(1, 64), "resample": integer(0, 5),
         **dict.fromkeys(["do_resize", "do_pad", "do_rescale", "do_normalize"], only(True)),
         "rescale_factor": above(0), "image_std": several(above(0), 3),
         "image_mean": several(inside(-1e6, 1e6), 3)}


@dataclass
class Images:
    """The images of a batch, at most one per row."""
    pixel_values: list                      # N of (tiles, 3, size, size), normalised, on the host
    aspect_ratio_ids: torch.Tensor          # (N,) 1-based place in supported_aspect_ratios
    aspect_ratio_mask: torch.Tensor         # (N, tiles) 1 for real tiles, which come first, 0 for padding
    rows: torch.Tensor                      # (N,) the batch row of each, ascending

    def to(self, device):
        """Move all but pixel values, which are moved when they are encoded."""
        others = self.aspect_ratio_ids, self.aspect_ratio_mask, self.rows
        return Images(self.pixel_values, *(x.to(device) for x in others))


def cut(image, config):
    """Cut a PIL image into tiles, black ones last -> Images of this one, which all its batches can share."""
    size, max_tiles = config["size"]["height"], config["max_image_tiles"]
    image = to_rgb(image)
    ratio, (rows, columns) = best_canvas(image.width, image.height, size, max_tiles)
    target = fit(image.width, image.height, columns * size, rows * size, size)
    image = image.resize(target, config["resample"])
    canvas = np.zeros((rows * size, columns * size, 3), np.float32)
    canvas[:image.height, :image.width] = np.asarray(image)
    canvas *= np.float32(config["rescale_factor"])
    canvas = (canvas - np.float32(config["image_mean"])) / np.float32(config["image_std"])
    tiles = torch.zeros(max_tiles, 3, size, size)
    canvas = canvas.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3)
    tiles[:rows * columns] = torch.from_numpy(canvas.reshape(-1, 3, size, size))
    real = (torch.arange(max_tiles) < rows * columns).long()
    return Images([tiles], torch.tensor([ratio]), real[None], torch.tensor([0]))


def to_rgb(image):
    """Turn any mode into RGB: transparency into white, grey of more than 8 bits scaled (Pillow clips it)."""
    if image.mode[0] in "IF":
        image = to_8_bits(image)
    if image.mode in ("La", "RGBa"):                           # premultiplied; Pillow knows this way only
        image = image.convert(image.mode.upper())
    if image.getbands()[-1] == "A" or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_8_bits(image):
    """Turn grey of mode I;16 (in any byte order), I or F into L. Below 0 is black. ValueError for NaN.

    16 bits keep their high byte, v >> 8: that is exact for 8 bits widened either way, to 256 v or to 257 v;
    v / 257 is not. I and F do not say what is white. By the largest value it is 1 (F alone), 255, 65535, or
    that value itself. A PNG or PGM file that Pillow opens as I holds 16 bits, however dark it is.
    """
    grey = np.asarray(image).astype(np.float64)
    top, sixteen = grey.max(), image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    if not np.isfinite(grey).all():
        raise ValueError(f"an image of mode {image.mode} holds NaN or infinity")
    if image.mode == "F" and top <= 1:
        levels = np.rint(grey * 255)                           # k / 255 is not exact
    elif top <= 255 and not sixteen:
        levels = grey
    else:
        levels = grey / 256 if top <= 65535 else grey / top * 255
    if "transparency" in image.info:                           # a level of grey
        levels = np.where(grey == image.info["transparency"], 255, levels)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def best_canvas(width, height, size, max_tiles):
    """Find the canvas that enlarges the image least; if none does, the one that shrinks it least; of equals
    the smallest, then the first -> its aspect ratio id and [rows, columns]."""
    layouts = tile_layouts(max_tiles)
    scales = [min(a * size / height, b * size / width) for a, b in layouts]
    scale = min((s for s in scales if s >= 1), default=max(scales))
    best = min((i for i, s in enumerate(scales) if s == scale), key=lambda i: layouts[i][0] * layouts[i][1])
    return best + 1, layouts[best]


def fit(width, height, canvas_width, canvas_height, size):
    """Return (width, height) of the resized image: aspect kept, within the canvas, at most as large as a tile
    if it is enlarged."""
    target_width, target_height = min(max(width, size), canvas_width), min(max(height, size), canvas_height)
    scale_w, scale_h = target_width / width, target_height / height
    if scale_w < scale_h:
        return target_width, min(math.floor(height * scale_w) or 1, target_height)
    return min(math.floor(width * scale_h) or 1, target_width), target_height
