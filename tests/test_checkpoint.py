"""Checkpoints: training goes on from what was saved; nothing half-written counts. Damage is in test_runs.py,
several ranks are in test_shard.py."""

import pytest
import torch

from distributed.checkpoint import Checkpoints, load, tensors_of
from tables import raises


def learner(steps, width=8, kind=torch.optim.AdamW):
    """Return a module with its optimizers after some steps."""
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


def restored(path, **kwargs):
    module, optimizers = learner(0, **kwargs)
    return module, optimizers, load(path, module, optimizers)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_training_goes_on_while_saving_and_from_what_was_saved(tmp_path, kind):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    module, optimizers = learner(2, kind=kind)
    checkpoints.save(2, tensors_of(module, optimizers), {"step": 2, "x": 0.1},
                     lambda folder: (folder / "config.json").write_text("{}"))
    advance(module, optimizers)                                # must not reach the file
    checkpoints.finish()
    [path] = checkpoints.complete()
    assert path.name == "step_000002" and (path / "config.json").exists()
    again, its_optimizers, record = restored(path, kind=kind)
    assert record == {"step": 2, "x": 0.1}
    assert not torch.equal(again[0].weight, module[0].weight)
    advance(again, its_optimizers)
    for name, tensor in tensors_of(module, optimizers).items():
        assert torch.equal(tensor, tensors_of(again, its_optimizers)[name]), name


def test_old_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    module, optimizers = learner(1)
    for step in range(4):
        checkpoints.save(step, tensors_of(module, optimizers), {}, lambda folder: None)
    checkpoints.finish()
    assert [path.name for path in checkpoints.complete()] == ["step_000002", "step_000003"]
    assert not list(tmp_path.glob(".*"))


def test_one_of_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors_of(*learner(1)), {}, lambda folder: None)
    checkpoints.finish()
    [path] = checkpoints.complete()
    deeper, optimizers = learner(0)
    deeper.append(torch.nn.Linear(5, 1, bias=False))
    for words, *learnt in (
            ("nothing of model.2.weight, where this run has [1, 5]", deeper, optimizers),
            ("[5, 8] of model.1.weight, where this run has nothing", deeper[:1],
             [torch.optim.AdamW(deeper[:1].parameters())]),
            ("[8, 8] of model.0.weight, where this run has [8, 9]", *learner(0, width=9))):
        raises(words, load, path, *learnt)
