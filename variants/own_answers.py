"""Rejection sampling (RAFT, arXiv 2304.06767): SFT on the right ones among the model's own answers.

    torchrun train.py --task gp-l --algo sft --sft-data own
"""

from dataclasses import replace


def own_answers(episodes):
    """Return the right answers of episodes as examples, each with the conversation that led to it. Wrong
    answers before a right one are context."""
    right = [(c, turn) for episode in episodes for c in episode.conversations for turn in c.turns
             if turn.info["correct"]]
    return [replace(c, ids=c.ids[:turn.end], sampled=[turn.start <= i < turn.end for i in range(turn.end)],
                    turns=[]) for c, turn in right]
