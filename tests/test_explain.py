"""Probes: pass@k, divergences and changed weights against what is counted, enumerated or worked by hand; and that they disturb nothing."""

import copy
import dataclasses
import functools
import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness.settings import apply_preset
from test_train import command, learnt, records, run, weights
from variants import lora, reference
from distributed.processes import Processes
from harness.environments import evaluation_sets
from harness.probe import Probe, changed, kind, pass_at, rate
from harness.settings import Args
from rollout import Conversation, Episode, Player, Turn

PROBES = ["--probe-hands", 3, "--probe-samples", 2]
LEARN = ["--lr-schedule", "constant", "--lr", "1e-3"]
SMALL = [*LEARN, *PROBES]


def probe_of(model, processor, start, task="gp-l", probe_hands=2, probe_samples=2, **settings):
    settings |= dict(probe_hands=probe_hands, probe_samples=probe_samples, max_new_tokens=2)
    args = apply_preset(Args(task=task, algo="ppo", preset="tiny", device="cpu", **settings), 32)
    return Probe(args, model, processor, Processes("cpu"), start)


# ---------------------------------------------------------------------------------------------------------- what is played

def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at(k, n, c) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_error_of_a_ratio_by_hand():
    """6 / 4 = 1.5; residuals 0.5, 1, -1.5 with variance 3.5 / 2; error sqrt(1.75 * 3) / 4. With all ones below it is that of a mean."""
    found = rate("x", torch.tensor([2.0, 4.0, 0.0]), torch.tensor([1.0, 2.0, 1.0]))
    assert found == {"x": 1.5, "x_se": pytest.approx(math.sqrt(5.25) / 4)}
    found = rate("x", torch.tensor([1.0, 3.0]), torch.ones(2))
    assert found == {"x": 2.0, "x_se": pytest.approx(math.sqrt(2 / 2))}
    assert math.isnan(rate("x", torch.ones(1), torch.ones(1))["x_se"])


def episode(hand, answers, success, stop):
    """answers: (tokens, right, ended) of each."""
    ids, turns = [9], []
    for tokens, right, ended in answers:
        turns.append(Turn(0, len(ids), len(ids) + tokens, 0.0, {"correct": right, "verdict": "judged"}))
        ids += [9] * (tokens - 1) + [stop if ended else 9]
    conversation = Conversation(ids, [i > 0 for i in range(len(ids))])
    return Episode(hand, [conversation], turns, success)


def test_behaviour_by_hand(model, processor):
    """Two hands of two samples: solved 2 and 1 times, 1 and 0 of them at once; of 7 answers with 10 tokens 2 end at two tokens without an end."""
    probe = probe_of(model, processor, None, probe_samples=2)
    make = functools.partial(episode, stop=next(iter(processor.stop_ids)))
    episodes = [make(0, [(1, True, True)], True), make(1, [(2, False, False), (2, False, False)], False),
                make(1, [(1, False, True), (1, True, True)], True), make(0, [(1, False, True), (2, True, True)], True)]
    scored = [torch.stack([torch.zeros(n), torch.full((n,), float(h))]).double() for n, h in ((1, 3), (4, 1), (2, 1), (3, 3))]
    found = probe.behaviour(episodes, scored)
    assert found["solved"] == [2, 1] and found["first"] == [1, 0] and found["n"] == 2 and "pass@4" not in found
    expected = {"pass@1": 0.75, "pass@2": 1.0, "first@1": 0.25, "first@2": 0.5, "length": 10 / 7, "cut": 2 / 7, "entropy": 18 / 10}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["pass@1_se"] == found["first@1_se"] == pytest.approx(0.25)
    assert probe.behaviour(episodes[::-1], scored[::-1]) == found


# ---------------------------------------------------------------------------------------------------------- divergence

@pytest.mark.parametrize("task", ["gp-l", "gp-vl"])
def test_before_training_nothing_differs(model, processor, task):
    """To the bit: both sides are scored the same way."""
    result = probe_of(model, processor, reference.initial(model), task, probe_hands=2, probe_samples=2)()
    for name in ("reverse_kl", "forward_kl"):
        assert result[name] == result[f"{name}_se"] == result[f"{name}_answer"] == 0.0
        assert result[f"{name}_hands"]["log_ratio"] == [0.0, 0.0] and min(result[f"{name}_hands"]["tokens"]) > 0
    for numbers in result["weights"].values():
        assert set(numbers.values()) == {0.0}


def exact(p, q, ids, stop):
    """(KL(p || q), KL(q || p)) of an answer of at most two tokens after a prompt, and the tokens that p and q expect, from all first tokens and
    all second ones."""
    distribution = lambda model, rows: torch.log_softmax(model(torch.tensor(rows), logits="last").logits.double(), 1)
    goes_on = [token for token in range(p.config.vocab_size) if token not in stop]
    some = [[ids + [token] for token in goes_on[i:i + 256]] for i in range(0, len(goes_on), 256)]
    first, then = zip(*[(distribution(model, [ids])[0], torch.cat([distribution(model, rows) for rows in some])) for model in (p, q)])
    found = []
    for a, b in ((0, 1), (1, 0)):
        chance, inner = first[a].exp(), (then[a].exp() * (then[a] - then[b])).sum(1)
        found.append((chance * (first[a] - first[b])).sum() + (chance[goes_on] * inner).sum())
    return found, [1 + one.exp()[goes_on].sum() for one in first]


@torch.no_grad()
def test_divergences_of_all_answers_enumerated(model, processor):
    """One answer of at most two tokens, 200 times: forward and reverse, neither of which would pass for the other."""
    policy = copy.deepcopy(model)
    start = reference.initial(policy)
    policy.lm_head.weight *= 8.0               # sure of itself: the divergence from it is bounded, that to it is not
    probe = probe_of(policy, processor, start, attempts=1, probe_hands=1, probe_samples=200)
    del probe.sets["rule-ood"]
    play, played = probe.play, []
    probe.play = lambda factory: played.append(play(factory)) or played[-1]
    result = probe()
    ids = Player(probe.sets["id"](), 0, 0, processor).episode.conversations[0].ids
    expected, tokens = exact(policy, model, ids, processor.stop_ids)
    for name, p, q, episodes, kl, length in zip(("reverse_kl", "forward_kl"), (policy, model), (model, policy), played, expected, tokens,
                                                strict=True):
        ratios = torch.tensor([sum(log_ratios(p, q, episode)) for episode in episodes])
        error = ratios.std().item() / math.sqrt(len(ratios))
        assert result[f"{name}_answer"] == pytest.approx(ratios.mean().item(), abs=1e-4)
        assert result[f"{name}_answer"] == pytest.approx(kl.item(), abs=3 * error)
        assert result[name] == pytest.approx((kl / length).item(), abs=3 * error / length.item())
        assert abs(expected[0] - expected[1]) > 6 * error


def log_ratios(p, q, episode):
    """log p - log q of each sampled token, from all logits."""
    ids = torch.tensor([episode.conversations[0].ids])
    scores = [torch.log_softmax(model(ids, logits="all").logits[0], 1) for model in (p, q)]
    return [(scores[0][i - 1, ids[0, i]] - scores[1][i - 1, ids[0, i]]).item() for turn in episode.turns for i in range(turn.start, turn.end)]


@torch.no_grad()
@pytest.mark.parametrize("task", ["gp-vl", "virl-l"])
def test_scores_are_those_of_all_logits(model, processor, task):
    """Log-probs and entropies of the sampled tokens, in the order of the episodes, whatever conversations share a batch."""
    probe = probe_of(model, processor, None, task, probe_hands=2, probe_samples=2, token_budget=300)
    episodes = probe.play(probe.sets["id"])
    for episode, (logprobs, entropy) in zip(episodes, probe.score("id", episodes), strict=True):
        expected = []
        for c in episode.conversations:
            ids, images = torch.tensor([c.ids]), processor.images([c.image])
            scores = torch.log_softmax(model(ids, images=images, logits="all").logits[0].double(), 1)
            expected += [(scores[i - 1, c.ids[i]], -(scores[i - 1].exp() * scores[i - 1]).sum()) for i in range(len(c.ids)) if c.sampled[i]]
        assert torch.allclose(torch.stack([logprobs, entropy], 1), torch.tensor(expected, dtype=torch.float64), atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- weights

class Toy(nn.Module):
    """Ten weights, all 1: four of the embedding, two each of an MLP, of a cross-attention layer and of the head."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(cross_attention_layers=[1])
        self.embed_tokens = nn.Embedding(2, 2)
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(2, 1, bias=False)}) for _ in range(2)])
        self.lm_head = nn.Linear(2, 1, bias=False)
        for parameter in self.parameters():
            nn.init.ones_(parameter)


@torch.no_grad()
def test_changed_weights_by_hand():
    """Between 1 and 2 bfloat16 has steps of 2^-7: 1 + 2^-9 is 1 there and 1 + 2^-6 is not."""
    toy = Toy()
    toy.lm_head.requires_grad_(False)
    start = reference.initial(toy)
    toy.embed_tokens.weight[0, 0] += 2**-9
    toy.embed_tokens.weight[1] += 2**-6
    toy.layers[1]["mlp"].weight[0, 0] -= 1
    found, small, large = changed(toy, start), 2**-9, 2**-6
    assert found["changed"] == {"all": 0.3, "embedding": 0.5, "mlp": 0.0, "cross-attention": 0.5, "head": 0.0}
    assert found["distance"] == pytest.approx({"all": math.sqrt((small**2 + 2 * large**2 + 1) / 10),
                                               "embedding": math.sqrt((small**2 + 2 * large**2) / 4),
                                               "mlp": 0.0, "cross-attention": math.sqrt(1 / 2), "head": 0.0})


def test_every_weight_is_of_a_kind(model):
    counts = {}
    for name, parameter in model.named_parameters():
        what = kind(name, model.config)
        counts[what] = counts.get(what, 0) + parameter.numel()
    plain = {kind: sum(p.numel() for layer in (0, 2) for p in getattr(model.layers[layer], part).parameters())
             for kind, part in (("attention", "self_attn"), ("mlp", "mlp"))}
    assert counts == plain | {"cross-attention": sum(p.numel() for p in model.layers[1].parameters()), "norm": 5 * 32, "embedding": 1032 * 32,
                              "head": 1024 * 32,
                               "vision": sum(p.numel() for part in (model.vision_model, model.multi_modal_projector) for p in part.parameters())}


@torch.no_grad()
def test_of_adapters_it_is_the_merged_weights_that_count(model):
    before = copy.deepcopy(model)
    lora.adapt(model, "attention", rank=2, alpha=4.0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.normal_(0, 0.1)
    start, merged = functools.partial(lora.disabled, model), copy.deepcopy(model)
    lora.merge(merged)
    again = copy.deepcopy(before)
    remembered = reference.initial(again)
    again.load_state_dict(merged.state_dict())
    found = changed(model, start)
    assert found == {what: pytest.approx(numbers) for what, numbers in changed(again, remembered).items()}
    assert found["changed"]["attention"] > 0.5 and found["changed"]["mlp"] == found["changed"]["head"] == 0.0


# ---------------------------------------------------------------------------------------------------------- in a run

def probes(folder):
    return [record["probe"] for record in records(folder, "eval")]


@pytest.mark.parametrize("task, algo, more", [("gp-vl", "sft", []), ("virl-l", "ppo", []), ("gp-l", "ppo", ["--lora-rank", 2])])
def test_resumed_equals_uninterrupted(small, tmp_path, task, algo, more):
    """Bit for bit on CPU: a resumed run still knows how it began, and plays again what that policy played."""
    common = ["--task", task, "--algo", algo, "--model", small[0], *SMALL, *more]
    run(*common, "--steps", 3, "--out", tmp_path / "whole")
    run(*common, "--steps", 1, "--out", tmp_path / "parts")
    run("--steps", 3, "--out", tmp_path / "parts", "--resume", "--override")
    (first, last), (_, _, resumed) = probes(tmp_path / "whole"), probes(tmp_path / "parts")
    assert last == resumed
    assert abs(first["forward_kl"]) < 1e-6 < min(abs(last["forward_kl"]), abs(last["reverse_kl"]))
    assert first["weights"]["changed"]["all"] == 0 < last["weights"]["changed"]["all"] < 1


@pytest.mark.parametrize("algo, more", [("sft", []), ("sft", ["--sft-loss", "iw-sft"]), ("ppo", [])])
def test_a_run_learns_the_same_without_probes(small, tmp_path, algo, more):
    for hands in (3, 0):
        probes = PROBES if hands else ["--probe-hands", 0]
        run("--task", "gp-l", "--algo", algo, "--model", small[0], *LEARN, *probes, *more, "--steps", 2,
            "--out", tmp_path / str(hands))
    a, b = weights(tmp_path / "3/final"), weights(tmp_path / "0/final")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert learnt(tmp_path / "3", "step") == learnt(tmp_path / "0", "step")             # the training compute, too
    assert not any("probe" in record for record in records(tmp_path / "0", "eval"))


def flat(result):
    """Nested dicts and lists of numbers -> {path: number}."""
    if not isinstance(result, (dict, list)):
        return {"": result}
    items = result.items() if isinstance(result, dict) else enumerate(result)
    return {f"{key}/{path}": number for key, value in items for path, number in flat(value).items()}


@pytest.mark.parametrize("task, algo, shard, more", [("gp-l", "ppo", "off", []), ("gp-vl", "ppo", "on", ["--probe-hands", 1]),
                                                     ("gp-vl", "sft", "on", [])])
def test_two_ranks_equal_one(small, tmp_path, working_folder, task, algo, shard, more):
    """Two hands against one, or one against none, and as many passes on either rank; slices of the weights."""
    common = ["--task", task, "--algo", algo, "--model", small[0], "--steps", 2, *SMALL, "--adam-eps", "1e-3", "--minibatches", 1, "--lr", "1e-2"]
    run(*common, *more, "--out", tmp_path / "one")
    two = command(*common, *more, "--out", tmp_path / "two", "--shard", shard, "--token-budget", 200, cwd=working_folder,
                  launcher=(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output
    for one, other in zip(probes(tmp_path / "one"), probes(tmp_path / "two"), strict=True):
        assert flat(other) == pytest.approx(flat(one), abs=1e-3, nan_ok=True)
    assert one["reverse_kl"] > 0.01 and one["weights"]["changed"]["all"] > 0.01
