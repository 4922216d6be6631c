"""Play the fixed hands of every evaluation set, and say how often the model was right.

    torchrun train.py --task gp-l --algo eval --model runs/gp-l-ppo/final
"""

import dataclasses
import math
from pathlib import Path

import torch

from distributed import shard
from distributed.processes import gather
from envs import GAMES
from harness.environments import evaluation_sets
from harness.files import to_json, write_atomically
from harness.folder import git_commit
from harness.load import autocast, load
from llama.frozen import remember
from llama.metrics import error_of_mean, ratio_of_sums
from rollout import rollout


def evaluate(model, processor, args, processes, progress=""):
    """Play every evaluation set and print its rates -> {set: what `summarize` says}."""
    results = {}
    for name, factory in evaluation_sets(args).items():
        hands = fixed_hands(args.eval_hands, factory, processes)
        r = results[name] = summarize(
            play(model, processor, args, processes, factory, hands, args.eval_temperature))
        rates = "   ".join(
            f"{what} {100 * r[key]:5.1f} ± {100 * r[key + '_se']:.1f} %"
            for what, key in (("success", "success"), ("first try", "first"), ("per step", "per_step")))
        landmarks = f" (at landmarks {100 * r['landmarks']:.1f} %)" if "landmarks" in r else ""
        processes.print(
            f"{progress}  {name:<10}  {rates}   {GAMES[args.game].recognition} "
            f"{100 * r['recognized']:5.1f} %{landmarks}   reward {r['reward']:+6.2f}   N {r['n']}")
    return results


def evaluate_alone(args, processes, folder):
    """Do --algo eval: print and save the evaluation of the weights in `folder`."""
    model, processor, weights = load(args, processes, folder)
    if args.shard == "on":
        shard.shard(model, weights, processes.device, processes.world)
    results = evaluate(model, processor, args, processes)
    if processes.rank == 0:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        record = {"config": dataclasses.asdict(args), "commit": git_commit(), "hardware": processes.hardware,
                  "eval": results}
        write_atomically(Path(args.out) / "eval.json", to_json(record, indent=2))


def fixed_hands(n, factory, processes):
    """Return this rank's share of n seeds, or of as many as the game has: no route is walked twice."""
    return processes.share(range(min(n, factory().distinct)))


def play(model, processor, args, processes, factory, seeds, temperature, samples=1, features=None):
    """Return a rollout by a model, whole or sharded. features: collects what a frozen encoder makes of
    pictures, see llama/frozen.py."""
    with (autocast(args, processes.device), shard.for_rollout(model) as player, remember(player, features)):
        return rollout(player, processor, factory, seeds, samples=samples, temperature=temperature,
                       batch=args.rollout_batch, max_new_tokens=args.max_new_tokens)


def outcome(episode):
    """Return the numbers of an episode that `summarize` adds up, of all turns but those that --compat leaves
    without a verdict."""
    turns = [turn for turn in episode.turns if turn.info["verdict"] != "unjudged"]
    right, seen = (sum(turn.info[what] for turn in turns) for what in ("correct", "recognized"))
    at_landmarks = [turn.info["recognized"] for turn in turns if turn.info.get("landmark")]
    at_once = episode.success and right == len(turns)
    return (episode.seed, int(episode.success), int(at_once), right, len(turns), seen,
            sum(turn.reward for turn in turns), sum(at_landmarks), len(at_landmarks))


def rate(name, above, below):
    """Return the ratio of two sums over hands as NAME, and its standard error as NAME_se."""
    p, scores = ratio_of_sums(above, below)
    return {name: p.item(), f"{name}_se": float(error_of_mean(scores))}


def summarize(episodes):
    """Return rates over all episodes of all ranks and, hand by hand, solved (0 or 1), right and answers (how
    many).

    success: solved, a route with every point right, within the attempts; first: without one wrong answer;
    both with the binomial standard error sqrt(P(1-P)/N). per_step: share of all answers that are right; its
    error counts episodes, not answers, as independent. recognized: share of answers whose cards or
    observation are right (landmarks: of those given at a landmark). reward: mean over episodes of the sum of
    rewards.
    """
    _, solved, at_once, right, answers, seen, rewards, seen_at_landmarks, landmarks = zip(
        *sorted(gather(list(map(outcome, episodes)))))
    n, turns = len(solved), sum(answers)
    rates = {"recognized": sum(seen) / turns, "reward": sum(rewards) / n, "turns": turns / n, "n": n}
    rates |= rate("per_step", *torch.tensor([right, answers], dtype=torch.float64))
    for name, hits in (("success", solved), ("first", at_once)):
        share = sum(hits) / n
        rates |= {name: share, f"{name}_se": math.sqrt(share * (1 - share) / n)}
    if any(landmarks):
        rates["landmarks"] = sum(seen_at_landmarks) / sum(landmarks)
    return rates | {"solved": solved, "right": right, "answers": answers}
