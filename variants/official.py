"""Do what the released code does where it differs from ours: single points by name (--compat NAME), or all of
them (--compat official).

    torchrun train.py --task gp-l --algo ppo --advantage gae --samples 1 --hands 256 --compat official

What each switch does, and why the default differs: the games' in official_games.py, PPO's here.
"""
import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from harness.ranges import arg, one_of, optional, several
from ppo import clip, gae, normalize_advantages
from rollout import Episode, conversations_of, turns_of
from variants.advantages import gae_loo
from variants.official_games import OF_GAME, play

# leaking-gae: an episode that used up its attempts does not end the chain: the value and the advantage of
#     the next, unrelated hand flow into it (--advantage gae and gae-loo). Nothing of the next hand can be
#     due to this one.
# first-token-unscored: the first token of an answer counts neither in its log-prob nor in its gradient. It
#     was sampled like all others (--unit turn).
# bf16-logprobs: log-probs are rounded to bfloat16 before they are summed to a turn's: steps of up to 0.1
#     against a clip range of 0.1.
# ratio-10: where a ratio exceeds 10, the clipped surrogate alone counts, whose gradient is zero outside of
#     the range even where it would lead back (--loss ppo). The released code looks for such a ratio in a
#     micro-batch, which holds one turn.
# rank-advantages: each rank normalises the advantages of its own episodes. The mean and deviation of a rank
#     depend on how many there are (an --advantage that is normalised: gae and gae-loo, not grpo).
PPO = "leaking-gae", "first-token-unscored", "bf16-logprobs", "ratio-10", "rank-advantages"
NAMES = frozenset(PPO).union(*OF_GAME.values())


@dataclass
class OfficialSettings:
    """Settings that bring back the released code."""
    compat: str = arg("", several(one_of(("official", *sorted(NAMES)))),
                      "behaviours of the released code, by name, joined by commas, or official: all "
                      "(variants/official.py says what they do)")
    after_failure: str = optional(one_of(("end", "walk-on")),
                                  "virl: what follows a point that stays wrong, the end of the episode "
                                  "(default, the paper) or the next point", "--task virl-l or virl-vl")


def switches(text):
    """Return the names in --compat. "official": all."""
    return NAMES if text == "official" else frozenset(filter(None, text.split(",")))


def wrap(game, text):
    """Return the game with what --compat changes in it."""
    return play(game, switches(text))


# ------------------------------------------------------------------------------------------------------------
# PPO's own

def leaking(episodes, args):
    """Estimate GAE over turns, with an episode that used up its attempts and the next one as one chain."""
    chains = [Episode(seed=0)]
    for episode in episodes:
        chains[-1].conversations.extend(episode.conversations)
        if episode.terminated:
            chains.append(Episode(seed=0))
    gae(chains, args)


LEAKING = {gae: leaking, gae_loo: partial(gae_loo, base=leaking)}


def change_estimator(estimator, names):
    """Return the ppo.Estimator with what is among `names`. The record of an episode is changed first."""
    f = LEAKING.get(estimator.f, estimator.f) if "leaking-gae" in names else estimator.f
    own = estimator.normalize and "rank-advantages" in names

    def changed(episodes, args):
        conversations = conversations_of(episodes)
        for conversation in conversations:
            for turn in conversation.turns if "first-token-unscored" in names else []:
                conversation.weights[turn.start] = 0.0
            if "bf16-logprobs" in names:
                conversation.logprobs = torch.tensor(conversation.logprobs).bfloat16().tolist()
        f(episodes, args)
        if own:
            normalize_advantages(turns_of(conversations), args)

    return replace(estimator, f=changed, normalize=estimator.normalize and not own) if names else estimator


def ratio_10(logprobs, old_logprobs, advantages, args):
    """Clip as ppo.clip does; beyond a ratio of 10 count the clipped surrogate alone."""
    losses, metrics = clip(logprobs, old_logprobs, advantages, args)
    beyond = logprobs - old_logprobs > math.log(10)
    return torch.where(beyond, -(1 + args.clip) * advantages, losses), metrics


def change_model(llama, names):
    """Round the log-probs of a Llama's training passes, if that is among `names`."""
    def rounded(llama, inputs, out):
        if torch.is_grad_enabled() and out.logprobs is not None:
            out.logprobs = out.logprobs.bfloat16().float()

    if "bf16-logprobs" in names:
        llama.register_forward_hook(rounded)
