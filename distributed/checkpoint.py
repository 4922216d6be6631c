"""Checkpoints that survive a crash at any byte, load on any number of ranks, and never execute anything that
they contain.

    runs/NAME/checkpoints/step_000120/     weights and optimizer state in slices, record.json, config.json
                                           and the tokenizer

Every rank writes its own slices (rank_K.safetensors) into `.step_000120`, from a copy in memory and in the
background: training goes on. Then it writes down the size and the SHA-256 of its files (rank_K.json). Once
all have, the first rank takes the dot off the name. So a folder without a dot is complete, whichever process
was killed at any time, and the checksums reveal later damage. There is JSON and safetensors in it, and no
pickle.
"""

import functools
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from distributed.processes import first, gather
from harness.files import to_json, write_atomically
from llama.folders import opened, read_json


# ------------------------------------------------------------------------------------------------------------
# What is saved: a flat dict of tensors, sharded or not

def tensors_of(module, optimizers):
    """Name the weights "model.NAME" and the state that an optimizer keeps of them "optimizer.NAME.KEY"."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    state = {f"optimizer.{names[parameter]}.{key}": tensor for optimizer in optimizers
             for parameter, own in optimizer.state.items() for key, tensor in own.items()}
    return {f"model.{name}": parameter.detach() for parameter, name in names.items()} | state


def rows(tensor):
    """Return this rank's slice of the first dimension; the last ranks may have less of it, or nothing."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor))
    start = tensor.device_mesh.get_local_rank() * -(-len(tensor) // tensor.device_mesh.size())
    return slice(start, start + len(local(tensor)))


def local(tensor):
    """Return what this rank holds of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_slices(tensors, rank, world):
    """Copy to host memory what this rank writes: its slices, and its share of what all hold as a whole."""
    return {name: local(tensor).to("cpu", copy=True).contiguous()
            for i, (name, tensor) in enumerate(tensors.items())
            if isinstance(tensor, DTensor) or i % world == rank}


def slices_in(path):
    """Read what a checkpoint holds -> {name: (shape of the whole, [files])}. The slices of a tensor, in the
    order of the ranks, are the whole."""
    found = {}
    files = Path(path).glob("rank_*.safetensors")
    for file in sorted(files, key=lambda file: (len(file.name), file.name)):           # 2 before 10
        with opened(file) as tensors:
            for name in tensors.keys():
                shape = tensors.get_slice(name).get_shape()
                whole, its_files = found.setdefault(name, (shape, []))
                if its_files and shape:
                    whole[0] += shape[0]
                its_files.append(file)
    return found


def make_room(found, module, optimizers):
    """Give fresh optimizers empty state for what a checkpoint holds (see `slices_in`) of their parameters."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    states = {f"optimizer.{names[parameter]}": (parameter, optimizer.state) for optimizer in optimizers
              for group in optimizer.param_groups for parameter in group["params"]}
    for name, (shape, _) in found.items():
        of, _, key = name.rpartition(".")
        if of in states:
            parameter, state = states[of]                      # of no shape: Adam's count of steps
            room = torch.empty_like(parameter, requires_grad=False) if shape else torch.empty(())
            state[parameter][key] = room


def fill(found, path, tensors, whole=True):
    """Read tensors in place, all of them or ValueError. whole: the checkpoint must hold no others."""
    held = {name: shape for name, (shape, _) in found.items()}
    asked = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(held | asked if whole else asked):
        there, here = (shapes.get(name, "nothing") for shapes in (held, asked))
        if there != here:
            raise ValueError(f"{path}: of another model, optimizer or version, or without all of its slices: "
                             f"it holds {there} of {name}, where this run has {here}")
    source = functools.cache(lambda file: safe_open(file, "pt"))
    for name, tensor in tensors.items():
        contents = [source(file).get_slice(name) for file in found[name][1]]
        if not tensor.ndim:
            tensor.copy_(contents[0][...])
            continue
        own, start = rows(tensor), 0
        for content in contents:
            end = start + content.get_shape()[0]
            low, high = max(start, own.start), min(end, own.stop)
            if low < high:
                room = local(tensor)[low - own.start:high - own.start]
                room.copy_(content[low - start:high - start])
            start = end


def load_policy(path, llama):
    """Fill a Llama, sharded or whole, with the weights of the policy in a checkpoint of SFT or PPO."""
    found = slices_in(path)
    prefix = "model.policy." if any(name.startswith("model.policy.") for name in found) else "model."
    fill(found, path, {prefix + name: p.detach() for name, p in llama.named_parameters()}, whole=False)


# ------------------------------------------------------------------------------------------------------------
# The folder of a run's checkpoints

class Checkpoints:
    """The folder of a run's checkpoints, of which the newest `keep` are kept."""

    def __init__(self, folder, rank=0, world=1, keep=2):
        self.folder, self.rank, self.world, self.keep = Path(folder), rank, world, keep
        self.thread = ThreadPoolExecutor(1)
        self.aside = self.writing = None       # of one that is not complete: its folder, this rank's part

    def complete(self):
        """List all complete checkpoints, the oldest first."""
        found = [path for path in self.folder.glob("step_*")
                 if re.fullmatch("step_[0-9]{6,}", path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def newest(self):
        """Return the newest checkpoint, or None. ValueError for something else that has such a name."""
        complete = self.complete()
        for other in sorted(set(self.folder.glob("step_*")) - set(complete)):
            raise ValueError(f"{other}: not a checkpoint, which is a folder step_ and six digits; move it "
                             f"away, and --resume goes on from {self.last()}")
        return complete[-1] if complete else None

    def save(self, step, tensors, record, write_rest=lambda folder: None):
        """Begin to save, once the one before is finished. record: JSON; write_rest(folder): other files."""
        self.finish()
        aside = self.aside = self.folder / f".step_{step:06d}"

        def begin():
            for left in self.folder.glob(".step_*"):                   # by a crash
                remove(left)
            aside.mkdir(parents=True)
            write_rest(aside)
            write_atomically(aside / "record.json", to_json(record, indent=2))

        try:
            first(begin)
        except OSError as error:
            self.give_up(error)
        self.writing = self.thread.submit(self.write, own_slices(tensors, self.rank, self.world))

    def write(self, copies):
        """Write this rank's slices, in the background, and list its files; the first rank answers for those
        that are nobody's."""
        mine = self.aside / f"rank_{self.rank}.safetensors"
        save_file(copies, mine)
        mine.chmod(0o644)                      # safetensors makes it readable by its owner only
        # another rank's temporary file begins with a dot
        known = {file.name: fingerprint(file) for file in self.aside.iterdir() if file == mine
                 or self.rank == 0 and file.is_file() and not file.name.startswith(("rank_", "."))}
        write_atomically(mine.with_suffix(".json"), json.dumps(known))

    def poll(self):
        """Give the checkpoint its name if all ranks are done, and remove all but the newest. Never waits."""
        if self.rank:
            return
        if self.writing and all((self.aside / f"rank_{k}.json").exists() for k in range(self.world)):
            final = self.aside.with_name(self.aside.name[1:])
            remove(final)
            self.aside.rename(final)
            self.writing = None
        for old in self.complete()[:-self.keep]:               # a crash may have left some
            remove(old)

    def finish(self):
        """Wait until the checkpoint that is being saved is complete. OSError on all ranks if one could not
        write its part."""
        error = self.writing and self.writing.exception()              # waits
        errors = gather([str(error)] if error else [])                 # waits for the other ranks
        if errors:
            self.give_up(errors[0])
        first(self.poll)
        self.writing = None

    def give_up(self, error):
        self.writing = None
        if self.rank == 0:
            remove(self.aside)
        raise OSError(f"a checkpoint could not be saved in {self.folder}: {error}; make room, and --resume "
                      f"goes on from {self.last()}")

    def last(self, without=None):
        """Say where --resume goes on from, `without` one that is no good."""
        others = [str(path) for path in self.complete() if path != without]
        return (others or ["the beginning"])[-1]

    def load(self, path, module, optimizers):
        """Fill a module and fresh optimizers from a checkpoint that is verified -> its record. ValueError for
        one of another model or optimizer."""
        found = slices_in(path)
        make_room(found, module, optimizers)
        fill(found, path, tensors_of(module, optimizers))
        return read_json(path, "record.json")

    def verify(self, path):
        """Raise a ValueError on all ranks if a file is not what was written; each reads its share."""
        problems = dict.fromkeys(gather(damage(path, self.rank, self.world)))
        if problems:
            raise ValueError(f"{path}: damaged: {'; '.join(problems)}; remove it, and --resume goes on from "
                             f"{self.last(without=path)}")


def remove(path):
    """Remove a folder with all that is in it, or a link to one."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def is_checkpoint(path):
    """Tell whether `Checkpoints.save` wrote a folder."""
    return os.path.exists(Path(path, "record.json"))           # Path.exists raises for what cannot be a name


def damage(path, rank=0, world=1):
    """Say what is wrong with a checkpoint's files, in this rank's share of them, a sentence each."""
    known = {}
    try:
        for file in sorted(path.glob("rank_*.json")):
            known |= read_json(path, file.name)
    except (OSError, ValueError) as error:
        return [str(error)]
    needed = ["record.json", *(file.name for file in path.glob("rank_*.safetensors"))]
    found = [f"{name} is in no list" for name in needed if name not in known]
    for name, told in list(known.items())[rank::world]:
        file = path / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            found.append(f"{name} is not a file of its own")
        elif fingerprint(file) != told:
            found.append(f"{name} is not what was written")
    return found


def fingerprint(file):
    """Return [bytes, SHA-256] of a file."""
    with open(file, "rb") as source:
        return [file.stat().st_size, hashlib.file_digest(source, "sha256").hexdigest()]
