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
from llama.metrics import error_of_mean, ratio_of_sums
from rollout import rollout


def evaluate(model, processor, args, processes, progress=""):
    """Play every evaluation set and print its rates -> {set: what `summarize` says, and per hand, in lists,
    solved (0 or 1), right and answers (how many)}."""
    results = {}
    for name, factory in evaluation_sets(args).items():
        # no route is walked twice
        seeds = processes.share(range(min(args.eval_hands, factory().distinct)))
        with autocast(args, processes.device), shard.for_rollout(model) as player:
            episodes = rollout(player, processor, factory, seeds, temperature=args.eval_temperature,
                               batch=args.rollout_batch, max_new_tokens=args.max_new_tokens)
        r = summarize(episodes, processes)
        hands = sorted(gather([(e.seed, int(e.success), *right_answers(e)) for e in episodes]))
        results[name] = r | dict(zip(("solved", "right", "answers"), list(zip(*hands))[1:]))
        rates = "   ".join(
            f"{what} {100 * r[key]:5.1f} ± {100 * r[key + '_se']:.1f} %"
            for what, key in (("success", "success"), ("first try", "first"), ("per step", "per_step")))
        landmarks = f" (at landmarks {100 * r['landmarks']:.1f} %)" if "landmarks" in r else ""
        processes.print(
            f"{progress}  {name:<10}  {rates}   {GAMES[args.game].recognition} "
            f"{100 * r['recognized']:5.1f} %{landmarks}   reward {r['reward']:+6.2f}   N {r['n']}")
        del episodes                           # with their pictures, before the next set is played
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


def judged(episode):
    """Return its turns but for those that --compat leaves without a verdict."""
    return [turn for turn in episode.turns if turn.info["verdict"] != "unjudged"]


def right_answers(episode):
    """Return (right answers, all answers) of an episode."""
    return sum(turn.info["correct"] for turn in judged(episode)), len(judged(episode))


def summarize(episodes, processes):
    """Return rates over all episodes of all ranks.

    success: solved, a route with every point right, within the attempts; first: without one wrong answer;
    both with the binomial standard error sqrt(P(1-P)/N). per_step: share of all answers that are right; its
    error counts episodes, not answers, as independent. recognized: share of answers whose cards or
    observation are right (landmarks: of those given at a landmark). reward: mean over episodes of the sum of
    rewards.
    """
    turns = [turn for episode in episodes for turn in judged(episode)]
    right = [right_answers(episode) for episode in episodes]
    p, scores = ratio_of_sums(*torch.tensor(gather(right), dtype=torch.float64).T)

    def sums(width, rows):
        return [sum(column) for column in zip([0.0] * width, *rows)]       # a rank may have no episode

    counts = sums(3, [(1, e.success, e.success and k == m) for e, (k, m) in zip(episodes, right)])
    counts += sums(3, [(1, turn.info["recognized"], turn.reward) for turn in turns])
    counts += sums(2, [(1, turn.info["recognized"]) for turn in turns if turn.info.get("landmark")])
    n, success, first, n_turns, recognized, reward, landmarks, read = processes.total(counts)
    rates = {"per_step": p.item(), "per_step_se": float(error_of_mean(scores)),
             "recognized": recognized / n_turns, "reward": reward / n, "turns": n_turns / n, "n": int(n)}
    for name, share in (("success", success / n), ("first", first / n)):
        rates |= {name: share, f"{name}_se": math.sqrt(share * (1 - share) / n)}
    return rates | ({"landmarks": read / landmarks} if landmarks else {})
