"""Put conversations into batches for training and scoring.

A conversation is anything with `ids` (token ids), `sampled` (is the model to produce this token?) and `image`
(a picture, what Processor.cut made of one, or None); see rollout.Conversation.

Conversations that begin alike are one row of a batch, a *tree*. Its stem is their common prompt, which is
therefore processed once, with its image; their branches follow one after the other:

    tokens       prompt         | answers of the 1st | answers of the 2nd | ...
    positions    0 1 2 ... P-2  | P-1 P P+1 ...      | P-1 P P+1 ...      |
    sees         the stem before it, and its own branch before it

A branch begins with the prompt's last token, the one that predicts the first token of the answer.
"""
from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from llama.images import Images


@dataclass
class Batch:
    """B trees of C conversations, in the order of the rows."""
    input_ids: torch.Tensor                 # (B, T)
    lengths: torch.Tensor                   # (B,)
    targets: torch.Tensor                   # (B, T) the token after each position if sampled, else -100
    count: int                              # C
    images: Images | None                   # at most one per row
    trees: list | None                      # per row (stem, [branch, ...]), tokens; None: no row has two

    def to(self, device):
        tensors = (tensor.to(device) for tensor in (self.input_ids, self.lengths, self.targets))
        return Batch(*tensors, self.count, self.images and self.images.to(device), self.trees)

    def inputs(self):
        """Return what `Llama.forward` takes of a batch, but for the targets."""
        return {name: getattr(self, name) for name in ("input_ids", "lengths", "images", "trees")}


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


def prompt_length(conversation):
    """Return how many tokens come before the first sampled one: at least 1, and at most all but one."""
    return max(1, (conversation.sampled[:-1] + [True]).index(True))


def trees_of(conversations):
    """Group conversations of one prompt and image, in their order -> list of lists."""
    trees = defaultdict(list)
    for c in conversations:
        trees[tuple(c.ids[:prompt_length(c)]), id(c.image)].append(c)
    return list(trees.values())


def tree_sizes(tree):
    """Return the numbers of tokens of a row: (of its stem, [of each branch]). The last token of a
    conversation is a target only."""
    stem = prompt_length(tree[0]) - 1
    return stem, [len(c.ids) - 1 - stem for c in tree]


def collate(processor, trees):
    """Pad trees, lists of conversations with one prompt and image, to a Batch."""
    shapes = [tree_sizes(tree) for tree in trees]
    lengths = torch.tensor([stem + sum(branches) for stem, branches in shapes])
    input_ids = torch.full((len(trees), int(lengths.max())), processor.pad_id)
    targets = torch.full_like(input_ids, -100)
    for row, (tree, (stem, branches)) in enumerate(zip(trees, shapes)):
        input_ids[row, :stem] = torch.tensor(tree[0].ids[:stem], dtype=torch.int64)
        at = stem
        for c, size in zip(tree, branches):
            input_ids[row, at:at + size] = torch.tensor(c.ids[stem:-1])
            following = torch.tensor(c.ids[stem + 1:])
            targets[row, at:at + size] = following.where(torch.tensor(c.sampled[stem + 1:]), -100)
            at += size
    images = processor.images([tree[0].image for tree in trees])
    count = sum(map(len, trees))
    shapes = shapes if count > len(trees) else None            # rows of one conversation are plainly causal
    return Batch(input_ids, lengths, targets, count, images, shapes)


def row_length(tree):
    """Return how many tokens the row of a tree has."""
    stem, branches = tree_sizes(tree)
    return stem + sum(branches)


def bucket(trees, token_budget, image_cost):
    """Group trees alike in length -> lists of trees.

    Of a group, rows x longest, and image_cost(tree) of each, in tokens, come to at most token_budget. A tree
    beyond it is a group of its own.
    """
    groups = [[]]
    for tree in sorted(trees, key=row_length):
        rows = [*groups[-1], tree]
        if len(rows) * row_length(tree) + sum(map(image_cost, rows)) <= token_budget:
            groups[-1] = rows
        else:
            groups.append([tree])
    return list(filter(None, groups))


def split_tree(tree, room):
    """Split a tree into trees of at most `room` tokens, or of one conversation."""
    stem, branches = tree_sizes(tree)
    trees, left = [], 0
    for conversation, size in zip(tree, branches):
        if size > left:
            trees.append([])
            left = room - stem
        trees[-1].append(conversation)
        left -= size
    return trees


def passes(model, processor, trees, token_budget, ranks, filler=None):
    """Yield (conversations, their Batch on the device, weight) until all trees have been passed, those alike
    in size together.

    filler: a conversation for passes that only other ranks need (weight 0); default: the first. Nothing in it
    counts as sampled, so that its loss is 0 by itself: 0 times a loss that is not finite would be NaN.
    """
    image_tokens = model.config.vision and model.config.image_tokens(model.vision_frozen)
    image_cost = lambda tree: image_tokens if tree[0].image else 0
    filler = filler or trees[0][0]
    filler = replace(filler, sampled=[False] * len(filler.ids), turns=[])
    trees = [part for tree in trees for part in split_tree(tree, token_budget - image_cost(tree))]
    for group, weight in ranks.lockstep(bucket(trees, token_budget, image_cost), [[filler]]):
        yield sum(group, []), collate(processor, group).to(ranks.device), weight


def parts(places, order, n):
    """Deal n minibatches -> the indices of one's own items in each. So n ranks learn from those of one.

    places: where each item stands among those of all ranks; order: all of these places, as they are dealt.
    """
    own = {place: i for i, place in enumerate(places)}
    return [[own[place] for place in order[k::n] if place in own] for k in range(n)]
