"""Put conversations into batches for training and scoring.

A conversation is anything with `ids` (token ids), `sampled` (is the model to produce this token?) and `image`
(a picture, what Processor.cut made of one, or None); see rollout.Conversation.
"""
from dataclasses import dataclass, replace

import torch

from llama.images import Images


@dataclass
class Batch:
    input_ids: torch.Tensor                 # (B, T)
    lengths: torch.Tensor                   # (B,)
    targets: torch.Tensor                   # (B, T) the token after each position if sampled, else -100
    images: Images | None

    def to(self, device):
        tensors = (tensor.to(device) for tensor in (self.input_ids, self.lengths, self.targets))
        return Batch(*tensors, self.images and self.images.to(device))

    def inputs(self):
        """Return what `Llama.forward` takes of a batch, but for the targets."""
        return {"input_ids": self.input_ids, "lengths": self.lengths, "images": self.images}


class OneProcess:
    """A process by itself, with the methods of distributed.processes.Processes that an update calls."""

    def __init__(self, device="cpu"):
        self.device = torch.device(device)

    def total(self, numbers):
        """Sum each of some numbers over ranks -> list of floats."""
        return torch.tensor(numbers, dtype=torch.float64).tolist()

    def lockstep(self, batches, filler):
        """Yield (batch, weight). A rank with fewer batches than another adds `filler`, with weight 0."""
        return [(batch, 1.0) for batch in batches]

    def positions(self, counts):
        """Return where the items of this rank stand among those of all. counts: of each thing it shares."""
        return range(sum(counts))


def collate(processor, conversations):
    """Pad conversations to a Batch. The last token of each is a target only."""
    width = max(len(c.ids) for c in conversations) - 1
    input_ids = torch.full((len(conversations), width), processor.pad_id)
    targets = torch.full((len(conversations), width), -100)
    for row, c in enumerate(conversations):
        input_ids[row, :len(c.ids) - 1] = torch.tensor(c.ids[:-1])
        following = torch.tensor(c.ids[1:])
        targets[row, :len(c.ids) - 1] = torch.where(torch.tensor(c.sampled[1:]), following, -100)
    lengths = torch.tensor([len(c.ids) - 1 for c in conversations])
    return Batch(input_ids, lengths, targets, processor.images([c.image for c in conversations]))


def bucket(lengths, token_budget, extra=None):
    """Group rows alike in length -> lists of indices.

    Of a group, rows x longest, and `extra` of each (its image, in tokens), come to at most token_budget.
    A row beyond it is a group of its own.
    """
    groups, beside = [], [0] * len(lengths) if extra is None else extra
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        rows = [*groups[-1], i] if groups else [i]
        if groups and len(rows) * lengths[i] + sum(beside[j] for j in rows) <= token_budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def passes(model, processor, conversations, token_budget, ranks, filler=None):
    """Yield (conversations, their Batch on the device, weight) until all have been passed, alike in length
    together.

    filler: a conversation for passes that only other ranks need (weight 0); default: the first. Nothing in it
    counts as sampled, so that its loss is 0 by itself: 0 times a loss that is not finite would be NaN.
    """
    tokens = model.config.vision and model.config.image_tokens(model.vision_frozen)            # of an image
    beside = [tokens if c.image else 0 for c in conversations]
    groups = bucket([len(c.ids) for c in conversations], token_budget, beside)
    filler = filler or conversations[0]
    filler = replace(filler, sampled=[False] * len(filler.ids), turns=[])
    for group, weight in ranks.lockstep([[conversations[i] for i in group] for group in groups], [filler]):
        yield group, collate(processor, group).to(ranks.device), weight


def parts(places, order, n):
    """Deal n minibatches -> the indices of one's own items in each. So n ranks learn from those of one.

    places: where each item stands among those of all ranks; order: all of these places, as they are dealt.
    """
    own = {place: i for i, place in enumerate(places)}
    return [[own[place] for place in order[k::n] if place in own] for k in range(n)]
