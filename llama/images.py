"""Cut pictures of any kind into the tiles that the vision encoder takes, as transformers' mllama does."""
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from llama.config import tile_layouts

# What preprocessor_config.json does not say.
DEFAULTS = {"image_processor_type": "MllamaImageProcessor",
            "do_convert_rgb": True, "do_resize": True, "do_pad": True,
            "size": {"height": 224, "width": 224}, "max_image_tiles": 4, "resample": 2,
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


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
    """Cut a PIL image into tiles, empty ones last -> Images of this one, which all its batches can share."""
    size, max_tiles = config["size"]["height"], config["max_image_tiles"]
    image = to_rgb(image)
    ratio, (rows, columns) = best_canvas(*image.size, size, max_tiles)
    image = image.resize(fit(*image.size, columns * size, rows * size, size), config["resample"])
    canvas = np.zeros((rows * size, columns * size, 3), np.float32)
    canvas[:image.height, :image.width] = np.asarray(image)
    canvas *= np.float32(config["rescale_factor"])
    canvas = (canvas - np.float32(config["image_mean"])) / np.float32(config["image_std"])
    tiles = torch.zeros(max_tiles, 3, size, size)
    canvas = torch.from_numpy(canvas).view(rows, size, columns, size, 3).permute(0, 2, 4, 1, 3)
    tiles[:rows * columns] = canvas.flatten(0, 1)
    real = (torch.arange(max_tiles) < rows * columns).long()
    return Images([tiles], torch.tensor([ratio]), real[None], torch.tensor([0]))


def to_rgb(image):
    """Turn a picture of 8 bits per channel into RGB, transparency into white."""
    if image.mode[0] in "IF":
        raise ValueError(f"an image of mode {image.mode}: expected 8 bits per channel, as Pillow clips more")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def best_canvas(width, height, size, max_tiles):
    """Find the canvas that enlarges the image least; if none does, the one that shrinks it least; of equals
    the smallest, then the first -> its aspect ratio id and [rows, columns]."""
    def cost(layout):
        scale = min(layout[0] * size / height, layout[1] * size / width)
        return scale < 1, scale if scale >= 1 else -scale, math.prod(layout)

    layouts = tile_layouts(max_tiles)
    best = min(layouts, key=cost)
    return layouts.index(best) + 1, best


def fit(width, height, canvas_width, canvas_height, size):
    """Return (width, height) of the resized image: aspect kept, within the canvas, at most as large as a tile
    if it is enlarged."""
    target_width, target_height = min(max(width, size), canvas_width), min(max(height, size), canvas_height)
    scale_w, scale_h = target_width / width, target_height / height
    if scale_w < scale_h:
        return target_width, min(math.floor(height * scale_w) or 1, target_height)
    return min(math.floor(width * scale_h) or 1, target_width), target_height
