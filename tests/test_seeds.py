"""Seeds: no two streams meet, and every seed is as good as another. JSON that any reader takes."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rollout
import sft
import train
from envs import GeneralPoints, Navigation
from games.seeds import TRAINING, derive
from harness.files import append_line, to_json
from llama.generate import draw_uniform
from study import records as study
from test_train import records, run

SEEDS = [0, 1, 2**32, 20240601, 2**62, 2**63 - 1]               # of runs


# ------------------------------------------------------------------------------------------------------------
# Seeds

def test_derived_numbers_are_63_bits_of_all_keys():
    words, episodes, turns = ("draws", "dialogue"), range(3000), range(10)
    keys = [(word, episode, turn) for word in words for episode in episodes for turn in turns]
    keys += [(1, 23), (12, 3), (123,), (3, 12), ("",), (), *[("hands", seed) for seed in SEEDS]]
    found = [derive(*key) for key in keys]
    assert len(set(found)) == len(found) and 2**62 < max(found) < 2**63
    assert derive("draws", np.int64(7)) == derive("draws", 7)


def seeds_of(seed, step, n):
    return train.Trainer.seeds(SimpleNamespace(args=SimpleNamespace(seed=seed)), step, n)


@pytest.mark.parametrize("n", [1, 64, 10**6])
def test_no_run_deals_another_runs_hands_or_those_of_evaluation(n):
    """A step's seeds follow those of the step before; those of a run of 10,000 steps are one stretch of
    63-bit numbers."""
    stretches = []
    for seed in SEEDS:
        assert seeds_of(seed, 0, n).stop == seeds_of(seed, 1, n).start and len(seeds_of(seed, 3, n)) == n
        stretches.append((seeds_of(seed, 0, n).start, seeds_of(seed, 9_999, n).stop))
    ends = [0, GeneralPoints.distinct] + [end for stretch in sorted(stretches) for end in stretch] + [2**63]
    assert ends == sorted(ends) and GeneralPoints.distinct < TRAINING <= ends[2]


def test_a_run_walks_all_routes_equally_often():
    routes = Navigation().distinct
    walked = Counter(seed % routes for step in range(routes) for seed in seeds_of(20240601, step, 16))
    assert set(walked.values()) == {16} and len(walked) == routes


def test_what_is_drawn_depends_on_all_bits_of_a_seed():
    """torch's generator on the CPU takes 5 and 5 + 2**32 for the same."""
    seeds = [5, 5 + 2**32, 5 + 2**62, 0, 2**63 - 1]
    rows = draw_uniform(seeds, len(seeds), 48)
    assert rows.shape == (5, 48) and rows.dtype == torch.float32 and 0 <= rows.min() and rows.max() < 1
    assert len(set(map(tuple, rows.tolist()))) == len(seeds)
    assert torch.equal(rows, draw_uniform(seeds, len(seeds), 48))


def test_every_answer_has_draws_of_its_own(small, tmp_path, monkeypatch):
    """Of two steps of PPO with their evaluations, at the largest seed and at seed 0."""
    draws, generate = {}, rollout.generate
    for seed in (0, 2**63 - 1):
        def spy(*args, temperature, seeds, **kwargs):
            draws.setdefault((seed, temperature), []).extend(seeds)
            return generate(*args, temperature=temperature, seeds=seeds, **kwargs)

        monkeypatch.setattr("rollout.generate", spy)
        run("--algo", "ppo", "--model", small[0], "--seed", seed, "--steps", 2, "--samples", 2,
            "--max-new-tokens", 2, "--temperature", 0.7, "--eval-sets", "id",
            "--out", tmp_path / str(seed))
    first, second = draws[0, 0.7], draws[2**63 - 1, 0.7]
    assert len(set(first + second)) == len(first + second) >= 2 * 2 * 8
    assert draws[0, 0.2] == draws[2**63 - 1, 0.2]              # of evaluation: the same for every run
    assert not set(first + second) & set(draws[0, 0.2])


def test_the_mixture_tells_nothing_of_the_deal(processor):
    """A choice by the generator of the first card would deal one half of the mixture spades first, the other
    diamonds."""
    mixture, first = [(GeneralPoints(look="all", rule=rule), 0.5) for rule in ("10", "9")], [[], []]
    for which, (env, _) in enumerate(mixture):
        def deal(seed, mistakes, which=which, env=env):
            first[which].append(env.reset(seed)[1]["suits"][0] in ("spades", "clubs"))
            return [{"role": "assistant", "content": "x"}]
        env.demonstrate = deal
    sft.make_batch(processor, mixture, range(2000), mistakes=0)
    assert abs(len(first[0]) - 1000) < 4 * 2000**0.5 / 2
    difference = np.mean(first[0]) - np.mean(first[1])
    assert abs(difference) < 4 * 2000**-0.5            # four standard errors


@pytest.mark.parametrize("algo, more", [
    ("sft", []), ("sft", ["--sft-data", "own"]), ("ppo", ["--minibatches", 2]), ("ppo", ["--lora-rank", 1])])
def test_the_smallest_and_the_largest_seed_work(small, tmp_path, algo, more):
    """The evaluation before the first step is the same."""
    hands = {}
    for seed in (0, 20240601, 2**63 - 1):
        out = tmp_path / str(seed)
        run("--task", "virl-l", "--algo", algo, "--model", small[0], "--seed", seed, "--steps", 1,
            "--eval-hands", 2, "--eval-sets", "id", "--max-new-tokens", 2, "--out", out, *more)
        hands[seed] = records(out, "eval")[0]["eval"]
    assert hands[0] == hands[20240601] == hands[2**63 - 1] and hands[0]["id"]["n"] == 2


# ------------------------------------------------------------------------------------------------------------
# JSON

@pytest.mark.parametrize("record, text", [
    ({"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": {"d": (math.nan, 2)}},
     '{"a": null, "b": [null, null, 1.5], "c": {"d": [null, 2]}}'),
    ([np.float64("nan"), True, None, "NaN", 2**63], '[null, true, null, "NaN", 9223372036854775808]'),
    (math.nan, "null"), ({}, "{}"), ((), "[]")])
def test_json_knows_no_nan(record, text):
    assert to_json(record) == text
    assert json.loads(to_json(record, indent=2)) == json.loads(text)


def test_all_that_a_run_writes_is_strict(small, tmp_path):
    """Explained variance without a critic and errors over one hand are null in every file, and read as
    such."""
    out = tmp_path / "run"
    run("--algo", "ppo", "--model", small[0], "--steps", 1, "--advantage", "monte-carlo", "--samples", 2,
        "--eval-hands", 1, "--eval-sets", "id", "--out", out)
    assert records(out, "step")[0]["explained_variance"] is None
    assert records(out, "eval")[0]["eval"]["id"]["per_step_se"] is None
    append_line(tmp_path / "a.jsonl", study.of_run("a", out))
    for file in [tmp_path / "a.jsonl", *out.rglob("*.json"), out / "log.jsonl"]:
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=pytest.fail)
