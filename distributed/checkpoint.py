"""Checkpoints that survive a crash at any byte and load on any number of ranks.

    runs/NAME/checkpoints/step_000120/     weights and optimizer state in slices, record.json, config.json and the tokenizer

Every rank writes its own slices (torch.distributed.checkpoint) into `.step_000120`, from a copy in memory and in the background: training goes
on. A rank that is done writes down the size and the SHA-256 of its files; once all have, the first rank takes the dot off the name. So a
folder without a dot is complete, whatever was killed when; and one that was damaged later is known by its sums.
"""

import hashlib
import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from distributed.processes import gather
from model import split_shards, to_released

BLOCK = 2**24       # bytes read at a time
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")       # one process is no fault


# ---------------------------------------------------------------------------------------------------------------------
# What is saved: a flat dict of tensors, sharded or not

def tensors_of(module, optimizers):
    """Weights as "model.NAME", the state an optimizer keeps of them as "optimizer.NAME.KEY". Loading fills them in place."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    state = {f"optimizer.{names[parameter]}.{key}": tensor for optimizer in optimizers
             for parameter, own in optimizer.state.items() for key, tensor in own.items()}
    return {f"model.{name}": parameter.detach() for parameter, name in names.items()} | state


def make_room(path, module, optimizers):
    """Give fresh optimizers empty state of the shapes that the checkpoint holds."""
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    owner = {parameter: optimizer for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        prefix = f"optimizer.{name}."
        for key in [key for key in saved if key.startswith(prefix) and "." not in key[len(prefix):]]:
            like = saved[key].size == parameter.shape
            empty = torch.empty_like(parameter, requires_grad=False) if like else torch.empty(saved[key].size, dtype=saved[key].properties.dtype)
            owner[parameter].state[parameter][key[len(prefix):]] = empty


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading

class Checkpoints:
    """The folder of a run's checkpoints, of which the newest `keep` are kept."""

    def __init__(self, folder, rank=0, world=1, keep=2):
        self.folder, self.rank, self.world, self.keep = Path(folder), rank, world, keep
        self.group = dist.new_group(backend="gloo") if world > 1 else None     # what happens in the background must not mix with the rest
        self.thread, self.pending = ThreadPoolExecutor(1), None                # (folder aside, future of its list of files)

    def complete(self):
        """All complete checkpoints, the oldest first."""
        return sorted(self.folder.glob("step_*"), key=number)

    def newest(self):
        """The newest complete checkpoint, or None."""
        return max(self.folder.glob("step_*"), key=number, default=None)

    def save(self, step, tensors, record, write_rest=lambda folder: None):
        """Begin to save; a checkpoint that is still being saved is finished first. record: JSON; write_rest(folder): other files."""
        self.finish()
        aside = self.folder / f".step_{step:06d}"
        if self.rank == 0:
            for left in self.folder.glob(".step_*"):                           # by a crash
                shutil.rmtree(left)
            try:
                aside.mkdir(parents=True)
                write_rest(aside)
                (aside / "record.json").write_text(json.dumps(record, indent=2))
            except OSError as error:
                self.give_up(aside, error)
        self.barrier()
        written = dcp.async_save(tensors, checkpoint_id=aside, process_group=self.group, no_dist=self.world == 1)
        self.pending = aside, self.thread.submit(self.list_files, aside, written)

    def list_files(self, aside, written):
        """In the background: once the slices are written, list this rank's files. The first rank answers for what is nobody's."""
        written.result()
        files = sorted(aside.glob(f"__{self.rank}_*"))
        if self.rank == 0:
            files += [file for file in aside.iterdir() if not file.name.startswith(("__", "rank_"))]
        temporary = aside / f"rank_{self.rank}.tmp"
        temporary.write_text(json.dumps({file.name: fingerprint(file) for file in files}))
        temporary.replace(temporary.with_suffix(".json"))

    def poll(self):
        """Give the checkpoint its name if all ranks are done. Never waits."""
        if self.rank == 0 and self.pending and all((self.pending[0] / f"rank_{k}.json").exists() for k in range(self.world)):
            aside, final = self.pending[0], self.pending[0].with_name(self.pending[0].name[1:])
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            self.pending = None
            for old in self.complete()[:-max(1, self.keep)]:
                shutil.rmtree(old)

    def finish(self):
        """Wait until the checkpoint that is being saved is complete. OSError on all ranks if one could not write its part."""
        error = self.pending and self.pending[1].exception()                   # waits
        errors = gather([root_of(error)] if error else [], self.group)                # waits for the other ranks
        if not errors:
            self.poll()
        pending, self.pending = self.pending, None
        self.barrier()
        if errors:
            self.give_up(pending[0], errors[0])

    def give_up(self, aside, error):
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"a checkpoint could not be saved in {self.folder}: {error}; make room, and --resume goes on from "
                      f"{self.newest() or 'the beginning'}")

    def load(self, path, module, optimizers):
        """Fill a module and fresh optimizers from a checkpoint -> its record. ValueError that names what is damaged, missing or foreign."""
        self.verify(path)
        make_room(path, module, optimizers)
        self.fill(path, tensors_of(module, optimizers))
        return read_record(path)

    def load_policy(self, path, llama):
        """Fill a Llama, sharded or whole, with the weights of the policy in a checkpoint of SFT or PPO. ValueError as in load."""
        self.verify(path)
        prefix = "model.policy." if any(name.startswith("model.policy.") for name in sizes_in(path)) else "model."
        self.fill(path, {prefix + name: parameter.detach() for name, parameter in llama.named_parameters()}, whole=False)

    def verify(self, path):
        """ValueError on all ranks if a file of the checkpoint is not what was written; each rank reads its share of them."""
        problems = gather(damage(path, self.rank, self.world), self.group)
        if problems:
            before = [other for other in self.complete() if number(other) < number(path)]
            remedy = f"remove it, and --resume goes on from {before[-1]}" if before else "there is none before it"
            raise ValueError(f"{path}: damaged: {'; '.join(problems)}; {remedy}")

    def fill(self, path, tensors, whole=True):
        """Read the tensors in place. whole: the checkpoint must hold no others."""
        saved = sizes_in(path)
        for name in sorted(set(tensors) | set(saved) if whole else tensors):
            if name not in saved or name not in tensors:
                what = f"is only in {'the checkpoint' if name in saved else 'this run'}"
            elif saved[name] != tensors[name].shape:
                what = f"has shape {list(saved[name])} there and {list(tensors[name].shape)} here"
            else:
                continue
            raise ValueError(f"{path}: of another model or optimizer: {name} {what}")
        dcp.load(tensors, checkpoint_id=path, process_group=self.group, no_dist=self.world == 1)

    def barrier(self):
        if self.world > 1:
            dist.barrier(self.group)


def number(path):
    """The step of a checkpoint, from its name; -1 for a folder that is called otherwise."""
    digits = Path(path).name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def sizes_in(path):
    """The names of the tensors in a checkpoint, with their shapes."""
    return {name: of.size for name, of in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items()}


def is_checkpoint(path):
    """True for a folder that `Checkpoints.save` wrote."""
    return (Path(path) / "record.json").exists()


def read_record(path):
    """record.json of a checkpoint; ValueError if it is not one."""
    try:
        return json.loads((Path(path) / "record.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a checkpoint of this program: record.json: {error}") from None


def damage(path, rank=0, world=1):
    """What is wrong with a checkpoint's files, in this rank's share of them, as a list of sentences."""
    path, known = Path(path), {}
    lists = sorted(path.glob("rank_*.json"))
    for file in lists:
        try:
            known |= json.loads(file.read_text())
        except (OSError, ValueError):
            return [f"{file.name} cannot be read"] if rank == 0 else []
    if not lists:
        return ["it has no list of its files"] if rank == 0 else []
    bad = []
    for name, told in list(known.items())[rank::world]:
        try:
            if fingerprint(path / name) != told:
                bad.append(f"{name} is not what was written")
        except OSError as error:
            bad.append(f"{name}: {error.strerror}")
    return bad


def fingerprint(file):
    """[bytes, SHA-256]"""
    digest, size = hashlib.sha256(), 0
    with open(file, "rb") as source:
        while block := source.read(BLOCK):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def root_of(error):
    """The innermost reason of an error that torch.distributed.checkpoint wraps."""
    causes = list(getattr(error, "failures", {}).values())
    return root_of(causes[0][0] if isinstance(causes[0], tuple) else causes[0]) if causes else str(error)


# ---------------------------------------------------------------------------------------------------------------------
# A Hugging Face folder out of slices

def export(llama, folder, rank, world, max_shard_size=5 * 10**9):
    """Write a sharded Llama as files of at most `max_shard_size` bytes, which the ranks take in turn. A rank gathers one weight at a time
    and keeps those of its own file, so that none ever holds more than a file."""
    weights = {to_released(name, llama.config): parameter for name, parameter in llama.named_parameters()}     # a tied one once
    parts = split_shards(weights, max_shard_size)
    files = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    mine = {}
    for i, names in enumerate(parts):
        for name in names:
            whole = weights[name].full_tensor()                                # a collective
            if i % world == rank:
                mine[name] = whole.detach().cpu()
        if mine and (i % world == world - 1 or i == len(parts) - 1):           # all ranks write at the same time
            save_file(mine, folder / files[i // world * world + rank], {"format": "pt"})
            mine = {}
    if rank == 0:
        index = {"metadata": {"total_size": sum(weight.nbytes for weight in weights.values())},
                 "weight_map": {name: file for file, names in zip(files, parts) for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        (folder / "config.json").write_text(json.dumps(llama.config.to_dict() | {"torch_dtype": "float32"}, indent=2))
