"""Probes: pass@k, divergences and changed weights against what is counted, enumerated or worked by hand; and
that they disturb nothing."""

import copy
import functools
import itertools
import math

import pytest
import torch
from test_train import equal, in_parts, learnt, on_two_ranks, records, run, weights
from torch.utils._pytree import tree_leaves

from distributed.processes import Processes
from harness.probe import Probe, changed, pass_at
from harness.settings import Args, apply_preset
from rollout import Conversation, Episode, Player, Turn
from variants import lora, reference

SMALL = "--probe-hands 3 --probe-samples 2"


def probe_of(model, processor, start, task="gp-l", **settings):
    settings = {"probe_hands": 2, "probe_samples": 2, "max_new_tokens": 2} | settings
    args = apply_preset(Args(task=task, algo="ppo", preset="tiny", device="cpu", **settings), 32)
    return Probe(args, model, processor, Processes("cpu"), start)


# ------------------------------------------------------------------------------------------------------------
# What is played

def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at(k, n, c) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def episode(hand, answers, success, stop):
    """answers: (tokens, right, ended) of each."""
    conversation = Conversation([9], [False])
    for tokens, right, ended in answers:
        start = len(conversation.ids)
        conversation.append([9] * (tokens - 1) + [stop if ended else 9], sampled=True)
        info = {"correct": right, "recognized": right, "verdict": "judged"}
        conversation.turns.append(Turn(start, start + tokens, 0.0, info))
    return Episode(hand, [conversation], success)


def test_behaviour_by_hand(model, processor):
    """Two hands of two samples, solved 2 and 1 times; 7 answers with 10 tokens. Of the lengths, 4 / 3 and
    6 / 4, the residuals are 4 - 3 * 10 / 7 = -2 / 7 and 2 / 7, and the error is 2 / 7 by 3.5 answers a
    hand."""
    probe = probe_of(model, processor, None)
    make = functools.partial(episode, stop=next(iter(processor.stop_ids)))
    episodes = [make(0, [(1, True, True)], True), make(1, [(2, False, False), (2, False, False)], False),
                make(1, [(1, False, True), (1, True, True)], True),
                make(0, [(1, False, True), (2, True, True)], True)]
    scored = [torch.tensor([[0.0] * n, [entropy] * n], dtype=torch.float64)
              for n, entropy in ((1, 3), (4, 1), (2, 1), (3, 3))]
    found = probe.behaviour(episodes, scored)
    assert found["n"] == 2 and "pass@4" not in found
    expected = {"pass@1": 0.75, "pass@2": 1.0, "length": 10 / 7, "entropy": 18 / 10, "pass@1_se": 0.25,
                "length_se": 4 / 49}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert probe.behaviour(episodes[::-1], scored[::-1]) == found


# ------------------------------------------------------------------------------------------------------------
# Divergence

def exact(p, q, ids, stop):
    """Return (KL(p || q), KL(q || p)) of an answer of at most two tokens after a prompt, and the tokens that
    p and q expect, from all first tokens and all second ones."""
    def distribution(model, rows):
        return model(torch.tensor(rows), logits="last").logits.double().log_softmax(1)

    goes_on = [token for token in range(p.config.vocab_size) if token not in stop]
    some = [[ids + [token] for token in goes_on[i:i + 256]] for i in range(0, len(goes_on), 256)]
    first = [distribution(model, [ids])[0] for model in (p, q)]
    then = [torch.cat([distribution(model, rows) for rows in some]) for model in (p, q)]
    found = []
    for a, b in ((0, 1), (1, 0)):
        chance, inner = first[a].exp(), (then[a].exp() * (then[a] - then[b])).sum(1)
        found.append((chance * (first[a] - first[b])).sum() + (chance[goes_on] * inner).sum())
    return found, [1 + one.exp()[goes_on].sum() for one in first]


def scores_of(model, processor, conversation):
    """Return all log-probs at each sampled token of a conversation, and these tokens."""
    images = processor.images([conversation.image])
    logits = model(torch.tensor([conversation.ids]), images=images, logits="all").logits[0]
    drawn = [i for i, sampled in enumerate(conversation.sampled) if sampled]
    return logits.double().log_softmax(1)[[i - 1 for i in drawn]], torch.tensor(conversation.ids)[drawn, None]


@torch.no_grad()
def test_divergences_of_all_answers_enumerated(model, processor):
    """One answer of at most two tokens, 200 times: forward and reverse, neither of which would pass for the
    other."""
    policy = copy.deepcopy(model)
    start = reference.initial(policy)
    policy.lm_head.weight *= 8.0       # sure of itself: the divergence from it is bounded, that to it is not
    probe = probe_of(policy, processor, start, attempts=1, probe_hands=1, probe_samples=200)
    del probe.sets["rule-ood"]
    play, played = probe.play, []
    probe.play = lambda name: played.append(play(name)) or played[-1]
    result = probe()
    ids = Player(probe.sets["id"](), 0, 0, processor).episode.conversations[0].ids
    expected, tokens = exact(policy, model, ids, processor.stop_ids)
    pairs = {"reverse_kl": (policy, model), "forward_kl": (model, policy)}
    for (name, pair), episodes, kl, length in zip(pairs.items(), played, expected, tokens, strict=True):
        ratios = []
        for one in episodes:
            (p, drawn), (q, _) = (scores_of(net, processor, one.conversations[0]) for net in pair)
            ratios.append((p - q).gather(1, drawn).sum())
        error = torch.stack(ratios).std().item() / math.sqrt(len(ratios))
        assert result[f"{name}_answer"] == pytest.approx(torch.stack(ratios).mean().item(), abs=1e-4)
        assert result[f"{name}_answer"] == pytest.approx(kl.item(), abs=3 * error)
        assert result[name] == pytest.approx((kl / length).item(), abs=3 * error / length.item())
        assert abs(expected[0] - expected[1]) > 6 * error


@torch.no_grad()
@pytest.mark.parametrize("task", ["gp-vl", "virl-l"])
def test_scores_are_those_of_all_logits(model, processor, task):
    """Log-probs and entropies of the sampled tokens, in the order of the episodes, whatever conversations
    share a batch."""
    probe = probe_of(model, processor, None, task, token_budget=300)
    episodes = probe.play("id")
    for episode, found in zip(episodes, probe.score(episodes), strict=True):
        scores, drawn = map(torch.cat, zip(*(scores_of(model, processor, c) for c in episode.conversations)))
        expected = [scores.gather(1, drawn)[:, 0], -(scores.exp() * scores).sum(1)]
        assert torch.allclose(found, torch.stack(expected), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Weights

@torch.no_grad()
def test_changed_weights_by_hand(model):
    """All weights are 1 at first; some of a tensor of each kind are changed, but the head is frozen. Between
    1 and 2 bfloat16 has steps of 2^-7: 1 + 2^-9 is 1 there and 1 + 2^-6 is not."""
    size = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())
    first, crossed, last = model.layers
    sizes = {"embedding": 1032 * 32, "attention": size(first.self_attn, last.self_attn),
             "mlp": size(first.mlp, last.mlp), "cross-attention": size(crossed), "norm": 5 * 32,
             "vision": size(model.vision_model, model.multi_modal_projector), "head": 1024 * 32}
    parts = [model.embed_tokens, last.self_attn.q_proj, first.mlp.down_proj, crossed.mlp.up_proj,
             first.input_layernorm, model.multi_modal_projector]
    for parameter in model.parameters():
        parameter.fill_(1)
    model.lm_head.requires_grad_(False)
    start = reference.initial(model)
    model.embed_tokens.weight[-1, -1] += 2**-9
    other = {"head": 0}
    for count, (name, part) in enumerate(zip(sizes, parts), start=1):
        part.weight.view(-1)[:count] += 2**-6
        other[name] = count
    squares = {name: 2**-12 * count + 2**-18 * (name == "embedding") for name, count in other.items()}
    for numbers in (sizes, other, squares):
        numbers["all"] = sum(numbers.values())
    found = changed(model, start)
    assert found["changed"] == {name: other[name] / n for name, n in sizes.items()}
    assert found["distance"] == pytest.approx({
        name: math.sqrt(squares[name] / n) for name, n in sizes.items()})


@torch.no_grad()
def test_of_adapters_it_is_the_merged_weights_that_count(model):
    again = copy.deepcopy(model)
    lora.adapt(model, "attention", rank=2, alpha=4.0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.normal_(0, 0.1)
    merged, remembered = copy.deepcopy(model), reference.initial(again)
    lora.merge(merged)
    again.load_state_dict(merged.state_dict())
    found = changed(model, functools.partial(lora.disabled, model))
    assert found == {what: pytest.approx(numbers) for what, numbers in changed(again, remembered).items()}
    assert found["changed"]["attention"] > 0.5 and found["changed"]["mlp"] == found["changed"]["head"] == 0.0


# ------------------------------------------------------------------------------------------------------------
# In a run

def probes(folder):
    return [record["probe"] for record in records(folder, "eval")]


@pytest.mark.parametrize("line", ["gp-vl --algo sft", "virl-l --algo ppo", "gp-l --algo ppo --lora-rank 2"])
def test_resumed_equals_uninterrupted(small, tmp_path, line):
    """Bit for bit on CPU: a resumed run still knows how it began, and plays again what that policy played.
    Before training nothing differs, to the bit."""
    whole = in_parts(tmp_path, SMALL, "--model", small[0], "--task", line, stops=(1, 3))
    (first, last), (_, _, resumed) = probes(whole), probes(tmp_path / "parts")
    assert last == resumed
    for name in ("forward_kl", "reverse_kl"):
        assert first[name] == first[f"{name}_se"] == first[f"{name}_answer"] == 0.0 != last[name]
    assert {number for numbers in first["weights"].values() for number in numbers.values()} == {0.0}
    assert 0 < last["weights"]["changed"]["all"] < 1


@pytest.mark.parametrize("algo", ["sft", "sft --sft-loss iw-sft", "ppo"])
def test_a_run_learns_the_same_without_probes(small, tmp_path, algo):
    with_, without = tmp_path / "with", tmp_path / "without"
    for folder, more in ((with_, SMALL), (without, "")):
        run("--task gp-l --lr-schedule constant --lr 1e-3 --steps 2 --model", small[0], more,
            "--out", folder, "--algo", algo)
    assert equal(*(weights(folder / "final") for folder in (with_, without)))
    assert learnt(with_, "step") == learnt(without, "step")    # the training compute, too
    assert not any("probe" in record for record in records(without, "eval"))


@pytest.mark.parametrize("shard, line", [
    ("off", "gp-l --algo ppo"), ("on", "gp-vl --algo ppo --probe-hands 1"), ("on", "gp-vl --algo sft")])
def test_two_ranks_equal_one(small, tmp_path, working_folder, shard, line):
    """Two hands against one, or one against none, and as many passes on either rank; slices of the
    weights."""
    on_two_ranks(tmp_path, working_folder, small[0], SMALL, "--lr 1e-2 --task", line,
                 two=f"--shard {shard} --token-budget 200")
    for one, other in zip(probes(tmp_path / "one"), probes(tmp_path / "two"), strict=True):
        assert tree_leaves(other) == pytest.approx(tree_leaves(one), abs=1e-3)
    assert one["reverse_kl"] > 0.01 and one["weights"]["changed"]["all"] > 0.01
