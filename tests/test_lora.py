"""LoRA: nothing at the start, dense algebra afterwards, merged on export, resumed bit for bit; and what --tune leaves to learn."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from test_train import command, run
from torch import nn

import sft
import train
from harness.settings import apply_preset
from envs import GeneralPoints
from llama.batches import collate
from llama.config import Config
from model import Linear, Llama
from study import costs
from study.plan import LLAMA_11B
from variants import lora, tune
from distributed.processes import Processes
from harness.load import load, sharding
from harness.ranges import UserError
from harness.settings import Args
from harness.tiny import CONFIG as TINY

HERE = Path(train.__file__).parent
LORA = ["--lora-rank", "3", "--lora-alpha", "6", "--lr-schedule", "constant", "--lr", "1e-2",
        "--eval-hands", "0"]


def trainer_of(model, processor, task="gp-vl", algo="sft", **changes):
    args = Args(task=task, algo=algo, preset="tiny", batch_size=4, lr=1e-2, **changes)
    return train.Trainer(apply_preset(args, 32), model, processor, Processes("cpu"))


def batch_of(processor, task):
    env = GeneralPoints(image=True, size=(224, 56)) if task == "gp-vl" else GeneralPoints()
    examples = sft.make_batch(processor, [(env, 1.0)], range(3), mistakes=0.5)
    return collate(processor, examples)


@torch.no_grad()
def logits(model, batch):
    return model(**batch.inputs(), logits="all").logits


def steps_of(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    measured = ("seconds", "tokens_per_second", "rollout_seconds", "update_seconds", "rollout_tokens_per_second", "memory_gb")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines if line["event"] == "step"]


def weights(folder):
    return Llama.from_pretrained(folder).state_dict()


# --------------------------------------------------------------------------------------------------------------- one layer

@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_and_its_gradients_are_those_of_the_dense_product(bias):
    """In float64: y = (W + s B A) x; and by the chain rule dA = s B^T G, dB = s G A^T, where G is the gradient of the dense matrix."""
    generator = torch.Generator().manual_seed(0)
    base = (nn.Linear if bias else Linear)(7, 5).double()
    nn.init.normal_(base.weight)
    layer = lora.Adapted(base, 2, 6.0, generator)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 7, dtype=torch.float64, generator=generator)
    dense = (base.weight + 3.0 * layer.lora_B @ layer.lora_A).detach().requires_grad_()
    expected = x @ dense.T + (base.bias.detach() if bias else 0.0)
    assert torch.allclose(layer(x), expected, rtol=1e-12)
    expected.sin().sum().backward()
    layer(x).sin().sum().backward()
    assert torch.allclose(layer.lora_A.grad, 3.0 * layer.lora_B.detach().T @ dense.grad, rtol=1e-10)
    assert torch.allclose(layer.lora_B.grad, 3.0 * dense.grad @ layer.lora_A.detach().T, rtol=1e-10)


def test_a_is_as_large_as_promised_and_follows_the_seed(small):
    layers = []
    for seed in (0, 0, 1):
        copied = Llama.from_pretrained(small[0])
        lora.adapt(copied, "q_proj", 8, 16.0, seed)
        layers.append(copied.layers[0].self_attn.q_proj)
    assert torch.equal(layers[0].lora_A, layers[1].lora_A) and not torch.equal(layers[0].lora_A, layers[2].lora_A)
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(2))
    ratio = (x @ layers[0].lora_A.T).square().mean() / x.square().mean()
    assert 0.75 < ratio < 1.25                                          # of 256 draws: deviation sqrt(2 / 256) = 0.09


# --------------------------------------------------------------------------------------------------------------- a model

@pytest.mark.parametrize("rank", [1, 4, 64])
@pytest.mark.parametrize("task", ["gp-l", "gp-vl"])
def test_at_the_start_it_is_the_base_model(model, processor, task, rank):
    batch = batch_of(processor, task)
    before = logits(model, batch)
    lora.adapt(model, "all", rank, 16.0)
    assert torch.equal(logits(model, batch), before)


def test_disabled_is_the_model_before_training(model, processor):
    """The frozen reference: bit for bit, for a policy, and for an actor-critic around it; also when an error ends it."""
    batch = batch_of(processor, "gp-vl")
    before = logits(model, batch)
    trainer = trainer_of(model, processor, algo="ppo", lora_rank=4, max_new_tokens=6, hands=4, samples=2)
    for i in range(2):
        trainer.update(i)
    after = logits(model, batch)
    assert (after - before).abs().max() > 0.1
    for holder in (model, trainer.module):
        with pytest.raises(KeyError), lora.disabled(holder):
            assert torch.equal(logits(model, batch), before)
            with lora.disabled(holder):
                pass
            assert torch.equal(logits(model, batch), before)            # the inner one leaves the outer one alone
            raise KeyError
        assert torch.equal(logits(model, batch), after)


def test_only_adapters_learn_and_are_remembered(model, processor):
    """Base weights stay bit for bit, and Adam keeps two numbers a number of A and B. The first step moves B alone."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_of(model, processor, lora_rank=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = lambda: {name.split(".")[-1] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trainer.update(0)
    assert moved() == {"lora_B"}
    trainer.update(1)
    assert moved() == {"lora_A", "lora_B"}
    after = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    assert after.keys() == start.keys() and all(torch.equal(after[name], start[name]) for name in start)
    kept = sum(state["exp_avg"].numel() + state["exp_avg_sq"].numel() for state in trainer.optimizers[0].state.values())
    assert kept == 2 * sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def test_numbers_of_the_lesson():
    """The table in the docstring is what the command prints; a row of it by hand."""
    table = costs.lora_table(Config.from_dict(LLAMA_11B), 16)
    assert "\n".join(f"    {line}" for line in table.splitlines()) in lora.__doc__
    # attention, r (in + out): 40 language layers with q, o (4096, 4096) and k, v (4096, 1024); 40 vision layers with four of (1280, 1280)
    assert f" {16 * (40 * (2 * 8192 + 2 * 5120) + 40 * 4 * 2560):,} " in table.splitlines()[3]


# --------------------------------------------------------------------------------------------------------------- --tune

def parts(model):
    """--tune -> the parameters that learn, found by way of the modules."""
    vision = [*model.vision_model.parameters(), *model.multi_modal_projector.parameters()]
    text = [model.embed_tokens.weight, *model.layers.parameters(), *model.norm.parameters(), *model.lm_head.parameters()]
    attention = [p for layer in model.layers for p in (layer.cross_attn if hasattr(layer, "cross_attn") else layer.self_attn).parameters()]
    return {"all": text + vision, "no-vision": text + [*model.multi_modal_projector.parameters()], "no-vision-no-adapter": text, "text": text,
            "no-embeddings": [*model.layers.parameters(), *model.norm.parameters()] + vision, "vision": vision, "attention": attention, "mlp": [p for layer in model.layers for p in layer.mlp.parameters()]}


@pytest.mark.parametrize("part", tune.TUNE)
def test_tune_trains_exactly_its_part(model, processor, part):
    names = {id(p): name for name, p in model.named_parameters()}
    expected = {names[id(p)] for p in parts(model)[part]}
    trainer = trainer_of(model, processor, tune=part)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepped = trainer.step
    with_gradient = set()

    def step(loss):
        with_gradient.update(name for name, p in model.named_parameters() if p.grad is not None)
        return stepped(loss)

    trainer.step = step
    trainer.update(0)
    assert with_gradient == expected
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == expected


@pytest.mark.parametrize("learns, modules, where", [
    ("all", "all", r"(layers\..*|transformer.*|global_transformer.*)\.(\w_proj|\w+_proj|fc\d)|multi_modal_projector"),
    ("text", "attention", r"layers\.\d+\.(self|cross)_attn\.[qkvo]_proj"),
    ("attention", "all", r"layers\.\d+\.(self|cross)_attn\.[qkvo]_proj"),
    ("all", "attention", r"(vision_model\..*)?layers\.\d+\.(self|cross)_attn\.[qkvo]_proj"),
    ("mlp", "all", r"layers\.\d+\.mlp\.(gate|up|down)_proj"),
    ("vision", "all", r"vision_model\..*\.([qkvo]_proj|fc[12])|multi_modal_projector"),
    ("vision", "mlp,q_proj", r"vision_model\..*\.(q_proj|fc[12])"),
    ("no-vision", "v_proj,multi_modal_projector", r"layers\.\d+\.(self|cross)_attn\.v_proj|multi_modal_projector"),
])
def test_adapters_go_where_tune_and_modules_meet(model, processor, learns, modules, where):
    linear = [name for name, part in model.named_modules() if isinstance(part, (Linear, nn.Linear)) and name != "lm_head"]
    where = r".*" if (learns, modules) == ("all", "all") else where
    expected = {f"{name}.lora_{x}" for name in linear if re.fullmatch(where, name) for x in "AB"}
    trainer = trainer_of(model, processor, tune=learns, lora_modules=modules, lora_rank=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i in range(2):
        trainer.update(i)
    assert expected and {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == expected


# --------------------------------------------------------------------------------------------------------------- runs

@pytest.mark.parametrize("task, algo", [("gp-l", "sft"), ("gp-vl", "sft"), ("gp-vl", "ppo")])
def test_exported_and_reloaded_it_is_the_model_with_adapters(model, processor, small, tmp_path, task, algo):
    batches = [batch_of(processor, kind) for kind in ("gp-l", "gp-vl")]
    before = [logits(model, batch) for batch in batches]
    trainer = trainer_of(model, processor, task, algo, lora_rank=4, out=str(tmp_path), max_new_tokens=6, hands=4, samples=2)
    for i in range(3):
        trainer.update(i)
    after = [logits(model, batch) for batch in batches]
    train.RunFolder(trainer.args, trainer.processes).save_final(model, processor, trainer.args)
    again = Llama.from_pretrained(tmp_path / "final")
    for batch, old, new in zip(batches, before, after):
        assert torch.allclose(logits(again, batch), new, atol=1e-5) and (new - old).abs().max() > 0.1
    names = []
    for folder in (small[0], tmp_path / "final"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]                                         # an ordinary folder


@pytest.mark.parametrize("task, algo, more", [("gp-l", "sft", []), ("gp-vl", "ppo", []),
                                              ("gp-vl", "ppo", ["--critic", "separate", "--tune", "text"])])
def test_resumed_equals_uninterrupted(small, tmp_path, task, algo, more):
    """Bit for bit on CPU: the weights and what was logged."""
    common = ["--task", task, "--algo", algo, "--model", small[0], *LORA, *more]
    run(*common, "--steps", 4, "--out", tmp_path / "whole")
    run(*common, "--steps", 2, "--out", tmp_path / "parts")
    run("--steps", 4, "--out", tmp_path / "parts", "--resume", "--override")
    a, b, start = (weights(folder) for folder in (tmp_path / "whole/final", tmp_path / "parts/final", small[0]))
    assert all(torch.equal(a[name], b[name]) for name in a) and any((a[name] - start[name]).abs().max() > 1e-3 for name in a)
    assert json.dumps(steps_of(tmp_path / "whole")) == json.dumps(steps_of(tmp_path / "parts"))
    if algo == "ppo":                                                   # drawn with adapters, scored with them
        assert len(steps_of(tmp_path / "whole")) == 4 and all(step["drawn_vs_scored"] < 1e-5 for step in steps_of(tmp_path / "whole"))


@pytest.mark.parametrize("algo", ["sft", "ppo"])
def test_a_checkpoint_loads_merged(small, tmp_path, algo):
    """For --algo eval or for another run, with adapters of its own or none: the same weights as in final/. Sharded, it says what to take."""
    run("--task", "gp-l", "--algo", algo, "--model", small[0], "--steps", 2, "--out", tmp_path / "run", "--tune", "text", *LORA)
    final, checkpoint = weights(tmp_path / "run/final"), tmp_path / "run/checkpoints/step_000002"
    loaded = load(Args(algo="eval", model=str(checkpoint)), Processes("cpu"), checkpoint)[0].state_dict()
    assert loaded.keys() == final.keys() and all(torch.equal(loaded[name], final[name]) for name in final)
    run("--task", "gp-l", "--algo", "sft", "--model", checkpoint, "--steps", 1, "--out", tmp_path / "next", *LORA)
    ranks = SimpleNamespace(rank=0, world=2, device=torch.device("cpu"))
    with pytest.raises(UserError, match="final/"):
        load(Args(algo="eval", model=str(checkpoint), shard="on"), ranks, checkpoint)


def test_two_ranks_equal_one(small, tmp_path, working_folder):
    """Whole copies on both; a large eps, so that no step comes out of rounding noise."""
    common = ["--task", "gp-vl", "--algo", "ppo", "--model", small[0], "--steps", 3, "--adam-eps", "1e-3", "--minibatches", 1, *LORA]
    run(*common, "--out", tmp_path / "one")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = command(*common, "--out", tmp_path / "two", cwd=working_folder, launcher=torchrun)
    output, _ = two.communicate(timeout=120)
    assert two.returncode == 0, output
    a, b, start = (weights(folder) for folder in (tmp_path / "one/final", tmp_path / "two/final", small[0]))
    assert max((a[name] - start[name]).abs().max() for name in a) > 1e-4
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_adapters_are_not_sharded():
    ranks = SimpleNamespace(rank=0, world=2, device=torch.device("cuda"))
    assert sharding(Args(), 10**9, ranks) == "on"
    assert sharding(Args(lora_rank=4), 10**9, ranks) == "off"


def test_a_text_model_has_no_vision_to_tune():
    sizes = {k: v for k, v in TINY["text_config"].items() if k != "cross_attention_layers"}
    with torch.device("meta"):
        model = Llama(Config.from_dict(sizes | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="no such weights"):
        tune.freeze(model, "vision")
