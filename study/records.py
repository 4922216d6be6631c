"""Store each run as a line of JSON, and compute the error of a rate from several seeds that play the same
hands."""

import json
from pathlib import Path

import numpy as np

from harness.files import append_line, read_lines
from llama.metrics import ratio_of_sums

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
OF_EACH = ("solved", "right", "answers")               # what an evaluation tells of each hand
OF_ALL = ("config", "commit", "hardware")
KEPT = ("step", "tflops", "counted_tflops", "eval", "probe")       # of a log's line of an evaluation


def read(folder):
    """Return records by name, from all files of a folder; none if it is not there."""
    found = [read_lines(file, {"name": str, "curve": list}) for file in sorted(Path(folder).glob("*.jsonl"))]
    return {record["name"]: record for part in found for record in part}


def of_run(name, folder):
    """Return the record of a run that has ended: how it was called and what it ran on, its evaluations in
    order (an evaluation alone has one, after 0 steps and FLOPs), what it took."""
    alone = (Path(folder) / "eval.json").exists()
    file = Path(folder) / ("eval.json" if alone else "log.jsonl")
    try:
        if alone:
            only = json.loads(file.read_text(encoding="utf-8"))
            told = {key: only[key] for key in OF_ALL} | {"curve": [{"step": 0, "eval": only["eval"]}]}
        else:
            told = of_log(read_lines(file, {"event": str}))
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: not of a run that has ended, or of another version ({reason}); leave the "
                         "run out, or make it anew in another folder") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); make the run anew in another folder") from None
    return {"name": name} | told


def of_log(lines):
    """Return what the lines of a log tell, as `of_run` does."""
    start, steps, curve = ([line for line in lines if line["event"] == event]
                           for event in ("start", "step", "eval"))
    told = {key: start[0][key] for key in OF_ALL}
    told |= {key: steps[-1][key] for key in ("tflops", "counted_tflops", "flops")}
    return told | {"seconds": sum(line["seconds"] for line in steps),
                   "memory_gb": max(line["memory_gb"] for line in steps),
                   "curve": [{key: line[key] for key in KEPT if key in line} for line in curve]}


def append(file, record):
    """Add a record as one line, with a character for each number of a hand."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    curve = [point | {"eval": {name: results | {key: pack(results[key]) for key in OF_EACH if key in results}
                               for name, results in point["eval"].items()}} for point in record["curve"]]
    append_line(file, record | {"curve": curve})


def pack(numbers):
    """Write whole numbers as one string, where all are below 36."""
    return "".join(DIGITS[n] for n in numbers) if max(numbers) < 36 else numbers


def unpack(numbers):
    return [DIGITS.index(digit) for digit in numbers] if isinstance(numbers, str) else numbers


def crossed_error(scores):
    """Return the standard error of the mean of scores, (seeds, hands), where each seed is one training run
    and all of them play the same hands.

    Both are samples, and crossed: Var = (MS_seeds + MS_hands - MS_rest) / (seeds hands), by analysis of
    variance with two random factors. As the three mean squares are estimates, and of few seeds poor ones, the
    sum is taken to be no less than the larger of the first two. Of one seed's runs nothing tells how seeds
    differ: the error is that of the hands.
    """
    seeds, hands = scores.shape
    mean, of_seed, of_hand = scores.mean(), scores.mean(1, keepdims=True), scores.mean(0, keepdims=True)
    ms_hands = seeds * ((of_hand - mean) ** 2).sum() / (hands - 1)
    if seeds == 1:
        return np.sqrt(ms_hands / hands)
    ms_seeds = hands * ((of_seed - mean) ** 2).sum() / (seeds - 1)
    ms_rest = ((scores - of_seed - of_hand + mean) ** 2).sum() / (seeds - 1) / (hands - 1)
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
