"""Put conversations into batches for training and scoring."""
from dataclasses import dataclass

import torch

from llama.images import Images


@dataclass
class Batch:
    input_ids: torch.Tensor                 # (B, T)
    lengths: torch.Tensor                   # (B,)
    targets: torch.Tensor                   # (B, T) the token after each position if asked for, else -100
    images: Images | None

    def to(self, device):
        tensors = (tensor.to(device) for tensor in (self.input_ids, self.lengths, self.targets))
        return Batch(*tensors, self.images and self.images.to(device))


def collate(processor, ids, asked, images, features=None):
    """Pad conversations to a Batch. The last token of each is a target only.

    asked[b][t]: is the log-prob of token t wanted? images, features: see Processor.images.
    """
    width = max(len(row) for row in ids) - 1
    input_ids = torch.full((len(ids), width), processor.pad_id)
    targets = torch.full((len(ids), width), -100)
    for b, (row, wanted) in enumerate(zip(ids, asked)):
        input_ids[b, :len(row) - 1] = torch.tensor(row[:-1])
        following = torch.tensor(row[1:])
        targets[b, :len(row) - 1] = torch.where(torch.tensor(wanted[1:]), following, -100)
    lengths = torch.tensor([len(row) - 1 for row in ids])
    return Batch(input_ids, lengths, targets, processor.images(images, features))


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


def parts(places, order, n):
    """Deal n minibatches -> the indices of one's own items in each. So n ranks learn from those of one.

    places: where each item stands among those of all ranks; order: all of these places, as they are dealt.
    """
    own = {place: i for i, place in enumerate(places)}
    return [[own[place] for place in order[k::n] if place in own] for k in range(n)]


def alone(batches, spare):
    """Give each batch the weight 1, as one rank does.

    Of several, those with fewer batches add `spare` with weight 0: distributed.shard.pace.
    """
    return [(batch, 1.0) for batch in batches]
