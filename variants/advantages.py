"""Advantage estimators: what an action was worth, from the rewards and perhaps the values of an episode.

    torchrun train.py --task gp-l --algo ppo --advantage grpo --loss grpo

How to add one: write a function (episodes, args) that fills in `turn.advantage` of every turn, and enter it
in ESTIMATORS with what it needs. Of each turn it can read `reward` (the verifier's), `penalties` (the KL
penalty of each sampled token where that is part of the reward, else empty), `value` (the critic's) and
`info`; of an episode `turns`, in order, and `seed`, the hand that was dealt. Text that was not sampled
(prompts, verifier messages) is in none of these, and so changes no advantage.

An estimator over turns gives a turn one advantage, one value and one target (what the critic learns). One
over tokens gives lists with a number per sampled token; a value is V of the state before that token. `gae`,
the paper's, is in ppo.py.
"""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch

from harness.ranges import arg, between
from llama.batches import passes, trees_of
from ppo import Estimator, chain, earned, fill_in, flat, gae, magnitude, mean_and_std, stack_turns
from rollout import turns_of


@dataclass
class AdvantageSettings:
    """Settings of estimators over tokens; --gamma and --lam are from turn to turn."""
    token_gamma: float = arg(1.0, between(0, 1), "discount from token to token",
                             "--advantage gae-token, gae-two-level or reinforce++")
    token_lam: float = arg(0.95, between(0, 1), "lambda of GAE from token to token",
                           "--advantage gae-token or gae-two-level")


# ------------------------------------------------------------------------------------------------------------
# What estimators are made of

def token_rewards(turn, args):
    """Return what a turn earned token by token: a penalty comes where it arises, the verifier's reward with
    the last token."""
    rewards = [-x for x in turn.penalties] or [0.0] * turn.length
    rewards[-1] += args.reward_scale * turn.reward
    return rewards


def chain_tokens(episode, values, args, lam):
    """Fill in the advantages of an episode's tokens, one chain over all its turns. The step after a turn's
    last token is the next turn's first: what the verifier says in between is the environment's move."""
    rewards = [reward for turn in episode.turns for reward in token_rewards(turn, args)]
    rest = iter(chain(rewards, values, args.token_gamma, lam))
    for turn in episode.turns:
        turn.advantage = [next(rest) for _ in range(turn.length)]


def returns(episode, args):
    """Return G_k = r_k + gamma G_{k+1} of each turn. The first is the return of the episode."""
    return chain([earned(turn, args) for turn in episode.turns], [0.0] * len(episode.turns), args.gamma, 1.0)


def groups_of(pairs):
    """Group (key, value) pairs -> a list of values per key."""
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups.values()


def leave_one_out(scores):
    """Return each score less the mean of the n - 1 others: n/(n-1) times (score - mean). The mean is exact,
    so that scores which tie are worth exactly 0; a lone one keeps what it is worth."""
    n, mean = len(scores), statistics.mean(scores)
    return [n / (n - 1) * (score - mean) for score in scores] if n > 1 else scores


def compare(episodes, args, worth):
    """Give all turns of an episode one advantage: what it returned, compared with the hand's other samples.
    worth: (what each sample returned, the samples) -> the advantage of each."""
    for samples in groups_of((episode.seed, episode) for episode in episodes):
        scores = [returns(episode, args)[0] for episode in samples]
        for episode, advantage in zip(samples, worth(scores, samples)):
            for turn in episode.turns:
                turn.advantage = advantage


# ------------------------------------------------------------------------------------------------------------
# With a critic

@torch.no_grad()
def score_values(per, actor_critic, processor, conversations, args, ranks):
    """Fill in `turn.value`, or a list with the values of its tokens, in a pass over all conversations."""
    for group, batch, _ in passes(actor_critic.policy, processor, trees_of(conversations), args.token_budget,
                                  ranks):
        turns = turns_of(group)
        for turn in turns if per == "token" else []:
            turn.value = [0.0] * turn.length
        fill_in(turns, "value", actor_critic.values(batch, stack_turns(group, batch, per)).tolist())


def gae_loo(episodes, args, base=gae):
    """Subtract from GAE what the other samples of the same hand got on average at the same turn (leave one
    out, as in RLOO): the same attempt and, on a route, the same point.

    How hard a hand is explains most of the variance of the returns, and a small critic cannot see it. The
    other samples can; they know nothing of this sample's action, so subtracting their mean adds no bias.
    """
    base(episodes, args)
    keyed = [((episode.seed, turn.info.get("point"), turn.info["attempt"]), turn)
             for episode in episodes for turn in episode.turns]
    for group in groups_of(keyed):
        for turn, advantage in zip(group, leave_one_out([turn.advantage for turn in group])):
            turn.advantage = advantage


def gae_token(episodes, args):
    """Estimate GAE with every sampled token as a step (arXiv 1506.02438):

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1}

    with --token-gamma and --token-lam.
    """
    for episode in episodes:
        chain_tokens(episode, flat(episode.turns, "value"), args, args.token_lam)
        for turn in episode.turns:
            turn.target = [a + v for a, v in zip(turn.advantage, turn.value)]


def gae_two_level(episodes, args):
    """Estimate GAE over turns, then over the tokens inside each (the bi-level GAE of VAGEN, arXiv
    2510.16907):

        A_k by --gamma and --lam from turn to turn;
        inside turn k, by --token-gamma and --token-lam, V = 0 after the last token and
        r_t = the token's own reward, and with the last token also A_k + V_k - r_k: what later turns bring.

    V_k is read before the turn's first token, as in `gae`; VAGEN reads it before the last.
    """
    for episode in episodes:
        rewards, values = zip(*[(earned(turn, args), turn.value[0]) for turn in episode.turns])
        over_turns = chain(rewards, values, args.gamma, args.lam)
        for turn, advantage in zip(episode.turns, over_turns):
            rewards = token_rewards(turn, args)
            rewards[-1] += advantage + turn.value[0] - earned(turn, args)
            turn.advantage = chain(rewards, turn.value, args.token_gamma, args.token_lam)
            turn.target = [a + v for a, v in zip(turn.advantage, turn.value)]


# ------------------------------------------------------------------------------------------------------------
# Without a critic

def monte_carlo(episodes, args):
    """Take the return from a turn on (Williams 1992):   A_k = G_k = r_k + gamma G_{k+1}. It is GAE with
    lambda 1 plus V_k."""
    for episode in episodes:
        for turn, value in zip(episode.turns, returns(episode, args)):
            turn.advantage = value


def rloo(episodes, args):
    """Subtract from an episode's return the mean return of the hand's n - 1 other samples (REINFORCE, leave
    one out, arXiv 2402.14740),

        A_i = R_i - 1/(n-1) sum_{j != i} R_j   for each of its turns;   R = G_1.
    """
    compare(episodes, args, lambda scores, samples: leave_one_out(scores))


def grpo(episodes, args, divide=True):
    """Compare the n samples of a hand (arXiv 2402.03300, section 4.1.2):   A_i = (R_i - mean R) / std R.

    divide=False leaves the division out, which favours hands that are nearly always or nearly never solved
    (Dr. GRPO, arXiv 2503.20783). The other thing that paper leaves out, the division by an answer's length,
    is a matter of the loss: see `mean` in losses.py.
    """
    def worth(scores, samples):
        mean, std = mean_and_std(scores, [magnitude(turn, args) for one in samples for turn in one.turns])
        scale = std + 1e-6 if divide else 1.0
        return [(score - mean) / scale if std else 0.0 for score in scores]

    compare(episodes, args, worth)


def reinforce_pp(episodes, args):
    """Take the return from a token on, KL penalties included, normalised over all tokens of the rollout
    (REINFORCE++, arXiv 2501.03262),

        A_t = sum_{i >= t} gamma^(i-t) r_i   with --token-gamma;   then (A - mean) / std, see `normalize`.
    """
    for episode in episodes:
        chain_tokens(episode, [0.0] * sum(turn.length for turn in episode.turns), args, 1.0)


compared = partial(Estimator, values=False, normalize=False, groups=True)
ESTIMATORS = {
    "gae": Estimator(gae),
    "gae-loo": Estimator(gae_loo),
    "gae-token": Estimator(gae_token, per="token"),
    "gae-two-level": Estimator(gae_two_level, per="token"),
    "monte-carlo": Estimator(monte_carlo, values=False),
    "rloo": compared(rloo),
    "grpo": compared(grpo),
    "grpo-no-std": compared(partial(grpo, divide=False)),
    "reinforce++": Estimator(reinforce_pp, per="token", values=False),
}
