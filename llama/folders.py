"""Read and write Hugging Face folders: JSON, text, and safetensors, whose weights are named as in any release
of Llama or Llama-3.2-Vision (mllama)."""
import contextlib
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS = "model.safetensors"


def from_any_layout(name):
    """Turn a tensor's name in a file into that in `Llama`.

    language_model.model.norm.weight as released, model.language_model.norm.weight in newer files of mllama
    and model.norm.weight in those of Llama are all norm.weight.
    """
    return re.sub(r"^(language_model\.)?(model\.)?(language_model\.)?", "", name)


def to_released(name, config):
    """Turn a tensor's name in `Llama` into that in the released checkpoints."""
    if name.startswith(("vision_model.", "multi_modal_projector.")):
        return name
    model = "" if name.startswith("lm_head.") else "model."
    return ("language_model." if config.vision else "") + model + name


# ------------------------------------------------------------------------------------------------------------
# Small files

def read_file(folder, name):
    """Return the bytes of a small file, or FileNotFoundError."""
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected a Hugging Face folder with {name}")
    return path.read_bytes()


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
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return values


def check(file, values, allowed, prefix=""):
    """Hold the values of a JSON object to those that are `allowed`, {name: [value, ...]}; ValueError, on one
    line, for another. null counts as absent; other names pass."""
    for name, known in allowed.items():
        value = values.get(name)
        if value is not None and value not in known:
            raise ValueError(f"{file}: {prefix + name:.80} = {value!r:.80}: expected one of {known}")


def write_file(folder, name, content):
    """Write text, bytes or tensors. The file is whole or as it was, also for who still reads weights from
    it."""
    path = Path(folder, name)
    aside = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        save_file(content, aside, {"format": "pt"})            # older transformers ask for that
        aside.chmod(0o644)                                     # safetensors lets its owner alone read it
    else:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
    aside.replace(path)


# ------------------------------------------------------------------------------------------------------------
# Tensors

def weight_files(folder):
    """List the safetensors files of a model: one, or else all shards."""
    found = sorted(Path(folder).glob("model*.safetensors"))
    if not found:
        raise FileNotFoundError(f"{folder}: expected {WEIGHTS}, or shards of it")
    return [file for file in found if file.name == WEIGHTS] or found


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

    ValueError unless it has exactly these, in shape. What follows from others may come on top: a tied head,
    and rotary_emb.inv_freq of old checkpoints.
    """
    missing = {name: tuple(weight.shape) for name, weight in model.named_parameters()}      # a tied one once
    found, config = {}, model.config
    for file in weight_files(folder):
        with opened(file) as tensors:
            for theirs in tensors.keys():
                name, part = from_any_layout(theirs), tensors.get_slice(theirs)
                shape = tuple(part.get_shape())
                tied = name == "lm_head.weight" and config.tie_word_embeddings
                if tied or name.endswith("rotary_emb.inv_freq"):
                    continue
                expected = missing.pop(name, None)
                if expected is None:
                    raise ValueError(f"{file}: tensor {theirs} is unexpected, or a second one")
                if shape != expected:
                    raise ValueError(f"{file}: tensor {theirs} has shape {shape}, expected {expected}")
                found.setdefault(file, {})[name] = theirs
    if missing:
        raise ValueError(f"{file}: tensor {to_released(next(iter(missing)), config)} is missing "
                         f"({len(missing)} in all)")
    return found


def read_weights(folder, model, rows=lambda weight: ..., device="cpu"):
    """Yield (our name, tensor) for all weights of a model; rows(weight): the slice of one that is read.

    FileNotFoundError for what is absent; ValueError, on one line, for broken files, and for tensors that are
    missing, unexpected or misshaped.
    """
    weights = dict(model.named_parameters())
    for file, names in find_tensors(folder, model).items():
        with opened(file, str(device)) as tensors:
            for name, theirs in names.items():
                yield name, tensors.get_slice(theirs)[rows(weights[name])]


# ------------------------------------------------------------------------------------------------------------
# Whole models

def load_weights(model, folder, device="cpu", dtype=None):
    """Give a model on the meta device the weights of a folder, see `read_weights`; dtype None: the file's."""
    state = {name: tensor.to(dtype) for name, tensor in read_weights(folder, model, device=device)}
    model.load_state_dict(state, assign=True, strict=False)    # all are there, but for the head that is tied:
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def local(tensor):
    """Return what this rank holds of a tensor, which shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def on_host(tensors, wanted=True):
    """Copy {name: tensor} to host memory, those of a sharded model one by one and whole: all ranks must call
    this. wanted: is a copy kept here? Else {} is returned."""
    copies = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor     # a collective
        if wanted:
            copies[name] = whole.to("cpu", copy=True).contiguous()
    return copies


def save_model(model, folder, rank=0):
    """Write config.json and model.safetensors in the released layout. All ranks of a sharded model must call
    this, and the first of them writes."""
    weights = {to_released(name, model.config): p.detach() for name, p in model.named_parameters()}
    copies = on_host(weights, rank == 0)
    if copies:
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        config = model.config.to_dict() | {"torch_dtype": dtype}
        write_file(folder, "config.json", json.dumps(config, indent=2))
        write_file(folder, WEIGHTS, copies)
