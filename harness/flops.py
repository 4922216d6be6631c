"""Count the FLOPs of training by phase: an x axis that is fair to SFT and PPO. The log holds the
paper's 6 N D (N weights, D tokens) beside it.

    torchrun train.py --task gp-l --algo sft        # log.jsonl: tflops (6 N D), counted_tflops, flops

6 N D (and 2 N D where nothing is learnt) assumes that every parameter works once on every text token. In fact
the embedding table multiplies nothing. The head works only on tokens whose log-prob is needed, and the vision
tower only on images, once per patch. A frozen weight needs no gradient, and attention multiplies without
parameters. So here a forward pass is

    FLOPs = sum over q of  number[q] x rate[q],      q: tokens, pairs of a query and a key that it sees,
                                                        patches, targets, ...

After a step, `quantities` counts number[q] in the conversations. `rates` gets rate[q] from the model's
weights. `of_ppo` and `Ledger.add_sft` say how many passes each network makes. A multiply-add is 2 FLOPs.
Norms, RoPE, softmax and the optimizer are left out (they are no products of matrices). What is counted is
what the maths asks for:

- Padding and hidden keys cost nothing, although CPUs compute them. (The tower's padding does cost: real
  patches see it.)
- A pair takes 2 FLOPs per channel and head for its score and 2 for its value; a query sees the keys up to its
  own. So a rollout with a cache costs one forward pass of what it played, without the last token, which is
  never fed to the model.
- In the backward pass each product leads to two more: one is needed if the weight learns, the other if a
  gradient goes on to the input. So there a part that learns costs twice its forward pass. A frozen part
  (--tune, LoRA's base) costs one forward pass if the gradient goes through it to what learns, else nothing.
  Features of an image that a frozen encoder computed in the rollout cost nothing in the update.
- What the samples of a hand have in common, prompt and image, counts once.
- What is computed a second time to save memory (--checkpoint-activations, scores in flash attention, logits)
  is counted once. A resumed run may change these settings, and the x axis must not change with them.
- Passes that a rank makes only because another has more to do are not counted. So the sum does not depend on
  the number of ranks.
"""

import math
from collections import Counter, defaultdict

from torch import nn

from harness.load import count_parameters
from llama.batches import tree_sizes
from llama.images import Images, best_canvas
from model import CrossLayer
from ppo import count
from rollout import trees_of_hands
from variants import SFT_LOSSES, lora

PHASES = "rollout", "scoring", "update"


# ------------------------------------------------------------------------------------------------------------
# How often

def quantities(config, stem, targets, tiles=0, before=0, encode=True, branches=(), cached=False):
    """Return how much of what a forward pass of a tree does, {quantity: number}. stem, branches: its tokens
    (see llama/batches.py); a conversation by itself is a stem. cached: in a rollout, whose branches continue
    the stem's cache: the last token of the prompt is passed, and the first drawn scored, once for all.

    tokens, pairs: in self-attention layers, and the keys that each of them sees
    targets: tokens whose log-prob is asked
    tiles: of its image that are no padding, 0 for none; before: tokens that precede <|image|> and do not look
    patches, vision tokens, vision pairs: in the tower, if it is to `encode`; it takes all tiles, black ones,
        too, and pads the patches of each: padding sees what is real, which sees everything
    features, image keys: what is projected, and made into keys and values
    looks, glances: in cross-attention layers, tokens from <|image|> on, and what each sees of it
    """
    if cached and branches:
        stem, branches, targets = stem + 1, [n - 1 for n in branches], targets + 1 - len(branches)
    tokens, causal = stem + sum(branches), lambda n: n * (n + 1) // 2
    pairs = causal(stem) + sum(n * stem + causal(n) for n in branches)
    done = Counter({"tokens": tokens, "pairs": pairs, "targets": targets})
    if tiles:
        P, N, looks = config.vision.num_patches, config.vision.max_num_tiles, tokens - before
        real, S = P * tiles, N * (P + -P % 8)
        if encode:
            done |= {"patches": N * (P - 1), "vision tokens": S, "vision pairs": 2 * real * S - real**2}
        done |= {"features": N * P, "image keys": N * P, "looks": looks, "glances": looks * real}
    return done


def passed(config, trees, encode=True, cached=False):
    """Return the quantities of a forward pass of trees."""
    total = Counter()
    for tree in trees:
        first, (stem, branches), targets = tree[0], tree_sizes(tree), sum(sum(c.sampled) for c in tree)
        tiles = before = 0
        if first.image:
            tiles, before = real_tiles(config, first.image), first.ids.index(config.image_token_id)
        total += quantities(config, stem, targets, tiles, before, encode, branches, cached)
    return total


def real_tiles(config, image):
    if isinstance(image, Images):
        return int(image.aspect_ratio_mask.sum())
    return math.prod(best_canvas(*image.size, config.vision.image_size, config.vision.max_num_tiles)[1])


# ------------------------------------------------------------------------------------------------------------
# How many FLOPs each

def linear(rate, layer, flows):
    """Add a linear layer's FLOPs per row of its input to `rate`, [forward, backward]. flows: does a gradient
    go on to that input? Return whether one comes to its output."""
    adapted = isinstance(layer, lora.Adapted)
    weights = [layer.base.weight] + [layer.lora_A, layer.lora_B] * layer.on if adapted else [layer.weight]
    for weight in weights:                                     # before B comes A, which learns
        rate[0] += 2 * weight.numel()
        rate[1] += 2 * weight.numel() * (flows + weight.requires_grad)
        flows = flows or weight.requires_grad
    return flows


def block(layer, token, key, pair, width, flows, seen=None):
    """Add a layer's FLOPs to the rates of a query token, of a token that gives a key and of a pair.

    width: channels of all heads; flows, seen: does a gradient go on to its tokens, and to the image that they
    look at? Return whether one comes to its output.
    """
    attn = layer.self_attn if seen is None else layer.cross_attn
    x = flows or learns(layer.input_layernorm)
    source = x if seen is None else seen
    q = linear(token, attn.q_proj, x)
    k, v = linear(key, attn.k_proj, source), linear(key, attn.v_proj, source)
    pair[0] += 2 * 2 * width                                   # scores, values
    pair[1] += 2 * width * (v + (q or k) + q + k)              # of values, probabilities, queries and keys
    flows = linear(token, attn.o_proj, q or k or v) or flows
    x = flows or learns(layer.post_attention_layernorm)
    *first, last = layer.mlp.children()
    hidden = any([linear(token, one, x) for one in first])
    return linear(token, last, hidden) or flows or learns(layer)


def learns(module):
    return any(weight.requires_grad for weight in module.parameters())


def rates(llama, value_head=(), detached=False):
    """Return the FLOPs of one of each quantity, {quantity: [forward, backward]}, from the weights of a Llama
    (on any device, sharded or not) and of the value head that reads its states."""
    config, rate, seen = llama.config, defaultdict(lambda: [0, 0]), False
    if config.vision:
        tower, width = llama.vision_model, config.vision.hidden_size
        token, pair = rate["vision tokens"], rate["vision pairs"]
        seen = linear(rate["patches"], tower.patch_embedding, False)
        for layer in [*tower.transformer.layers, *tower.global_transformer.layers]:
            seen = block(layer, token, token, pair, width, seen)
        seen = linear(rate["features"], llama.multi_modal_projector, seen)
    flows, width = llama.embed_tokens.weight.requires_grad, config.num_attention_heads * config.head_dim
    for layer in llama.layers:
        if isinstance(layer, CrossLayer):
            flows = block(layer, rate["looks"], rate["image keys"], rate["glances"], width, flows, seen)
        else:
            flows = block(layer, rate["tokens"], rate["tokens"], rate["pairs"], width, flows)
    linear(rate["targets"], llama.lm_head, flows)
    flows = flows and not detached
    for layer in value_head:
        if isinstance(layer, nn.Linear):
            flows = linear(rate["values"], layer, flows)
    return rate


def cost(rate, done, forward=1, backward=0):
    """Return the FLOPs of so many forward and backward passes over what is `done`."""
    return sum(number * (forward * rate[name][0] + backward * rate[name][1]) for name, number in done.items())


def reference(llama):
    """Return the rates of the policy before training: without its adapters, if it has any."""
    with lora.disabled(llama):
        return rates(llama)


# ------------------------------------------------------------------------------------------------------------
# Which passes a step makes

def of_ppo(args, module, estimator, seen, known, values):
    """Return the FLOPs of a rollout and its update: (rollout, scoring, update).

    seen: quantities of all conversations in the rollout; known: in later passes, where the features of a
    frozen encoder are known; values: how many are read, of turns or of tokens.
    """
    trunk, n = module.trunk, args.epochs
    policy = rates(module.policy, () if trunk else module.value_head, module.critic == "detached")
    critic = rates(trunk, module.value_head) if trunk else policy
    states = {name: number for name, number in known.items() if name != "targets"}
    read = {"values": values} | (states if trunk else {})
    update, scoring = cost(policy, known, n, n), cost(policy, known, args.rescore == "on")
    if args.kl_coef:
        scoring += cost(reference(module.policy), known)
    if estimator.values:
        scoring += cost(critic, read | (states if estimator.per == "token" else {}))
        update += cost(critic, read, n, n)
    return cost(policy, seen), scoring, update


# ------------------------------------------------------------------------------------------------------------
# The ledger

class Ledger:
    """FLOPs of a run over all ranks: `total`, {phase: FLOPs}, and by the `formula` of the paper's section 5:

        6 N D_trained + 2 N D_rollout,   N: parameters that work on a token, those of a separate critic, too
    """

    def __init__(self, args, module, ranks):
        self.args, self.module, self.ranks, self.formula = args, module, ranks, 0.0
        self.llama = getattr(module, "policy", module)
        self.size = count_parameters(self.llama, args.task) * (2 if getattr(module, "trunk", None) else 1)
        self.total = dict.fromkeys(PHASES, 0)

    def add_ppo(self, estimator, episodes, trained_tokens):
        """Add a step that learnt from episodes."""
        trees, conversations, seen = self.played(episodes)
        known = passed(self.llama.config, trees, encode=not self.llama.vision_frozen)
        values = count(conversations)[estimator.per]
        spent = of_ppo(self.args, self.module, estimator, seen, known, values)
        passes = 1 + bool(self.args.kl_coef) + (self.args.rescore == "on") + (
            estimator.per == "token" and estimator.values)
        self.add(spent, conversations * passes, trained_tokens)

    def add_sft(self, episodes, examples, trained_tokens):
        """Add a step that learnt from examples; episodes: that were played to find them."""
        _, conversations, seen = self.played(episodes)
        learnt, rate = passed(self.llama.config, [[example] for example in examples]), rates(self.llama)
        before, n = SFT_LOSSES[self.args.sft_loss].before, self.args.epochs
        scoring = cost(reference(self.llama) if before == "initial" else rate, learnt, bool(before))
        spent = cost(rate, seen), scoring, cost(rate, learnt, n, n)
        self.add(spent, conversations + examples * bool(before), trained_tokens)

    def played(self, episodes):
        """Return the trees and conversations of episodes, and the quantities of their rollout."""
        trees = sum(trees_of_hands(episodes), [])
        return trees, sum(trees, []), passed(self.llama.config, trees, cached=True)

    def add(self, own, scored, trained_tokens):
        """Add what all ranks spent, FLOPs per phase; to the formula 2 N per token of what this rank played or
        scored, 6 N per one that all learnt from."""
        *spent, tokens = self.ranks.total([*own, sum(len(c.ids) for c in scored)])
        for phase, number in zip(PHASES, spent):
            self.total[phase] += number
        self.formula += self.size * (2 * tokens + 6 * trained_tokens)

    def summary(self):
        """Return what the log says of it, in TFLOPs since the run began."""
        split = {phase: round(number / 1e12, 6) for phase, number in self.total.items()}
        counted = sum(self.total.values())
        return {"tflops": self.formula / 1e12, "counted_tflops": counted / 1e12, "flops": split}
