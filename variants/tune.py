"""Choose which weights learn: --tune. The paper compares the first three choices below in its figure 16.

    torchrun train.py --task gp-vl --algo ppo --tune no-vision
"""

# --tune -> does the parameter of this name learn? Cross-attention layers are the language model's: their
# projections and norms of queries and keys count as attention, their MLP as mlp. Gates and the layers' norms
# belong to neither.
VISION = ("vision_model.", "multi_modal_projector.")
TUNE = {
    "all": lambda name: True,
    "no-vision": lambda name: not name.startswith("vision_model."),
    "no-vision-no-adapter": lambda name: not name.startswith(VISION),
    "text": lambda name: not name.startswith(VISION),          # the same by the name of what learns
    "vision": lambda name: name.startswith(VISION),
    "attention": lambda name: not name.startswith(VISION) and "_attn." in name,
    "mlp": lambda name: not name.startswith(VISION) and ".mlp." in name,
    "no-embeddings": lambda name: not name.startswith(("embed_tokens.", "lm_head.")),
}


def vision_frozen(tune):
    """True if --tune leaves the vision encoder as it is."""
    return not TUNE[tune]("vision_model.")


def freeze(model, tune):
    """Stop the gradients of what is not tuned, a key of TUNE. ValueError if nothing is left."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TUNE[tune](name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("this model has no such weights")
