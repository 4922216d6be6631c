"""Play games with a model: the record of an episode, and the rollout that fills it.

    from rollout import rollout
    episodes = rollout(model, processor, make_env, seeds, temperature=0.5, max_new_tokens=48)

One episode is a dialogue. The model answers, the verifier replies, the model revises, until the answer is
right or the attempts are used up. In navigation every point of a route is a conversation of its own; the
whole route is one episode.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable

import torch

from envs import Env
from games.seeds import derive
from llama.batches import trees_of
from llama.generate import generate


# ------------------------------------------------------------------------------------------------------------
# The record of an episode

@dataclass
class Turn:
    """One answer of the model and what became of it. Its tokens are `ids[start:end]` of its conversation."""
    start: int
    end: int
    reward: float
    info: dict                                 # what the environment said: verdict, recognized, ...
    hidden: torch.Tensor | None = None         # (D,) the policy's state at the last token of the prompt
    # For an estimator over tokens the next three are lists, with a number per token of the turn.
    value: float = 0.0                         # V(prompt of this turn), by the critic
    advantage: float = 0.0                     # by an estimator
    target: float = 0.0                        # what the critic learns
    penalties: list[float] = field(default_factory=list)       # per token, subtracted from the reward

    @property
    def length(self):
        return self.end - self.start


@dataclass
class Conversation:
    """One packed token sequence with the turns in it. All lists but `turns` have an entry per token."""
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)          # by the model (in SFT: to learn), or given
    image: Any = None                                          # a picture, or what Processor.cut made of it
    logprobs: list[float] = field(default_factory=list)        # when it was drawn; 0 where not sampled
    weights: list[float] = field(default_factory=list)         # in its turn's log-prob, see token_weights
    turns: list[Turn] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)       # log-probs by another policy, if asked for

    def append(self, ids, sampled, logprobs=None, weights=None):
        """Append tokens that the model sampled, or that it was forced to read."""
        zeros = [0.0] * len(ids)
        self.ids += ids
        self.sampled += [sampled] * len(ids)
        self.logprobs += logprobs or zeros
        self.weights += weights or zeros


@dataclass
class Episode:
    """One game played to its end: the record that flows from the rollout to the advantages to the loss."""
    seed: int
    conversations: list[Conversation] = field(default_factory=list)
    success: bool = False
    terminated: bool = True                    # False: its attempts ran out
    transcript: list[tuple[str, str]] = field(default_factory=list)        # (who, text), for people to read
    pictures: list[Any] = field(default_factory=list)          # PIL, one per conversation, uncut

    @property
    def turns(self):
        """Return the turns of all its conversations, in order."""
        return turns_of(self.conversations)


def conversations_of(episodes):
    """List the conversations of episodes, in order."""
    return [conversation for episode in episodes for conversation in episode.conversations]


def turns_of(conversations):
    """List the turns of conversations, in order."""
    return [turn for conversation in conversations for turn in conversation.turns]


def trees_of_hands(episodes):
    """Return a list per hand of its trees. A tree is a list of conversations with the same prompt and image,
    which are learnt from in one row of a batch (llama/batches.py)."""
    hands = defaultdict(list)
    for episode in episodes:
        hands[episode.seed] += episode.conversations
    return [trees_of(hand) for hand in hands.values()]


def of_sampled(conversations, name, device="cpu"):
    """Return "logprobs", "weights" or "reference" (`name`) of every sampled token, float32 (tokens,)."""
    numbers = [x for c in conversations for x, sampled in zip(getattr(c, name), c.sampled) if sampled]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


# ------------------------------------------------------------------------------------------------------------
# Rollout

def token_weights(processor, ids, answer_key):
    """Return the weight of each token in the log-prob of its turn: 0.5 ahead of the answer key, 1 from there
    on.

    The released code (after RL4VLM, arXiv 2405.10292) halves what the model says before its final answer. The
    key is found in the decoded text by character offset. An answer without the key is weighted 1 throughout.
    """
    start = processor.position_of(ids, f'"{answer_key}"')      # -1 without the key
    return [0.5 if i < start else 1.0 for i in range(len(ids))]


class Player:
    """One episode in progress: an environment, the record, and the conversation that is open.

    sample_index: which of the hand's samples it is; cut: function from a picture to its tiles.
    """

    def __init__(self, env, seed, sample_index, processor, cut=None):
        self.env, self.sample_index, self.processor = env, sample_index, processor
        self.cut = cut or processor.cut
        self.episode = Episode(seed)
        observation, _ = env.reset(seed)
        self.observe(observation, ended=True)

    @property
    def conversation(self):
        return self.episode.conversations[-1]

    def observe(self, observation, ended):
        """Append the observation's messages to the open conversation, or open a new one with them.

        ended: did the last answer end by itself? Else its end token is appended, too.
        """
        self.fresh = observation.fresh
        if self.fresh:
            self.episode.conversations.append(Conversation())
        rendered = self.processor.render(observation.messages, first=self.fresh, ended=ended)
        self.conversation.append(rendered.ids, sampled=False)
        if rendered.images:
            self.conversation.image = self.cut(rendered.images[0])
            self.episode.pictures.append(rendered.images[0])
        self.episode.transcript += [(m["role"], readable(m["content"])) for m in observation.messages]

    def answer(self, sample):
        """Record an answer and step the environment with it. Return True while the episode goes on."""
        episode, conversation = self.episode, self.conversation
        text = self.processor.decode(sample.ids)
        start = len(conversation.ids)
        weights = token_weights(self.processor, sample.ids, self.env.answer_key)
        conversation.append(sample.ids, True, sample.logprobs, weights)
        observation, reward, terminated, truncated, info = self.env.step(text)
        conversation.turns.append(Turn(start, start + len(sample.ids), reward, info, sample.hidden))
        episode.transcript += [("assistant", text), ("reward", f"{reward:+g} ({info['verdict']})")]
        if terminated or truncated:
            episode.success, episode.terminated = info["success"], terminated
            return False
        self.observe(observation, ended=sample.ended)
        return True


def readable(content):
    """Return the text of a chat message; an image shows as <image>."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "<image>") for part in content)


@torch.inference_mode()
def rollout(model, processor, make_env: Callable[[], Env], seeds: Iterable[int], *, temperature: float,
            max_new_tokens: int, samples: int = 1, batch: int = 256) -> list[Episode]:
    """Play `samples` episodes per seed with the current policy, `batch` at a time. Return them in the order
    of `seeds`.

    seeds: the hands that the environments deal. Draws are seeded by hand, sample and turn: an episode is the
    same whatever shares its batch, on any number of ranks. The conversations that continue keep their KV
    cache from turn to turn, so that every prefix is prefilled once. Equal pictures, as those of a hand's
    samples, are cut once and share their tiles.
    """
    tiles = {}

    def cut(picture):
        key = picture.mode, picture.size, picture.tobytes(), str(picture.getpalette())
        if key not in tiles:
            tiles[key] = processor.cut(picture)
        return tiles[key]

    episodes = []
    plays = [(seed, sample_index) for seed in seeds for sample_index in range(samples)]
    for first in range(0, len(plays), batch):
        players = [Player(make_env(), *play, processor, cut) for play in plays[first:first + batch]]
        groups = [(None, players)]                             # players whose conversations share one cache
        while groups:
            fresh, continuing = [], []
            for cache, group in groups:
                cache, alive = play_turn(model, processor, cache, group, temperature, max_new_tokens)
                fresh += [group[i] for i in alive if group[i].fresh]
                rows = [i for i in alive if not group[i].fresh]
                if rows:
                    cache.keep(rows)
                    continuing.append((cache, [group[i] for i in rows]))
            groups = continuing + ([(None, fresh)] if fresh else [])
        episodes += [player.episode for player in players]
    return episodes


def play_turn(model, processor, cache, players, temperature, max_new_tokens):
    """Let every player answer once. Return the cache and the indices of the players whose episodes go on."""
    conversations = [player.conversation for player in players]
    source = images = None
    if cache is None:                          # the first turn: equal prompts are read once
        prompts = [(tuple(c.ids), id(c.image)) for c in conversations]
        distinct = dict(zip(prompts, conversations))
        source = [*map(list(distinct).index, prompts)]         # player i answers to prompt source[i]
        conversations = list(distinct.values())
        images = processor.images([c.image for c in conversations])
    samples, cache = generate(
        model, [c.ids for c in conversations], source=source, cache=cache, images=images,
        max_new_tokens=max_new_tokens, temperature=temperature, stop_ids=processor.stop_ids,
        seeds=[derive("draws", p.episode.seed, p.sample_index, len(p.episode.turns)) for p in players])
    go_on = [player.answer(sample) for player, sample in zip(players, samples)]
    return cache, [i for i, goes_on in enumerate(go_on) if goes_on]
