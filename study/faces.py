"""Does a model that fails GeneralPoints' new rule ignore it, or can it not act on it? What its first answers
make of J, Q and K.

    python -m study.faces runs/study/gp-l-sft-0/final runs/study/gp-l-ppo-0/final

Under rule-ood they count 11, 12 and 13. An answer first lists the values of its cards, then writes a formula,
so the two can be told apart: a model that ignores the rule lists 10s; one that lists what the prompt says and
then writes a formula without it has lost the use of these numbers.
"""

import re
from collections import Counter

from distributed.processes import Processes
from games.answers import read_answer
from harness.environments import evaluation_sets
from harness.load import agree, load
from harness.ranges import SettingError, command_line, integer, one_of
from harness.settings import Args
from harness.terminal import command
from harness.tiny import first_weights
from rollout import rollout
from study.tables import markdown
from train import learn

VERDICTS = "correct wrong_value used_twice foreign_number left_out unparsable".split()
HEAD = ["model", "values listed right", "all over 10 in the formula",
        *(name.replace("_", " ") for name in VERDICTS)]


def over_10(numbers):
    """Return {number: how often}, of strings."""
    return Counter(number for number in numbers if number.isdecimal() and int(number) > 10)


def uses_them(said):
    """Tell whether the formula of an answer holds every value over 10 that the same answer lists; None where
    it lists none, or cannot be read."""
    _, listed, formula = read_answer(said)
    listed, used = over_10(listed or []), re.findall(r"\d+", (formula or "").rpartition("=")[0])
    return not listed - over_10(used) if listed else None


def row(args, processes, hands):
    """Return the cells of one model's line: shares in % of all first answers, the second of those that list a
    number over 10."""
    model, processor, _ = load(args, processes, first_weights(args, processes, learn))
    episodes = rollout(model, processor, evaluation_sets(args)["rule-ood"], range(hands),
                       batch=args.rollout_batch, temperature=args.eval_temperature,
                       max_new_tokens=args.max_new_tokens)
    infos = [episode.turns[0].info for episode in episodes]
    said = [dict(reversed(episode.transcript))["assistant"] for episode in episodes]           # its first
    used = [uses for uses in map(uses_them, said) if uses is not None]
    shares = [sum(info["translated"] for info in infos) / hands, sum(used) / max(len(used), 1)]
    shares += [sum(info["verdict"] == name for info in infos) / hands for name in VERDICTS]
    return [args.model, *(f"{100 * share:.1f}" for share in shares)]


def main(argv=None):
    parser = command_line("python -m study.faces", __doc__)
    parser.add_argument("models", nargs="+", help="folders of checkpoints")
    parser.add_argument("--task", type=one_of(("gp-l", "gp-vl")), default="gp-l",
                        help="gp-l or gp-vl (default: %(default)s)")
    parser.add_argument("--hands", type=integer(1), default=500, help="of rule-ood (default: %(default)s)")
    typed = parser.parse_args(argv)
    processes = Processes()
    runs = [Args(task=typed.task, algo="eval", attempts=1, model=folder) for folder in typed.models]
    for args in runs:                          # all, before the first is played
        try:
            agree(processes, args)
        except SettingError as error:
            parser.error(str(error))
    print(markdown(HEAD, [row(args, processes, typed.hands) for args in runs]))


if __name__ == "__main__":
    command(main)
