"""Store each run as a line of JSON; compute the standard error of a rate over
seeds that play the same hands."""

import json
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from harness.files import read_lines
from llama.metrics import ratio_of_sums

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
OF_EACH = ("solved", "right", "answers")               # what an evaluation tells of each hand
OF_ALL = ("config", "commit", "hardware")
KEPT = ("step", "tflops", "counted_tflops", "eval")        # of a log's line of an evaluation


def read(folder):
    """Return records by name, from all files of a folder; none if it is not there."""
    return {record["name"]: record for file in sorted(Path(folder).glob("*.jsonl"))
            for record in read_lines(file, {"name": str, "curve": list})}


@contextmanager
def understood(file):
    """Refuse a file, or a folder, that turns out to hold something else than a run that has ended."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not of a run that has ended, or a log of another version "
                         f"({type(error).__name__}: {error}); leave the run out, or make it anew in another "
                         "folder") from None


def of_run(name, folder):
    """Return the record of a run that has ended: how it was called and what it ran on, its evaluations in
    order (an evaluation alone has one, after 0 steps and FLOPs), what it took."""
    alone, took = Path(folder) / "eval.json", {}
    with understood(folder):
        if alone.exists():
            start = json.loads(alone.read_bytes())
            points = [{"step": 0, "eval": start["eval"]}]
        else:
            lines = defaultdict(list)
            for line in read_lines(Path(folder) / "log.jsonl", {"event": str}):
                lines[line["event"]].append(line)
            start, points, steps = lines["start"][0], lines["eval"], lines["step"]
            took = {key: steps[-1][key] for key in ("tflops", "counted_tflops", "flops")}
            took |= {"seconds": sum(step["seconds"] for step in steps),
                     "memory_gb": max(step["memory_gb"] for step in steps)}
        curve = [{key: point[key] for key in KEPT if key in point} |
                 {"eval": {name: pack(results) for name, results in point["eval"].items()}}
                 for point in points]
        return {"name": name, **{key: start[key] for key in OF_ALL}, **took, "curve": curve}


def pack(results):
    """Write the numbers of all hands as one string, a character each, where all are below 36."""
    return results | {key: "".join(DIGITS[n] for n in results[key])
                      for key in OF_EACH if max(results[key]) < 36}


def unpack(numbers):
    return [int(digit, 36) for digit in numbers] if isinstance(numbers, str) else numbers


def crossed_error(scores):
    """Return the standard error of the mean of scores, (seeds, hands), where each seed is one training run
    and all of them play the same hands.

    Both are samples, and crossed: Var = (MS_seeds + MS_hands - MS_rest) / (seeds hands), by analysis of
    variance with two random factors. As the three mean squares are estimates, and of few seeds poor ones, the
    sum is taken to be no less than the larger of the first two. Of one seed's runs nothing tells how seeds
    differ: the error is that of the hands.
    """
    seeds, hands = scores.shape
    of_seed, of_hand = scores.mean(1, keepdims=True), scores.mean(0)
    ms_hands = seeds * of_hand.var(ddof=1)
    if seeds == 1:
        return np.sqrt(ms_hands / hands)
    ms_seeds = hands * of_seed.var(ddof=1)
    rest = scores - of_seed - of_hand + scores.mean()
    ms_rest = (rest**2).sum() / (seeds - 1) / (hands - 1)
    return np.sqrt(max(ms_seeds, ms_hands, ms_seeds + ms_hands - ms_rest) / (seeds * hands))


def outcomes(results, metric):
    """Return numerator and denominator of a metric, (2, hands), from one evaluation of one set."""
    solved, right, answers = (np.array(unpack(results[key]), dtype=float) for key in OF_EACH)
    if metric == "per_step":
        return np.stack([right, answers])
    return np.stack([solved * (right == answers) if metric == "first" else solved, np.ones_like(solved)])


def linearised(evaluations, metric):
    """Return the rate over several seeds on the same hands, and (seeds, hands) scores whose mean has the
    error of that rate, a ratio of two sums."""
    return ratio_of_sums(*np.stack([outcomes(results, metric) for results in evaluations], axis=1))


def rate(evaluations, metric):
    """Return (rate, standard error) in %."""
    rate, scores = linearised(evaluations, metric)
    return 100 * rate, 100 * crossed_error(scores)


def change(evaluations, others, metric):
    """Return (difference of the rates, its standard error) in points, of two groups of evaluations on the
    same hands, hand by hand. `others` are as many (seed by seed), or one that all are compared with."""
    (rate, scores), (other, their) = (linearised(group, metric) for group in (evaluations, others))
    return 100 * (rate - other), 100 * crossed_error(scores - their)
