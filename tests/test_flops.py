"""The ledger of FLOPs: against PyTorch's own counter, against masks, against lengths worked out by hand, and over whole runs."""

import json
from collections import Counter
from unittest import mock

import pytest
import torch
from test_train import quick
from torch.utils.flop_counter import FlopCounterMode

import ppo
import sft
import train
from distributed import plan, shard
from kernels.visible import dense_mask
from llama.batches import Batch
from llama.cache import KVCache
from llama.config import Config
from llama.generate import generate
from llama.images import Images
from model import Llama
from harness import flops
from variants import lora
from harness.load import count_parameters

PATCHES, PADDED, TILES = 17, 24, 4                             # of a tile of 56 pixels, with and without padding; of an image
REAL = [3, 1]                                                 # tiles of the two images of `show` that are no padding


def show(rows=(0, 2)):
    """Two images with 3 and 1 real tiles."""
    real = torch.arange(TILES) < torch.tensor(REAL)[:, None]
    return Images(torch.randn(2, TILES, 3, 56, 56), torch.tensor([3, 1]), real.long(), torch.tensor(rows))


def ids_of(model, rows, length, images=None):
    """Random ids; rows with an image have it as their second token."""
    ids = torch.randint(5, 500, (rows, length))
    if images is not None:
        ids[images.rows, 1] = model.config.image_token_id
    return ids


def counted(model, **given):
    """{quantity: number} of a call and {part: (forward, backward)}."""
    done, rate = flops.quantities(model.config, **given), flops.rates(model)
    return done, {part: [flops.flops(rate, done, way)[part] for way in (0, 1)] for part in flops.PARTS}


def by_phase(ledger):
    """{phase: FLOPs} but for parts without any."""
    return {phase: {part: n for part, n in parts.items() if n} for phase, parts in ledger.own.items()}


# ------------------------------------------------------------------------------------------------- products, by PyTorch's counter

def open_attention(q, k, v, visible=None):
    """Attention in plain products, of which all pairs are computed: PyTorch's counter sees no masks."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[1], 1) for x in (k, v))
    return ((q.transpose(1, 2) @ k.mT).softmax(-1) @ v).transpose(1, 2)


def plain_logprobs(hidden, weight, targets, temperature):
    asked = (targets >= 0).nonzero()[:, 0]
    logprobs = (hidden[asked] @ weight.T).log_softmax(-1)
    return [x.new_zeros(len(targets)).index_copy(0, asked, x) for x in (logprobs[:, 0], (logprobs.exp() * logprobs).sum(-1))]


def opened(done, B, T, N):
    """The same with every pair of B rows of T tokens and N images, tokens before an image among them."""
    looks = {"looks": N * T, "glances": N * T * TILES * PATCHES} if "glances" in done else {}
    return done | {"pairs": B * T * T} | looks | (
        {"vision pairs": N * (TILES * PADDED)**2} if "vision pairs" in done else {})


ADAPTERS = {tune: [None, "all"] for tune in sft.TUNE} | {"all": [None, "all", "q_proj", "k_proj,down_proj"], "attention": [None, "q_proj"]}
SEEN = {tune: ["pixels"] + ["nothing"] * (tune != "vision") + ["features"] * sft.vision_frozen(tune) for tune in sft.TUNE}


@pytest.mark.parametrize("tune, seen, adapters", [(tune, seen, adapters) for tune in sft.TUNE for seen in SEEN[tune] for adapters in ADAPTERS[tune]])
def test_products_are_those_that_pytorch_counts(model, tune, seen, adapters):
    """Forward and backward, exactly, whatever learns and whether the image is given as pixels or as features. So backward is autograd's: of
    frozen weights without what they need not."""
    sft.freeze(model, tune)
    if adapters:
        lora.adapt(model, adapters, rank=4, alpha=8)
    images = show((0, 1)) if seen != "nothing" else None
    if seen == "features":
        images = Images(None, images.aspect_ratio_ids, images.aspect_ratio_mask, images.rows, torch.randn(2, TILES * PATCHES, 32))
    ids = ids_of(model, 2, 9, images)
    targets = torch.where(torch.arange(9) > 4, ids % 500, -100)
    done = opened(flops.quantities(model.config, ids, images=images, targets=targets), 2, 9, 2)
    rate = flops.rates(model)
    with mock.patch("model.attention", open_attention), mock.patch("model.token_logprobs", plain_logprobs):
        with FlopCounterMode(display=False) as forward:
            out = model(ids, images=images, targets=targets)
        with FlopCounterMode(display=False) as backward:
            (out.logprobs + out.entropy).sum().backward()
    assert [forward.get_total_flops(), backward.get_total_flops()] == [sum(flops.flops(rate, done, way).values()) for way in (0, 1)]


def test_the_11b_model_costs_what_its_operators_sum_up_to():
    """On the meta device, with an image of four tiles; and so says the table that the module prints. The plan counts the head's second look at its
    logits, too."""
    config, T, answers = Config.from_dict(plan.LLAMA_11B), 32, 8
    with torch.device("meta"):
        llama = Llama(config)
    targets = torch.arange(T)[None] - (T - answers)
    done, costs = counted(llama, input_ids=plan.make_ids(config, 1, T, True), targets=targets, images=plan.make_images(config, 1))
    every_pair = done | {"pairs": T * T, "vision pairs": done["vision tokens"]**2,
                         "looks": T, "glances": T * done["features"]}
    both = sum(sum(flops.flops(flops.rates(llama), every_pair, way).values()) for way in (0, 1))
    assert plan.count_flops(llama, True, T, answers, train=True) == both + costs["head"][0]
    row = flops.table(config, T, answers).splitlines()[-1].split()
    assert row[:4] == ["update,", "with", "an", "image"]
    total, paper = sum(map(sum, costs.values())), 6 * sum(p.numel() for p in llama.parameters()) * T
    assert row[-2:] == [f"{total / T / 1e9:.2f}", f"{paper / T / 1e9:.2f}"] and row[4] == f"{sum(costs['text']) / T / 1e9:.2f}"


def test_adapters_that_are_off_cost_nothing(model):
    whole = flops.rates(model)["tokens"][0]
    lora.adapt(model, "q_proj", rank=4, alpha=8)
    assert flops.rates(model)["tokens"][0] - whole == 2 * 4 * (32 + 32) * 2             # two self-attention layers, 32 channels in and out
    with lora.disabled(model):
        assert flops.rates(model)["tokens"][0] == whole


# ------------------------------------------------------------------------------------------------------------- pairs, by the masks

def watch(lengths, before):
    """An attention that computes nothing and sums up what its masks leave open to tokens that are no padding
    -> (function, {kind: pairs}). before: tokens of a row before its image; their glances do not count."""
    found = Counter()

    def attention(q, k, v, visible):
        B, T, S = *q.shape[:2], k.shape[2]
        kind = "vision pairs" if q.shape[2] == 2 else "pairs" if visible.causal else "glances"      # the tower has two heads, the text four
        mask = dense_mask(visible, q, S, 1)
        seen = torch.ones(B, T, S) if mask is None else (mask[:, 0] == 0).expand(B, T, S)
        real = {"pairs": lengths, "glances": lengths[:1] + lengths[2:3], "vision pairs": [S, S]}[kind]
        start = before if kind == "glances" else 0
        asked = (torch.arange(T) < torch.tensor(real)[:, None]) & (torch.arange(T) >= start)
        found[kind] += int((seen * asked[:, :, None]).sum())
        return q
    return attention, found


def test_pairs_are_what_the_masks_leave_open(model):
    """Rows of different lengths, one of them without an image, in a prompt, a second turn and a token of the first rows alone. The small model
    has two layers of self-attention and two in its tower."""
    cache, images = KVCache(model.config, 3), show()
    calls = [([7, 4, 5], dict(images=images)), ([2, 3, 1], {}), ([1, 1], {})]
    for lengths, given in calls:
        ids = ids_of(model, len(lengths), max(lengths), given.get("images"))
        given |= dict(cache=cache if len(lengths) == 3 else cache.first(2), lengths=torch.tensor(lengths) if max(lengths) > 1 else None)
        attention, found = watch(lengths, before=int("images" in given))
        with mock.patch("model.attention", attention), torch.no_grad():
            model(ids, logits="last", **given)
        done = flops.quantities(model.config, ids, logits="last", **given)
        assert found == {kind: n * {"glances": 1}.get(kind, 2) for kind, n in done.items() if kind in ("pairs", "glances", "vision pairs")}
        assert done["targets"] == len(lengths) and done["tokens"] == sum(lengths)


def test_quantities_by_hand(model):
    """11 tokens after 4 in one row, 3 after none in the other: 5 + ... + 15 and 1 + 2 + 3 pairs. An image of one tile, 68 features."""
    cache = KVCache(model.config, 2)
    cache.lengths = torch.tensor([15, 3])                      # as the pass left them
    assert flops.quantities(model.config, torch.zeros(2, 11), lengths=torch.tensor([11, 3]), cache=cache, logits="last") == {
        "tokens": 14, "pairs": 110 + 6, "targets": 2}
    images = Images(torch.zeros(1), torch.ones(1), torch.tensor([[1, 0, 0, 0]]), torch.tensor([1]))
    ids = torch.tensor([[7, 7, 7], [7, model.config.image_token_id, 7]])
    assert flops.quantities(model.config, ids, images=images, targets=torch.tensor([[-100, 3, 3], [-100, -100, 0]])) == {
        "tokens": 6, "pairs": 12, "targets": 3, "patches": 4 * 16, "vision tokens": 4 * 24, "vision pairs": 17 * 96 + (96 - 17) * 17,
        "features": 68, "image keys": 68, "looks": 2, "glances": 17 + 17}      # none from before the image


@pytest.mark.parametrize("rows", [(0, 2), (0, 1)])
def test_rows_together_cost_what_they_cost_alone(model, rows):
    images, lengths = show(rows), [9, 4, 6]
    ids = ids_of(model, 3, 9, images)
    _, together = counted(model, input_ids=ids, lengths=torch.tensor(lengths), images=images, logits="all")
    total = Counter()
    for row, length in enumerate(lengths):
        own = None
        if row in rows:
            i = rows.index(row)
            own = Images(images.pixel_values[i:i + 1], images.aspect_ratio_ids[i:i + 1], images.aspect_ratio_mask[i:i + 1], torch.tensor([0]))
        for part, numbers in counted(model, input_ids=ids[row:row + 1, :length], images=own, logits="all")[1].items():
            total.update({(part, way): n for way, n in enumerate(numbers)})
    assert {(part, way): n for part, numbers in together.items() for way, n in enumerate(numbers)} == total and total["vision", 1] > 0


# ------------------------------------------------------------------------------------------------------------------- phases

def test_generation_costs_what_its_lengths_say(model):
    """Of p prompt tokens and n drawn ones, p + n - 1 are passed, each seeing itself and those before; the head answers n times. Two turns with
    a cache see each token once; rows end at different lengths."""
    images, ledger = show(), flops.Ledger()
    conversations = [ids_of(model, 3, n, images)[row].tolist() for row, n in enumerate((9, 5, 7))]
    drawn, cache = [0, 0, 0], None
    with ledger.phase("rollout", model):
        for turn in range(2):
            samples, cache = generate(model, conversations, cache=cache, images=None if turn else images, max_new_tokens=12, seeds=[1, 2, 3],
                                      stop_ids=range(200))
            drawn = [n + len(sample.ids) for n, sample in zip(drawn, samples)]
            conversations = [ids + sample.ids + ([7, 8, 9] if turn == 0 else []) for ids, sample in zip(conversations, samples)]
    passed, rate = [len(ids) - 1 for ids in conversations], flops.rates(model)
    assert len(set(drawn)) > 1
    seen = [PATCHES * tiles for tiles in REAL]
    done = {"tokens": sum(passed), "pairs": sum(n * (n + 1) // 2 for n in passed), "targets": sum(drawn),
            "patches": 2 * TILES * (PATCHES - 1), "vision tokens": 2 * TILES * PADDED, "vision pairs": sum(2 * n * 96 - n * n for n in seen),
            "features": 2 * 68, "image keys": 2 * 68, "looks": passed[0] - 1 + passed[2] - 1,
            "glances": sum((passed[row] - 1) * n for row, n in zip((0, 2), seen))}
    assert by_phase(ledger) == {"rollout": flops.flops(rate, done, 0), "scoring": {}, "update": {}}


def test_an_update_costs_three_times_its_forward_pass(model):
    """Where all learns; but for the pixels, which have no gradient."""
    ledger, images = flops.Ledger(), show()
    ids = ids_of(model, 3, 6, images)
    given = dict(lengths=torch.tensor([6, 3, 6]), images=images, targets=ids % 500)
    with ledger.phase("update", model):
        with torch.no_grad():
            model(ids, **given)
        model(ids, **given).logprobs.sum().backward()
    model(ids, **given).logprobs.sum().backward()              # in no phase
    phases = by_phase(ledger)
    first = 2 * 2 * TILES * (PATCHES - 1) * model.vision_model.patch_embedding.weight.numel()
    assert phases["update"] == {part: 3 * n - (first if part == "vision" else 0) for part, n in phases["scoring"].items()}
    assert set(phases["scoring"]) == {"text", "vision", "cross_attention", "head"} and not phases["rollout"]


def test_passes_for_the_other_ranks_are_not_counted(model):
    ledger = flops.Ledger()
    ids = torch.randint(5, 500, (1, 6))
    with ledger.phase("update", model):
        for batch, weight in ledger.paced(lambda batches, spare: [(batches[0], 1.0), (spare, 0.0)])([ids], ids):
            (weight * model(batch, targets=batch).logprobs.sum()).backward()
    once = by_phase(ledger)
    with ledger.phase("update", model):
        model(ids, targets=ids).logprobs.sum().backward()
    assert by_phase(ledger)["update"] == {part: 2 * n for part, n in once["update"].items()}


def update_of(model, critic, train_policy):
    """{part: FLOPs} of an update on one turn of two tokens after four."""
    torch.manual_seed(0)
    actor_critic, ledger = ppo.ActorCritic(model, critic), flops.Ledger()
    ids = torch.randint(5, 500, (1, 6))
    batch = Batch(ids, torch.tensor([6]), torch.where(torch.arange(6) > 3, ids, -100), None)
    turns = ppo.TurnTensors(torch.tensor([0]), torch.tensor([3]), *[None] * 6)
    with ledger.phase("update", actor_critic):
        logprobs, _, values = actor_critic(batch, turns, 1.0)
        (values.sum() + (logprobs.sum() if train_policy else 0)).backward()
    return by_phase(ledger)["update"]


def test_backward_passes_are_those_that_happen(model):
    """Warm-up of the critic alone: where it reads the policy's detached state, the policy has no backward pass; a shared one has, but not its
    head; a separate one has a trunk of its own. The value head: 32-1024-512-1."""
    rate, done = flops.rates(model), {"tokens": 6, "pairs": 21}
    text, head, value = flops.flops(rate, done, 0)["text"], 2 * 2 * 32 * 1024, 2 * (32 * 1024 + 1024 * 512 + 512)
    detached = 3 * value - 2 * 32 * 1024                       # no gradient for what it reads
    assert update_of(model, "detached", False) == {"text": text, "head": head, "critic": detached}
    assert update_of(model, "detached", True) == {"text": 3 * text, "head": 3 * head, "critic": detached}
    assert update_of(model, "shared", False) == {"text": 3 * text, "head": head, "critic": 3 * value}
    assert update_of(model, "separate", False) == {"text": text + 3 * text, "head": head, "critic": 3 * value}
    assert update_of(model, "separate", True) == {"text": 6 * text, "head": 3 * head, "critic": 3 * value}


# ---------------------------------------------------------------------------------------------------------------- whole runs

def run(folder, small, monkeypatch, *argv):
    """One step -> (what it learnt from, the log, the ledger in the checkpoint)."""
    learnt_from = []
    with monkeypatch.context() as patch:
        for module in (sft, ppo):
            patch.setattr(module, "update", lambda model, processor, batch, *rest, update=module.update, **more:
                          (learnt_from.extend(batch), update(model, processor, batch, *rest, **more))[1])
        train.main(quick("--model", small[0], "--steps", 1, "--out", folder, "--eval-hands", 0, *argv))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    record = json.loads((folder / "checkpoints/step_000001/record.json").read_text())
    return learnt_from, lines, record["flops"]


def text_costs(model, rows):
    """{part: FLOPs} of a forward pass over conversations, [(ids, which of them are targets)], by hand: the last id is not passed."""
    layers = [layer for layer in model.layers if hasattr(layer, "self_attn")]
    matrices = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)
    pairs = sum(len(ids) * (len(ids) - 1) // 2 for ids, _ in rows)
    return {"text": sum(2 * matrices * (len(ids) - 1) for ids, _ in rows) + 4 * model.config.hidden_size * len(layers) * pairs,
            "head": 2 * model.lm_head.weight.numel() * sum(sum(sampled[1:]) for _, sampled in rows)}


@pytest.mark.parametrize("algo", ["sft", "ppo"])
def test_what_6nd_says_and_what_is_counted(small, tmp_path, monkeypatch, algo):
    """They differ by what has parameters and does no products (embedding, norms), by the head where no log-prob is asked, by the last token of a
    conversation, which nobody passes, and the other way by attention, which does products without parameters, and by the critic."""
    found, (_, before, step, after), ledger = run(tmp_path / "run", small, monkeypatch, "--task", "gp-l", "--algo", algo,
                                                  "--eval-hands", "3", "--eval-sets", "id")
    assert before["counted_tflops"] == 0 and after["counted_tflops"] == step["counted_tflops"]             # evaluations are free
    conversations = found if algo == "sft" else [c for episode in found for c in episode.conversations]
    forward = text_costs(small[1], rows := [(c.ids, c.sampled) for c in conversations])
    of = lambda phase: {part: n for part, n in ledger[phase].items() if n and part != "critic"}
    assert of("update") == {part: 3 * n for part, n in forward.items()} and of("scoring") == {}
    assert of("rollout") == (forward if algo == "ppo" else {})
    passes = 3 if algo == "sft" else 4                                                        # forward ones' worth
    tokens, head = sum(len(ids) for ids, _ in rows), small[1].lm_head.weight.numel()
    size, weights = count_parameters(small[1], "gp-l"), sum(p.numel() for layer in small[1].layers if hasattr(layer, "self_attn")
                                                                  for p in layer.parameters() if p.ndim == 2)
    idle = 2 * (size - weights - head) * tokens + 2 * head * (tokens - sum(sum(sampled[1:]) for _, sampled in rows)) + 2 * weights * len(rows)
    attention = forward["text"] - 2 * weights * (tokens - len(rows))
    critic = sum(ledger[phase]["critic"] for phase in flops.PHASES)
    assert (critic > 0) == (algo == "ppo")
    assert 1e12 * step["counted_tflops"] == pytest.approx(1e12 * step["tflops"] + passes * (attention - idle) + critic, rel=1e-12)
    assert step["flops"] == {phase: {part: round(n / 1e12, 6) for part, n in parts.items()} for phase, parts in ledger.items()}


def test_a_frozen_encoder_works_once(small, tmp_path, monkeypatch):
    """In the rollout, for all epochs and the critic's own trunk; what its features go through is passed anew."""
    more = ["--task", "gp-vl", "--algo", "ppo", "--epochs", "2", "--minibatches", "1", "--critic", "separate", "--tune"]
    episodes, _, frozen = run(tmp_path / "frozen", small, monkeypatch, *more, "no-vision")
    _, _, whole = run(tmp_path / "whole", small, monkeypatch, *more, "all")
    projector = 2 * small[1].multi_modal_projector.weight.numel() * TILES * PATCHES * len(episodes)
    tower = frozen["rollout"]["vision"] - projector
    assert tower > 0 and frozen["rollout"] == whole["rollout"]
    assert frozen["scoring"]["vision"] == projector
    assert frozen["update"]["vision"] == 2 * 2 * 2 * projector             # epochs, networks, and of each the gradient of its weight alone
    first = 2 * small[1].vision_model.patch_embedding.weight.numel() * TILES * (PATCHES - 1) * len(episodes)
    assert whole["scoring"]["vision"] == tower + projector and whole["update"]["vision"] == 2 * 2 * (3 * (tower + projector) - first)


def test_scoring_is_counted(small, tmp_path, monkeypatch):
    """By the reference policy, without its adapters; and what SFT scores before it learns."""
    for name, argv in {"ppo": ["--algo", "ppo", "--kl-coef", "0.1", "--lora-rank", "2"], "sft": ["--sft-loss", "iw-sft", "--algo", "sft"],
                       "own": ["--sft-loss", "psft", "--algo", "sft", "--sft-data", "own", "--temperature", "1"]}.items():
        found, _, ledger = run(tmp_path / name, small, monkeypatch, "--task", "gp-l", *argv)
        conversations = [c for episode in found for c in episode.conversations] if name == "ppo" else found
        forward = text_costs(small[1], [(c.ids, c.sampled) for c in conversations])
        assert forward == {part: ledger["scoring"][part] for part in forward}
        assert (ledger["rollout"]["text"] > 0) == (name != "sft")
