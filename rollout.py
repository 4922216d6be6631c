"""Play games with a model: the record of an episode, and the rollout that fills it.

    from rollout import rollout
    episodes = rollout(model, processor, make_env, seeds, temperature=0.5, max_new_tokens=48)

One episode is a dialogue. The model answers, the verifier replies, the model revises, until the answer is
right or the attempts are used up. On a route each point is a dialogue of its own, and the route is one
episode.
"""

from dataclasses import dataclass, field

import torch

from games.seeds import derive
from llama.generate import generate


# ------------------------------------------------------------------------------------------------------------
# The record of an episode

@dataclass
class Turn:
    """One answer of the model and what became of it. Its tokens are `ids[start:end]` of its conversation."""
    conversation: int
    start: int
    end: int
    reward: float
    info: dict                 # what the environment said of this answer: verdict, recognized, ...
    hidden: object = None      # (D,) the policy's state at the last token of the prompt
    # For an estimator over tokens the next three are lists, with a number for each token of the turn.
    value: float = 0.0         # V(prompt of this turn), from `hidden` by `read_values` or by `score_values`
    advantage: float = 0.0     # filled in by an estimator
    target: float = 0.0        # what the value head is regressed on
    penalties: list[float] = field(default_factory=list)    # of each token, from the reward: --kl-in reward


@dataclass
class Conversation:
    """One packed token sequence; several turns may lie in it. All lists have one entry a token."""
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)      # False: forced (prompt, verifier)
    logprobs: list[float] = field(default_factory=list)    # as drawn; 0 where forced
    weights: list[float] = field(default_factory=list)     # weight in the turn's log-prob; 0 where forced
    reference: list[float] = field(default_factory=list)   # log-probs by the reference policy, if asked for
    image: object = None                                   # PIL image or None
    features: object = None                                # (S, F) what a frozen vision encoder made of it

    def tell(self, rendered):
        """Append forced tokens: a prompt or a verifier message."""
        n = len(rendered.ids)
        self.ids += rendered.ids
        self.sampled += [False] * n
        self.logprobs += [0.0] * n
        self.weights += [0.0] * n
        if rendered.images:
            self.image = rendered.images[0]

    def add(self, sample, weights):
        """Append the tokens of one answer."""
        self.ids += sample.ids
        self.sampled += [True] * len(sample.ids)
        self.logprobs += sample.logprobs
        self.weights += weights
        if sample.features is not None:
            self.features = sample.features


@dataclass
class Episode:
    """What flows from the rollout to the advantages to the loss: conversations and, in order, the turns in
    them."""
    seed: int
    conversations: list[Conversation] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    success: bool = False
    terminated: bool = True    # by its end, not for want of attempts
    transcript: list[tuple[str, str]] = field(default_factory=list)   # (who, text), for people to read


# ------------------------------------------------------------------------------------------------------------
# Rollout

def token_weights(processor, ids, answer_key, before=0.5):
    """Weight of each token in the log-prob of its turn: `before` ahead of the answer key, 1 from there on.

    The released code (after RL4VLM, arXiv 2405.10292) halves what the model says before its final answer. The
    key is found in the decoded text by character offset. An answer without the key is weighted 1 throughout.
    """
    key = processor.position_of(ids, f'"{answer_key}"')
    return [before if i < key else 1.0 for i in range(len(ids))]


class Player:
    """One episode in progress: an environment, the record, and the conversation that is open."""

    def __init__(self, env, seed, sample, processor):
        self.env, self.sample, self.processor, self.episode = env, sample, processor, Episode(seed)
        observation, _ = env.reset(seed)
        self.listen(observation, ended=True)

    def listen(self, observation, ended):
        """Append the observation's messages to the open conversation, or open a new one with them."""
        self.fresh = observation.fresh
        if self.fresh:
            self.episode.conversations.append(Conversation())
        rendered = self.processor.render(observation.messages, first=self.fresh, ended=ended)
        self.episode.conversations[-1].tell(rendered)
        for message in observation.messages:
            self.episode.transcript.append((message["role"], readable(message["content"])))

    def answer(self, sample):
        """Record one answer and show it to the verifier. Returns True while the episode goes on."""
        text, episode = self.processor.decode(sample.ids), self.episode
        start = len(episode.conversations[-1].ids)
        episode.conversations[-1].add(sample, token_weights(self.processor, sample.ids, self.env.answer_key))
        observation, reward, terminated, truncated, info = self.env.step(text)
        last, end = len(episode.conversations) - 1, start + len(sample.ids)
        episode.turns.append(Turn(last, start, end, reward, info, sample.hidden))
        episode.transcript.append(("assistant", text))
        episode.transcript.append(("reward", f"{reward:+g} ({info['verdict']})"))
        if terminated or truncated:
            episode.success, episode.terminated = info["success"], terminated
            return False
        self.listen(observation, ended=sample.ended)
        return True


def readable(content):
    """The text of a chat message; an image shows as <image>."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "<image>") for part in content)


@torch.inference_mode()
def rollout(model, processor, make_env, seeds, *, temperature, max_new_tokens, samples=1, batch=256,
            keep_features=False, device="cpu"):
    """Play `samples` episodes per seed with the current policy, `batch` at a time. Return them in the order
    of `seeds`.

    seeds: the hands that the environments deal. An episode depends on its hand and on which of its samples it
    is, never on who shares its batch or its rank. The conversations that continue keep their KV cache from
    turn to turn, so that every prefix is prefilled once. keep_features: for an update that does not train the
    vision encoder, keep what it made of each image (11B: 98 MB of host memory).
    """
    episodes, hands = [], [(seed, sample) for seed in seeds for sample in range(samples)]
    for first in range(0, len(hands), batch):
        players = [Player(make_env(), *hand, processor) for hand in hands[first:first + batch]]
        groups = [(None, players)]                       # players whose conversations share one cache
        while groups:
            fresh, continuing = [], []
            for cache, group in groups:
                cache, stay = play_turn(model, processor, cache, group, temperature, max_new_tokens,
                                        keep_features, device)
                fresh += [group[i] for i in stay if group[i].fresh]
                stay = [i for i in stay if not group[i].fresh]
                if stay:
                    cache.keep(stay)
                    continuing.append((cache, [group[i] for i in stay]))
            groups = continuing + ([(None, fresh)] if fresh else [])
        episodes += [player.episode for player in players]
    return episodes


def play_turn(model, processor, cache, players, temperature, max_new_tokens, keep_features, device):
    """Every player answers once. Returns the cache and the indices of the players whose episodes go on."""
    open_conversations = [player.episode.conversations[-1] for player in players]
    images = None
    if cache is None:
        images = processor.images([c.image for c in open_conversations])
        images = images and images.to(device)
    samples, cache = generate(
        model, [c.ids for c in open_conversations], cache=cache, images=images, max_new_tokens=max_new_tokens,
        temperature=temperature, stop_ids=processor.stop_ids, keep_features=keep_features,
        seeds=[derive("draws", p.episode.seed, p.sample, len(p.episode.turns)) for p in players])
    return cache, [i for i, (player, sample) in enumerate(zip(players, samples)) if player.answer(sample)]
