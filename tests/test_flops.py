"""FLOPs: of products by PyTorch's own counter, of pairs by the masks, and of whole steps by what is
called."""

import json
from collections import Counter
from unittest import mock

import pytest
import torch
from test_train import quick
from torch.utils.flop_counter import FlopCounterMode

import ppo
import train
from harness import flops
from harness.load import count_parameters
from kernels.visible import dense_mask
from llama.cache import KVCache
from llama.frozen import remember
from llama.images import Images
from model import Llama
from study import plan
from variants import lora
from variants.tune import TUNE, freeze, is_tuned

PATCHES, PADDED, TILES = 17, 24, 4     # of a tile of 56 pixels, with and without padding; tiles of an image
REAL = [3, 1]                          # tiles of the two images of `show` that are no padding


def show(rows=(0, 2)):
    """Make two images with 3 and 1 real tiles."""
    real = torch.arange(TILES) < torch.tensor(REAL)[:, None]
    return Images([*torch.randn(2, TILES, 3, 56, 56)], torch.tensor([3, 1]), real.long(), torch.tensor(rows))


def ids_of(model, rows, length, images=None):
    """Draw ids; rows with an image have it as their second token."""
    ids = torch.randint(5, 500, (rows, length))
    if images is not None:
        ids[images.rows, 1] = model.config.image_token_id
    return ids


# ------------------------------------------------------------------------------------------------------------
# Products, by PyTorch's counter

def open_attention(q, k, v, visible=None):
    """Compute attention in plain products, of all pairs: PyTorch's counter sees no masks."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[1], 1) for x in (k, v))
    return ((q.transpose(1, 2) @ k.mT).softmax(-1) @ v).transpose(1, 2)


def plain_logprobs(hidden, weight, targets, temperature):
    asked = (targets >= 0).nonzero()[:, 0]
    logprobs = (hidden[asked] @ weight.T).log_softmax(-1)
    both = logprobs[:, 0], (logprobs.exp() * logprobs).sum(-1)
    return [x.new_zeros(len(targets)).index_copy(0, asked, x) for x in both]


def opened(done, tokens, images):
    """Return the same with every pair of two rows of tokens, those before an image among them."""
    every = {"pairs": 2 * tokens**2, "vision pairs": images * (TILES * PADDED) ** 2,
             "looks": images * tokens, "glances": images * tokens * TILES * PATCHES}
    return done | {name: number for name, number in every.items() if name in done}


ADAPTERS = {tune: ["", "all"] for tune in TUNE} | {
    "all": ["", "all", "q_proj", "k_proj,down_proj"], "attention": ["", "q_proj"]}


SEEN = {tune: ["pixels"] + ["nothing"] * (tune != "vision") +
        ["features"] * (not is_tuned(tune, "vision_model.")) for tune in TUNE}


@pytest.mark.parametrize("tune, seen, adapters", [
    (tune, seen, names) for tune in TUNE for seen in SEEN[tune] for names in ADAPTERS[tune]])
def test_products_are_those_that_pytorch_counts(model, tune, seen, adapters):
    """Exactly, forward and backward, whatever learns and whether the image is given as pixels or as features.
    So backward is autograd's: of frozen weights without what they need not."""
    freeze(model, tune)
    if adapters:
        lora.adapt(model, adapters, rank=4, alpha=8)
    images, image, features = None, {}, None
    if seen != "nothing":
        images, image = show((0, 1)), {"before": 1, "encode": seen == "pixels"}
    if seen == "features":
        features = {pixels: torch.randn(TILES * PATCHES, 32) for pixels in images.pixel_values}
    ids = ids_of(model, 2, 9, images)
    targets = torch.where(torch.arange(9) > 4, ids % 500, -100)
    each = [flops.quantities(model.config, 9, 4, tiles if image else 0, **image) for tiles in REAL]
    done, rate = opened(sum(each, Counter()), 9, 2), flops.rates(model)
    with (mock.patch("model.attention", open_attention), mock.patch("model.token_logprobs", plain_logprobs),
          remember(model, features), FlopCounterMode(display=False) as counter):
        out = model(ids, images=images, targets=targets)
        forward = counter.get_total_flops()
        (out.logprobs + out.entropy).sum().backward()
    assert forward == flops.cost(rate, done)
    assert counter.get_total_flops() - forward == flops.cost(rate, done, 0, 1)


def test_the_11b_model_costs_what_its_operators_sum_up_to(monkeypatch):
    """On the meta device, with an image of four tiles. And the README's shares of 6 N D."""
    config, T, answers = plan.LLAMA_11B, 32, 8
    with torch.device("meta"):
        llama = Llama(config)
    done, rate = flops.quantities(config, T, answers, 4, 1), flops.rates(llama)
    every_pair = done | {"pairs": T * T, "vision pairs": done["vision tokens"] ** 2,
                         "looks": T, "glances": T * done["features"]}
    monkeypatch.setattr(plan, "STAND_INS", plan.STAND_INS[:1])         # log-probs alone
    with plan.Bytes(), plan.as_kernels(), FlopCounterMode(display=False) as counter:
        plan.micro_loss(llama, plan.blank_batch(config, 1, T, answers, image=True)).backward()
    assert counter.get_total_flops() == flops.cost(rate, every_pair, 1, 1)
    for task, tiles, share in (("gp-l", 0, "0.89"), ("gp-vl", 4, "2.69")):
        forward = flops.cost(rate, flops.quantities(config, 512, 128, tiles, 1))
        assert f"{forward / (2 * count_parameters(llama, task) * 512):.2f}" == share


def test_adapters_that_are_off_cost_nothing(model):
    whole = flops.rates(model)
    lora.adapt(model, "q_proj", rank=4, alpha=8)       # two self-attention layers, 32 channels in and out
    assert flops.rates(model)["tokens"][0] - whole["tokens"][0] == 2 * 4 * (32 + 32) * 2
    assert flops.reference(model)["tokens"][0] == whole["tokens"][0]


# ------------------------------------------------------------------------------------------------------------
# Pairs, by the masks

def watch(found, lengths, before):
    """Make an attention that computes nothing and adds up what its masks leave open to tokens that are no
    padding. before: tokens of a row before its image; their glances do not count."""
    def attention(q, k, v, visible):
        B, T, S = *q.shape[:2], k.shape[2]             # the tower has two heads, the text four
        kind = "vision pairs" if q.shape[2] == 2 else "pairs" if visible.causal else "glances"
        mask = dense_mask(visible, q, S, 1)
        seen = torch.ones(B, T, S) if mask is None else (mask[:, 0] == 0).expand(B, T, S)
        real = {"pairs": lengths, "glances": lengths[:1] + lengths[2:3], "vision pairs": [S, S]}[kind]
        start = before if kind == "glances" else 0
        asked = (torch.arange(T) < torch.tensor(real)[:, None]) & (torch.arange(T) >= start)
        found[kind] += int((seen * asked[:, :, None]).sum())
        return q
    return attention


def test_pairs_are_what_the_masks_leave_open(model):
    """Rows of different lengths, one of them without an image, in a prompt, a second turn and a token of the
    first rows alone. The small model has two layers of self-attention and two in its tower."""
    cache, images, found = KVCache(model.config, 3), show(), Counter()
    for lengths, given in (([7, 4, 5], {"images": images}), ([2, 3, 1], {}), ([1, 1], {})):
        ids = ids_of(model, len(lengths), max(lengths), given.get("images"))
        with mock.patch("model.attention", watch(found, lengths, len(given))), torch.no_grad():
            model(ids, logits="last", cache=cache.first(len(lengths)) if len(lengths) < 3 else cache,
                  lengths=torch.tensor(lengths) if max(lengths) > 1 else None, **given)
    rows = [(10, 3), (8, 0), (6, 1)]                   # tokens in all, real tiles
    done = sum((flops.quantities(model.config, n, 0, tiles, 1) for n, tiles in rows), Counter())
    assert found == {"pairs": 2 * done["pairs"], "glances": done["glances"],
                     "vision pairs": 2 * done["vision pairs"]}


# ------------------------------------------------------------------------------------------------------------
# Whole steps, by what is called

class Witness:
    """Adds up FLOPs as they happen: from what each network is given when it is called, and, as autograd
    decides whether there is a backward pass, when the gradient of its result arrives."""

    def __init__(self, patch):
        self.spent, self.phase = dict.fromkeys(flops.PHASES, 0), None
        for owner, name, phase, note in (
                (train.Trainer, "play", "rollout", None), (train.Trainer, "update", "update", None),
                (Llama, "forward", None, self.passed), (ppo.ActorCritic, "head", None, self.valued)):
            patch.setattr(owner, name, self.watched(getattr(owner, name), phase, note))

    def watched(self, function, phase, note):
        """Make a function whose calls are of a phase, or noted if they are within one."""
        def watched(*args, **kwargs):
            outer, self.phase = self.phase, phase or self.phase
            result = function(*args, **kwargs)
            if note and self.phase:
                note(result, *args, **kwargs)
            self.phase = outer
            return result

        return watched

    def add(self, rate, done, result):
        scoring = self.phase == "update" and not torch.is_grad_enabled()
        self.spend("scoring" if scoring else self.phase, flops.cost(rate, done))
        if result is not None and result.requires_grad:
            result.register_hook(lambda gradient: self.spend("update", flops.cost(rate, done, 0, 1)))

    def spend(self, phase, number):
        self.spent[phase] += number

    def passed(self, output, llama, input_ids, *, lengths=None, images=None, trees=None, cache=None,
               targets=None, logits=None, **_):
        rate, (B, T) = flops.rates(llama), input_ids.shape
        new = torch.full((B,), T) if lengths is None else lengths
        past = 0 if cache is None else cache.lengths - new
        done = {"tokens": new.sum(), "pairs": (new * past + new * (new + 1) // 2).sum()}
        for stem, branches in trees or []:                     # no branch sees those before it
            done["pairs"] -= sum(n * sum(branches[:i]) for i, n in enumerate(branches))
        if images is not None:
            N, S, look = len(images.rows), TILES * PADDED, new[images.rows]
            look = look - (input_ids[images.rows] == llama.config.image_token_id).int().argmax(1)
            real = PATCHES * images.aspect_ratio_mask.sum(1)
            done |= {"features": N * TILES * PATCHES, "image keys": N * TILES * PATCHES,
                     "looks": look.sum(), "glances": (look * real).sum()}
            known = "forward" in vars(llama.vision_model)      # llama/frozen.py remembers
            if self.phase == "rollout" or not known:
                done |= {"patches": N * TILES * (PATCHES - 1), "vision tokens": N * S,
                         "vision pairs": (2 * real * S - real**2).sum()}
        elif cache is not None and cache.has_image.any():
            look, mask = new[cache.has_image], cache.cross_mask
            real = cache.cross[0].shape[3] if mask is None else mask.sum(1)[cache.has_image]
            done |= {"looks": look.sum(), "glances": (look * real).sum()}
        self.add(rate, {name: int(number) for name, number in done.items()}, output.hidden)
        asked = B if logits == "last" else int((targets >= 0).sum()) if targets is not None else 0
        self.add(rate, {"targets": asked}, output.logprobs)

    def valued(self, values, actor_critic, hidden):
        critic = actor_critic.trunk or actor_critic.policy
        rate = flops.rates(critic, actor_critic.value_head, detached=not hidden.requires_grad)
        self.add(rate, {"values": len(values)}, values)


ALGOS = {"ppo": "--hands 3 --samples 2 --minibatches 2", "sft": "--batch-size 4"}
STEPS = """
    gp-l   ppo
    gp-vl  ppo
    virl-l ppo --advantage grpo --epochs 2
    gp-l   ppo --advantage gae-token --unit token
    gp-l   ppo --critic shared
    gp-vl  ppo --critic separate
    gp-vl  ppo --critic separate --epochs 2 --tune no-vision
    gp-vl  ppo --critic shared --tune vision
    gp-vl  ppo --critic separate --advantage gae-two-level --unit token
    gp-l   ppo --kl-coef 0.1 --lora-rank 2
    gp-l   ppo --kl-coef 0.1 --tune attention --rescore on
    gp-l   sft
    virl-l sft --mistakes 1
    gp-vl  sft --sft-loss iw-sft --tune no-vision
    gp-vl  sft --sft-loss iw-sft --lora-rank 2
    gp-l   sft --sft-loss psft --epochs 2 --minibatches 2
    gp-l   sft --sft-loss psft --sft-data own --temperature 1
"""


@pytest.mark.parametrize("line", STEPS.strip().splitlines(), ids=str.split)
def test_what_is_counted_afterwards_is_what_was_done(small, tmp_path, monkeypatch, line):
    task, algo, *more = line.split()
    witness = Witness(monkeypatch)
    train.main(quick("--task", task, "--algo", algo, "--model", small[0], "--out", tmp_path, "--steps", 1,
                     "--eval-hands", 2, "--eval-sets", "id", *ALGOS[algo].split(), *more))
    before, *steps, after = (line for line in map(json.loads, open(tmp_path / "log.jsonl", encoding="utf-8"))
                             if line["event"] != "start")
    total = witness.spent
    record = json.loads(max(tmp_path.glob("checkpoints/*/record.json")).read_text(encoding="utf-8"))
    assert record["flops"] == total
    assert steps[-1]["flops"] == {phase: round(n / 1e12, 6) for phase, n in total.items()}
    sum_ = sum(total.values())
    assert before["counted_tflops"] == 0 and 1e12 * after["counted_tflops"] == pytest.approx(sum_, rel=1e-12)
