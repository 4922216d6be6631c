"""Choose which weights learn: --tune. The paper compares the first three choices below in its figure 16.

    torchrun train.py --task gp-vl --algo ppo --tune no-vision
"""

import re

# --tune -> how the names of the parameters that learn begin. Cross-attention layers are the language model's:
# their projections and norms of queries and keys count as attention, their MLP as mlp. Gates and the layers'
# norms belong to neither.
TEXT = r"(?!vision_model\.|multi_modal_projector\.)"
TUNE = {
    "all": "",
    "no-vision": r"(?!vision_model\.)",
    "no-vision-no-adapter": TEXT,
    "text": TEXT,                              # the same by the name of what learns
    "vision": r"vision_model\.|multi_modal_projector\.",
    "attention": TEXT + r".*_attn\.",
    "mlp": TEXT + r".*\.mlp\.",
    "no-embeddings": r"(?!embed_tokens\.|lm_head\.)",
}


def is_tuned(tune, name):
    """Tell whether the parameter of this name learns by --tune."""
    return re.match(TUNE[tune], name) is not None


def freeze(model, tune):
    """Stop the gradients of what is not tuned, a key of TUNE. ValueError if nothing is left."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_tuned(tune, name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--tune {tune}: this model has no such weights")
