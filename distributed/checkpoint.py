"""Checkpoints that survive a crash at any byte, load on any number of ranks, and never execute anything that
they contain.

    runs/NAME/checkpoints/step_000120/     weights and optimizer state in one file, record.json, config.json
                                           and the tokenizer

All ranks gather the tensors in the memory of the first, which writes them to `.step_000120` in the
background: training goes on. Then it takes the dot off the name. So a folder without a dot is complete,
whichever process was killed at any time. There is JSON and safetensors in it, and no pickle.
"""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from distributed.processes import first
from harness.files import to_json
from llama.folders import local, on_host, opened, read_json, write_file

TENSORS = "tensors.safetensors"


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
        return ...
    start = tensor.device_mesh.get_local_rank() * -(-len(tensor) // tensor.device_mesh.size())
    return slice(start, start + len(local(tensor)))


def make_room(shapes, module, optimizers):
    """Give fresh optimizers empty state for what a checkpoint holds of their parameters, {name: shape}."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    states = {f"optimizer.{names[parameter]}": (parameter, optimizer.state) for optimizer in optimizers
              for group in optimizer.param_groups for parameter in group["params"]}
    for name, shape in shapes.items():
        of, _, key = name.rpartition(".")
        if of in states:
            parameter, state = states[of]       # Adam's count of steps has no shape
            room = torch.empty_like(parameter, requires_grad=False) if shape else torch.empty(())
            state[parameter][key] = room


def shapes_in(path):
    """Read what a checkpoint holds -> {name: shape}."""
    with opened(path / TENSORS) as source:
        return {name: source.get_slice(name).get_shape() for name in source.keys()}


def fill(path, tensors, whole=True):
    """Read tensors in place, all of them or ValueError. whole: the checkpoint must hold no others."""
    held = shapes_in(path)
    asked = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(held | asked if whole else asked):
        there, here = (shapes.get(name, "nothing") for shapes in (held, asked))
        if there != here:
            raise ValueError(f"{path}: of another model, optimizer or version: it holds {there} of {name}, "
                             f"where this run has {here}")
    with opened(path / TENSORS) as source:
        for name, tensor in tensors.items():
            local(tensor).copy_(source.get_slice(name)[rows(tensor)])


def load(path, module, optimizers):
    """Fill a module and fresh optimizers from a checkpoint -> its record. ValueError for one of another model
    or optimizer."""
    make_room(shapes_in(path), module, optimizers)
    fill(path, tensors_of(module, optimizers))
    return read_json(path, "record.json")


def load_policy(path, llama):
    """Fill a Llama, sharded or whole, with the weights of the policy in a checkpoint of SFT or PPO."""
    ppo = any(name.startswith("model.policy.") for name in shapes_in(path))
    prefix = "model.policy." if ppo else "model."
    fill(path, {prefix + name: p.detach() for name, p in llama.named_parameters()}, whole=False)


# ------------------------------------------------------------------------------------------------------------
# The folder of a run's checkpoints

class Checkpoints:
    """The folder of a run's checkpoints, of which the newest `keep` are kept."""

    def __init__(self, folder, rank=0, keep=2):
        self.folder, self.rank, self.keep = Path(folder), rank, keep
        self.thread, self.writing = ThreadPoolExecutor(1), None        # the first rank's

    def complete(self):
        """List all complete checkpoints, the oldest first."""
        found = [path for path in self.folder.glob("step_*")
                 if re.fullmatch("step_[0-9]{6,}", path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def newest(self):
        """Return the newest checkpoint, or None."""
        return (self.complete() or [None])[-1]

    def save(self, step, tensors, record, write_rest):
        """Begin to save, once the one before is finished. record: JSON; write_rest(folder): other files."""
        self.finish()
        copies = on_host(tensors, self.rank == 0)
        if self.rank == 0:
            self.writing = self.thread.submit(self.write, f"step_{step:06d}", copies, record, write_rest)

    def write(self, name, copies, record, write_rest):
        """Write a checkpoint, in the background, and remove all but the newest."""
        for left in self.folder.glob(".step_*"):               # by a crash, or a full disk
            remove(left)
        aside, final = self.folder / f".{name}", self.folder / name
        write_file(aside, TENSORS, copies)
        write_file(aside, "record.json", to_json(record, indent=2))
        write_rest(aside)
        remove(final)
        aside.rename(final)
        for old in self.complete()[:-self.keep]:               # a crash may have left some
            remove(old)

    def finish(self):
        """Wait until the checkpoint that is being saved is complete. OSError on all ranks if it could not be
        written."""
        def wait():
            error = self.writing and self.writing.exception()
            self.writing = None
            if error:
                raise OSError(f"a checkpoint could not be saved in {self.folder}: {error}; make room, and "
                              f"--resume goes on from {self.newest() or 'the beginning'}")

        first(wait)


def remove(path):
    """Remove a folder with all that is in it, or a link to one."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def is_checkpoint(path):
    """Tell whether `Checkpoints.save` wrote a folder."""
    return os.path.exists(Path(path, "record.json"))           # Path.exists raises for what cannot be a name
