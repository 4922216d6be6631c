"""LoRA: nothing at the start, dense algebra afterwards, merged on export, resumed bit for bit; and what
--tune leaves to learn."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train
from distributed.processes import Processes
from harness.load import halve_frozen, load, sharding
from harness.settings import Args, apply_preset
from harness.tiny import CONFIG as TINY
from llama.batches import collate
from llama.config import Config
from model import Linear, Llama
from tables import cases
from test_ppo import in_text_and_pictures
from test_sft import dialogues
from test_train import in_parts, on_two_ranks, records, run, weights
from variants import lora
from variants.tune import TUNE, freeze

LORA = "--lora-rank 3 --lora-alpha 6 --lr 1e-2 --eval-hands 0"


def trainer_of(model, processor, task="gp-vl", algo="sft", steps=0, **changes):
    """Return a Trainer that has made some steps."""
    args = Args(task=task, algo=algo, preset="tiny", batch_size=4, hands=4, samples=2, max_new_tokens=6,
                lr=1e-2, **changes)
    trainer = train.Trainer(apply_preset(args, 32), model, processor, Processes("cpu"))
    for i in range(steps):
        trainer.update(i)
    return trainer


def moved(model, before):
    """Return the names of the parameters that are no longer as they were."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def batch_of(processor, task):
    return collate(processor, [[example] for example in dialogues(processor, 3, 0.5, task)])


@torch.no_grad()
def logits(model, batch):
    return model(**batch.inputs(), logits="all").logits


def assert_equal(found, expected):
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------
# One layer

@cases("kind", [Linear, nn.Linear])          # without and with a bias
def test_a_layer_and_its_gradients_are_those_of_the_dense_product(kind):
    """In float64: y = (W + s B A) x; and by the chain rule dA = s B^T G, dB = s G A^T, where G is the
    gradient of the dense matrix."""
    generator = torch.Generator().manual_seed(0)
    base = kind(7, 5).double()
    nn.init.normal_(base.weight)
    layer = lora.Adapted(base, 2, 6.0, generator)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 7, dtype=torch.float64, generator=generator)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    dense = (base.weight.detach() + 3 * B @ A).requires_grad_()
    expected = x @ dense.T + (base.bias.detach() if kind is nn.Linear else 0)
    assert torch.allclose(layer(x), expected, rtol=1e-12)
    for y in (expected, layer(x)):
        y.sin().sum().backward()
    assert torch.allclose(layer.lora_A.grad, 3 * B.T @ dense.grad, rtol=1e-10)
    assert torch.allclose(layer.lora_B.grad, 3 * dense.grad @ A.T, rtol=1e-10)


def test_a_is_as_large_as_promised_and_follows_the_seed(small):
    drawn = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(small[1])
        lora.adapt(model, "q_proj", 8, 16.0, seed)
        drawn.append(model.layers[0].self_attn.q_proj.lora_A)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    # of 256 draws with variance 1 / 32: that of their mean square is 2 / 256 of it, a deviation of 0.09
    assert 0.75 < 32 * drawn[0].square().mean() < 1.25


# ------------------------------------------------------------------------------------------------------------
# A model

@cases("rank", [1, 4, 64])
@in_text_and_pictures
def test_at_the_start_it_is_the_base_model(model, processor, task, rank):
    batch = batch_of(processor, task)
    before = logits(model, batch)
    lora.adapt(model, "all", rank, 16.0)
    assert torch.equal(logits(model, batch), before)


def test_disabled_is_the_model_before_training(model, processor):
    """The frozen reference: bit for bit, for a policy, and for an actor-critic around it; also when an error
    ends it."""
    batch = batch_of(processor, "gp-vl")
    before = logits(model, batch)
    trainer = trainer_of(model, processor, algo="ppo", steps=2, lora_rank=4)
    after = logits(model, batch)
    assert (after - before).abs().max() > 0.1
    for holder in (model, trainer.module):
        with pytest.raises(KeyError), lora.disabled(holder):
            assert torch.equal(logits(model, batch), before)
            with lora.disabled(holder):
                pass
            assert torch.equal(logits(model, batch), before)   # the inner one leaves the outer one alone
            raise KeyError
        assert torch.equal(logits(model, batch), after)


def test_only_adapters_learn_and_are_remembered(model, processor):
    """Base weights stay bit for bit, and Adam keeps two numbers per number of A and B. The first step moves B
    alone."""
    start = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model, processor, lora_rank=4)
    before = copy.deepcopy(dict(model.named_parameters()))
    for i, learn in enumerate(({"lora_B"}, {"lora_A", "lora_B"})):
        trainer.update(i)
        assert {name.split(".")[-1] for name in moved(model, before)} == learn
    base = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    assert_equal({name: tensor for name, tensor in base.items() if "lora_" not in name}, start)
    states = trainer.optimizers[0].state.values()
    kept = sum(state["exp_avg"].numel() + state["exp_avg_sq"].numel() for state in states)
    assert kept == 2 * sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def test_frozen_layers_compute_in_bfloat16_as_before(model, processor):
    """As autocast would cast them, bit for bit. Adapters stay, and a head that is tied."""
    lora.adapt(model, "all", 2, 4.0)
    batch = batch_of(processor, "gp-vl")
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model, batch)
        halve_frozen(model)
        assert torch.equal(logits(model, batch), before)
    layer = model.layers[0].mlp.up_proj
    assert (layer.base.weight.dtype, layer.lora_A.dtype) == (torch.bfloat16, torch.float32)
    model.embed_tokens.weight = model.lm_head.weight = nn.Parameter(torch.zeros(9, 9), False)
    halve_frozen(model)
    assert model.lm_head.weight.dtype == torch.float32


def test_numbers_of_the_lesson():
    """A row of the table in the docstring."""
    # attention, r (in + out): 40 language layers with q, o (4096, 4096) and k, v (4096, 1024); 40 vision
    # layers with four of (1280, 1280)
    assert f" {16 * (40 * (2 * 8192 + 2 * 5120) + 40 * 4 * 2560):,} " in lora.__doc__


# ------------------------------------------------------------------------------------------------------------
# --tune

@cases("part", TUNE)
def test_tune_trains_exactly_its_part(model, processor, part):
    """Found by way of the modules."""
    vision, adapter, layers = model.vision_model, model.multi_modal_projector, model.layers
    text = [model.embed_tokens, layers, model.norm, model.lm_head]
    modules = {
        "all": [*text, vision, adapter], "no-vision": [*text, adapter], "no-vision-no-adapter": text,
        "text": text, "vision": [vision, adapter], "no-embeddings": [layers, model.norm, vision, adapter],
        "attention": [getattr(layer, "cross_attn", None) or layer.self_attn for layer in layers],
        "mlp": [layer.mlp for layer in layers]}
    own = {id(p) for module in modules[part] for p in module.parameters()}
    expected = {name for name, p in model.named_parameters() if id(p) in own}
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer_of(model, processor, steps=1, tune=part)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert moved(model, before) == expected


@cases("part, modules, where", r"""
    all       | all        | .*
    all       | attention  | (vision_model\..*)?layers\.\d+\.(self|cross)_attn\.[qkvo]_proj
    text      | attention  | layers\.\d+\.(self|cross)_attn\.[qkvo]_proj
    attention | all        | layers\.\d+\.(self|cross)_attn\.[qkvo]_proj
    mlp       | all        | layers\.\d+\.mlp\.(gate|up|down)_proj
    vision    | all        | vision_model\..*\.([qkvo]_proj|fc[12])|multi_modal_projector
    no-vision | v_proj,multi_modal_projector | layers\.\d+\.(self|cross)_attn\.v_proj|multi_modal_projector
    vision    | mlp,q_proj | vision_model\..*\.(q_proj|fc[12])""")
def test_adapters_go_where_tune_and_modules_meet(model, processor, part, modules, where):
    linear = [name for name, module in model.named_modules() if isinstance(module, (Linear, nn.Linear))]
    expected = {f"{name}.lora_{x}" for name in linear for x in "AB"
                if re.fullmatch(where, name) and name != "lm_head"}
    trainer = trainer_of(model, processor, tune=part, lora_modules=modules, lora_rank=2)
    before = copy.deepcopy(dict(model.named_parameters()))
    for i in range(2):
        trainer.update(i)
    assert expected and moved(model, before) == expected


def test_a_text_model_has_no_vision_to_tune():
    sizes = {k: v for k, v in TINY["text_config"].items() if k != "cross_attention_layers"}
    with torch.device("meta"):
        model = Llama(Config.from_dict(sizes | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="no such weights"):
        freeze(model, "vision")


# ------------------------------------------------------------------------------------------------------------
# Runs

@cases("task, algo", [("gp-l", "sft"), ("gp-vl", "sft"), ("gp-vl", "ppo")])
def test_exported_and_reloaded_it_is_the_model_with_adapters(model, processor, tmp_path, task, algo):
    batches = [batch_of(processor, task) for task in ("gp-l", "gp-vl")]
    before = [logits(model, batch) for batch in batches]
    trainer = trainer_of(model, processor, task, algo, steps=3, lora_rank=4, out=str(tmp_path))
    after = [logits(model, batch) for batch in batches]
    train.RunFolder(trainer.args, trainer.processes).save_final(model, processor, trainer.args)
    again = Llama.from_pretrained(tmp_path / "final")          # an ordinary folder
    for batch, old, new in zip(batches, before, after):
        assert torch.allclose(logits(again, batch), new, atol=1e-5) and (new - old).abs().max() > 0.1


@cases("task, algo, more", [
    ("gp-l", "sft", ""), ("gp-vl", "ppo", ""), ("gp-vl", "ppo", "--critic separate --tune text")])
def test_resumed_equals_uninterrupted(small, tmp_path, task, algo, more):
    whole = in_parts(tmp_path, f"--task {task} --algo {algo} --model", small[0], LORA, more)
    start, end = weights(small[0]), weights(whole / "final")
    assert max((end[name] - start[name]).abs().max() for name in end) > 1e-3
    if algo == "ppo":                                          # drawn with adapters, scored with them
        drawn_vs_scored = [step["drawn_vs_scored"] for step in records(whole, "step")]
        assert len(drawn_vs_scored) == 4 and max(drawn_vs_scored) < 1e-5


def test_a_checkpoint_is_resumed_and_begins_no_other_run(small, tmp_path):
    """final/ does, with the adapters merged."""
    run("--algo sft --steps 1 --tune text --model", small[0], "--out", tmp_path / "run", LORA)
    checkpoint = tmp_path / "run/checkpoints/step_000001"
    with pytest.raises(ValueError, match="of another model, optimizer or version"):
        load(Args(algo="eval", model=str(checkpoint)), Processes("cpu"), checkpoint)


def test_two_ranks_equal_one(small, tmp_path, working_folder):
    """Whole copies on both. (With seed 0 the third step has a draw that rounding decides.)"""
    on_two_ranks(tmp_path, working_folder, small[0], "--task gp-vl --seed 1", LORA)


@cases("rank, shard", [(0, "on"), (4, "off")])
def test_adapters_are_not_sharded(rank, shard):
    ranks = SimpleNamespace(rank=0, world=2, device=torch.device("cuda"))
    assert sharding(Args(lora_rank=rank), 10**9, ranks) == shard
