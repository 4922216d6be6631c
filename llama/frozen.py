"""Encode each image once per update, where the vision encoder is frozen: its output stays the same.

    images = [processor.cut(picture)]                      # each picture once, for all of its batches
    features = {} if model.vision_frozen else None         # lives for one update; None remembers nothing
    with remember(player, features):                       # the rollout's model, never sharded
        ...                                                # processor.images(images) goes to player
    with remember(actor_critic, features):                 # the models in training
        ...                                                # processor.images(images): no encoder runs

Give batches what `Processor.cut` returned, not the picture: an image is looked up by these tensor objects.
Features stay in CPU memory (11B: 98 MB per image in bfloat16) until `features` is freed. In a sharded model
the encoder's layers wait for all ranks. So in each pass either every rank must hold the features of all its
images, or no rank may hold any. An update meets this condition, as its rollout has encoded every image.
"""
import contextlib
from functools import partial

import torch

from llama.images import Images


@contextlib.contextmanager
def remember(module, features):
    """Look up what the encoder of each Llama in `module` makes of an image; encode and note what is new.

    features: {pixels of an image: (S, F) on the host}, shared by encoders with the same weights; or None.
    """
    encoders = [] if features is None else [
        part.vision_model for part in module.modules() if hasattr(part, "vision_model")]
    for encoder in encoders:
        encoder.forward = partial(encode, encoder.forward, features)
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.forward                                # uncovers that of its class


def encode(forward, features, images):
    """Encode Images as `forward`, a vision encoder's, does -> (N, S, F). It gets what is not known yet."""
    new = {pixels: i for i, pixels in enumerate(images.pixel_values) if pixels not in features}
    if new:                                                    # tensors hash by identity
        at = list(new.values())
        ids, mask, rows = images.aspect_ratio_ids[at], images.aspect_ratio_mask[at], images.rows[at]
        made = forward(Images(list(new), ids, mask, rows))
        features.update(zip(new, made.cpu()))
        if len(new) == len(images.pixel_values):
            return made                                        # as it is, on its device
    return torch.stack([features[pixels] for pixels in images.pixel_values])     # on the host: Llama moves it
