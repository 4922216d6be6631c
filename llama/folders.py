"""Read and write Hugging Face folders: small files, and safetensors in any layout of Llama and mllama."""
import contextlib
import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llama.checks import OBJECT, wrong

INDEX = "model.safetensors.index.json"
LARGEST = 2**28                             # bytes of a file without tensors; a tokenizer may take 2**24
FLOATS = ("F64", "F32", "F16", "BF16")

# (prefix in a file, prefix here), the first match counts: mllama as released, the newer layout, and llama's
KEY_MAP = [("language_model.model.", ""), ("language_model.lm_head.", "lm_head."),
           ("model.language_model.", ""), ("model.vision_model.", "vision_model."),
           ("model.multi_modal_projector.", "multi_modal_projector."), ("model.", "")]


def from_any_layout(name):
    """Turn a tensor's name in a file into that in `Llama`."""
    return next((ours + name[len(theirs):] for theirs, ours in KEY_MAP if name.startswith(theirs)), name)


def to_released(name, config):
    """Turn a tensor's name in `Llama` into that in the released checkpoints."""
    if name.startswith(("vision_model.", "multi_modal_projector.")):
        return name
    model = "" if name.startswith("lm_head.") else "model."
    return ("language_model." if config.vision else "") + model + name


# ------------------------------------------------------------------------------------------------------------
# Small files

def read_file(folder, name):
    """Return the bytes of a small file. FileNotFoundError; ValueError if it cannot be read."""
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected a Hugging Face folder with {name}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size} bytes: expected at most {LARGEST}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def read_json(folder, name, optional=False):
    """Return the object in a JSON file; None if it is absent and optional."""
    path = Path(folder) / name
    if optional and not path.exists():
        return None
    text = read_file(folder, name)
    try:
        values = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not OBJECT.holds(values):
        raise ValueError(f"{path}: expected a JSON object")
    return values


def write_files(folder, files, replaces=None):
    """Write {name: text, bytes or tensors}: all aside first, so that a failure leaves the folder as it was.
    Then drop older files that match `replaces`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = {name: folder / f".{name.replace('/', '.')}.{os.getpid()}.tmp" for name in files}
    try:
        for name, content in files.items():
            if isinstance(content, dict):
                tensors = {k: t.detach().cpu().contiguous() for k, t in content.items()}
                save_file(tensors, aside[name], {"format": "pt"})
                aside[name].chmod(0o644)                       # safetensors lets its owner alone read it
            else:
                aside[name].write_bytes(content.encode() if isinstance(content, str) else content)
        for name, path in aside.items():
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(path, folder / name)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()                                     # only succeeds where nothing could be written
    for old in folder.glob(replaces) if replaces else ():
        if old.name not in files:
            old.unlink()


# ------------------------------------------------------------------------------------------------------------
# Tensors

def weight_files(folder):
    """List the safetensors files of a folder. FileNotFoundError, ValueError."""
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder}: expected model.safetensors, or {INDEX} and its shards")
    places = read_json(folder, INDEX).get("weight_map")
    if not OBJECT.holds(places) or not places:
        raise wrong(folder / INDEX, "weight_map", places, "an object, {tensor: file}")
    for tensor, name in places.items():
        if type(name) is not str or not re.fullmatch(r"[\w.-]+\.safetensors", name):   # "../x" would leave it
            raise wrong(folder / INDEX, f"weight_map.{tensor}"[:80], name, "a .safetensors file beside it")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not found, but {INDEX} names it")
    return [folder / name for name in sorted(set(places.values()))]


@contextlib.contextmanager
def opened(file, device="cpu"):
    """Open a safetensors file. ValueError that names it if it is damaged."""
    try:
        with safe_open(file, "pt", device=device) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def find_tensors(folder, model):
    """Look, in the headers alone, where a folder has a model's tensors -> {file: {our name: its name there}}.

    ValueError unless it has exactly these, in shape, as floating-point numbers. What follows from others may
    come on top: a tied head, and rotary_emb.inv_freq of old checkpoints.
    """
    shapes = {name: weight.shape for name, weight in model.named_parameters()}     # a tied one once
    found, missing, config = {}, dict(shapes), model.config
    for file in weight_files(folder):
        with opened(file) as tensors:
            for theirs in tensors.keys():
                name, part = from_any_layout(theirs), tensors.get_slice(theirs)
                tied = name == "lm_head.weight" and config.tie_word_embeddings
                if tied or name.endswith("rotary_emb.inv_freq"):
                    continue
                if name not in missing:
                    again = ", a second one" if name in shapes else ""
                    raise ValueError(f"{file}: unexpected tensor {theirs}{again}")
                shape, expected = tuple(part.get_shape()), tuple(missing.pop(name))
                if shape != expected:
                    raise ValueError(f"{file}: tensor {theirs} has shape {shape}, expected {expected}")
                if (kind := part.get_dtype()) not in FLOATS:
                    raise ValueError(f"{file}: tensor {theirs} has type {kind}, not F64, F32, F16 or BF16")
                found.setdefault(file, {})[name] = theirs
    if missing:
        more = f" ({len(missing)} in all)" if len(missing) > 1 else ""
        raise ValueError(f"{file}: tensor {to_released(next(iter(missing)), config)} is missing{more}")
    return found


def finite(tensor, file, name):
    """Return the tensor. ValueError if it holds NaN or infinity: its minimum or maximum is then none, too."""
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise ValueError(f"{file}: tensor {name} holds NaN or infinity: take an earlier or an undamaged copy")
    return tensor


def split_shards(tensors, limit):
    """Cut the names, in order, so that a shard has at most `limit` bytes (or a single tensor)."""
    shards, size = [], math.inf
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > limit:
            shards.append([])
            size = tensor.nbytes
        shards[-1].append(name)
    return shards


# ------------------------------------------------------------------------------------------------------------
# Whole models

def load_weights(model, folder, device="cpu", dtype=None):
    """Give a model on the meta device the weights of a folder, of one file or shards; dtype None: the file's.

    FileNotFoundError for what is absent; ValueError, on one line, for broken files, and for tensors that are
    missing, unexpected, misshaped, not floats, or hold NaN.
    """
    state = {}
    for file, names in find_tensors(folder, model).items():
        with opened(file, str(device)) as tensors:
            for name, theirs in names.items():
                state[name] = finite(tensors.get_tensor(theirs).to(dtype), file, theirs)
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def save_model(model, folder, max_shard_size):
    """Write config.json and safetensors in the released layout, all or nothing."""
    config = model.config
    tensors = {to_released(name, config): tensor for name, tensor in model.state_dict().items()
               if not (name == "lm_head.weight" and config.tie_word_embeddings)}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    files = {"config.json": json.dumps(config.to_dict() | {"torch_dtype": dtype}, indent=2)}
    shards = split_shards(tensors, max_shard_size)
    places = {}                                                # {tensor: file}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        files[file] = {name: tensors[name] for name in names}
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        files[INDEX] = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
    write_files(folder, files, replaces="model*.safetensors*")
