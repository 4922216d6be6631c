"""Checkpoints: what is loaded is what was saved, on any number of ranks; nothing half-written counts; damage is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed import checkpoint
from distributed.checkpoint import Checkpoints, tensors_of

ROOT = Path(__file__).resolve().parent.parent


def learner(steps, width=8, kind=torch.optim.AdamW):
    """A module with an optimizer after some steps."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(width, 8, bias=False), torch.nn.Linear(8, 5, bias=False))
    optimizers = [kind(module.parameters(), lr=0.1)]
    for _ in range(steps):
        advance(module, optimizers)
    return module, optimizers


def advance(module, optimizers):
    module(torch.ones(2, module[0].in_features)).square().sum().backward()
    optimizers[0].step()
    optimizers[0].zero_grad()


def restored(checkpoints, path, **kwargs):
    module, optimizers = learner(0, **kwargs)
    return module, optimizers, checkpoints.load(path, module, optimizers)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_training_goes_on_while_saving_and_from_what_was_saved(tmp_path, kind):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    module, optimizers = learner(2, kind=kind)
    checkpoints.save(2, tensors_of(module, optimizers), {"step": 2, "x": 0.1}, lambda folder: (folder / "config.json").write_text("{}"))
    advance(module, optimizers)                                # must not reach the file
    checkpoints.finish()
    [path] = checkpoints.complete()
    assert path.name == "step_000002" and (path / "config.json").exists()
    again, its_optimizers, record = restored(checkpoints, path, kind=kind)
    assert record == {"step": 2, "x": 0.1}
    assert not torch.equal(again[0].weight, module[0].weight)
    advance(again, its_optimizers)
    for name, tensor in tensors_of(module, optimizers).items():
        assert torch.equal(tensor, tensors_of(again, its_optimizers)[name]), name


def test_poll_never_waits_and_old_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    module, optimizers = learner(1)
    for step in range(4):
        checkpoints.save(step, tensors_of(module, optimizers), {})
        checkpoints.poll()
        while checkpoints.pending:
            checkpoints.poll()
    assert [path.name for path in checkpoints.complete()] == ["step_000002", "step_000003"]
    assert not list(tmp_path.glob(".*"))


def test_what_a_crash_left_behind_does_not_count(tmp_path):
    (tmp_path / ".step_000007").mkdir()
    (tmp_path / ".step_000007" / "rank_0.safetensors").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.complete() == []
    checkpoints.save(8, tensors_of(*learner(1)), {})
    checkpoints.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000008"]


def two(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, tensors_of(*learner(step)), {}, lambda folder: (folder / "config.json").write_text("{ }"))
    checkpoints.finish()
    return checkpoints, checkpoints.complete()[-1]


@pytest.mark.parametrize("file", ["rank_0.safetensors", "config.json", "record.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_damage_is_named_and_the_one_before_is_offered(tmp_path, file, harm):
    checkpoints, path = two(tmp_path)
    content = (path / file).read_bytes()
    middle = len(content) // 2
    if harm == "remove":
        (path / file).unlink()
    else:
        (path / file).write_bytes(content[:middle] + (bytes([content[middle] ^ 1]) + content[middle + 1:] if harm == "flip" else b""))
    with pytest.raises(ValueError, match=f"step_000002: damaged: {file}.*step_000001"):
        checkpoints.load(path, *learner(0))


def test_a_lost_list_of_files_is_damage_too(tmp_path):
    checkpoints, path = two(tmp_path)
    (path / "rank_0.json").write_text("{")
    with pytest.raises(ValueError, match="rank_0.json"):
        checkpoints.load(path, *learner(0))
    (path / "rank_0.json").unlink()
    with pytest.raises(ValueError, match="no list"):
        checkpoints.load(path, *learner(0))


def test_one_of_another_model_is_refused(tmp_path):
    checkpoints, path = two(tmp_path)
    deeper, optimizers = learner(0)
    deeper.append(torch.nn.Linear(5, 1, bias=False))
    with pytest.raises(ValueError, match="model.2.weight is only in this run"):
        checkpoints.load(path, deeper, optimizers)
    with pytest.raises(ValueError, match="model.1.weight is only in the checkpoint"):
        checkpoints.load(path, deeper[:1], [torch.optim.AdamW(deeper[:1].parameters())])
    with pytest.raises(ValueError, match=r"model.0.weight has shape \[8, 8\] there and \[8, 9\] here"):
        checkpoints.load(path, *learner(0, width=9))


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path, monkeypatch):
    checkpoints, path = two(tmp_path)

    def full(file):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "fingerprint", full)
    checkpoints.save(3, tensors_of(*learner(3)), {})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.finish()
    monkeypatch.undo()
    assert [other.name for other in checkpoints.complete()] == ["step_000001", "step_000002"] and len(list(tmp_path.iterdir())) == 2
    checkpoints.save(4, tensors_of(*learner(4)), {})
    checkpoints.finish()
    assert checkpoints.complete()[-1].name == "step_000004"


RANKS = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path[:0] = [{root!r}, {tests!r}]
from distributed.checkpoint import Checkpoints, tensors_of
import test_checkpoint as t
dist.init_process_group("gloo")

def work():
    rank, world = dist.get_rank(), dist.get_world_size()
    module, optimizers = t.learner(0)
    fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1)]
    checkpoints = Checkpoints({folder!r}, rank, world)
    if {save}:
        t.advance(module, optimizers)
        checkpoints.save(1, tensors_of(module, optimizers), {{}})
        checkpoints.finish()
    else:
        path = checkpoints.complete()[-1]
        checkpoints.load(path, module, optimizers)
    sums = {{name: (x.full_tensor() if hasattr(x, "full_tensor") else x).double().sum().item() for name, x in tensors_of(module, optimizers).items()}}
    if rank == 0:
        print("SUMS", sorted(sums.items()))

work()                       # whose groups are gone before the interpreter ends, as in train.py: a thread of theirs must not outlive it
dist.destroy_process_group()
"""


def run(tmp_path, ranks, save):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path / "checkpoints"), save=save))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), str(script)], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("SUMS"))


def test_slices_of_two_ranks_load_on_two_and_on_one(tmp_path):
    saved = run(tmp_path, 2, True)
    path = tmp_path / "checkpoints" / "step_000001"
    names = {name for k in (0, 1) for name in json.loads((path / f"rank_{k}.json").read_text())}
    assert {"rank_0.safetensors", "rank_1.safetensors", "record.json"} == names
    assert run(tmp_path, 2, False) == saved == run(tmp_path, 1, False)
