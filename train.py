"""Post-train a (vision-)language model on one rule of a game by SFT or by multi-turn PPO, and test it on another.

    torchrun train.py --task gp-vl --algo ppo                          # the built-in tiny model, two CPU cores, minutes
    torchrun train.py --task gp-l --algo sft --steps 200               # the other way to learn
    torchrun train.py --task virl-vl --algo ppo                        # the other game: find the way through a city
    torchrun train.py --task gp-l --algo eval --model runs/gp-l-ppo/final
    python -m study plot runs/gp-l-sft runs/gp-l-ppo                   # ID and OOD success against training compute

This file holds what is around the learning: the tiny model, loading, evaluation, the trainer and its loop. The
games are in envs.py, the model in model.py, the algorithms in sft.py and ppo.py, settings and files in harness/.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import ppo
import sft
from distributed import checkpoint, plan, shard
from distributed.processes import Interrupt, Processes, first, gather, leave, lost
from envs import GAMES, Mixed
from games.prompts import load_prompts
from games.seeds import TRAINING, derive
from harness import files, terminal
from harness.check import attempt, settle
from harness.folder import RunFolder, chosen, git_commit, record_of, write_atomically
from harness.ranges import SettingError, UserError
from harness.settings import GAME_SETTINGS, Args, parse
from llama.config import Config
from llama.processor import Processor
from model import Llama
from study.explain import Probe
from study.flops import Ledger
from variants import lora, official, reference

HERE = Path(__file__).resolve().parent
FOUNDATIONS = HERE / "docs" / "tiny"           # the tiny model's pre-trained weights, a folder a game; remade by --algo pretrain


# ---------------------------------------------------------------------------------------------------------------------
# The run's surroundings

def autocast(args, device):
    """bfloat16 compute over float32 weights on CUDA; nothing elsewhere. A sharded model gathers its weights in bfloat16 by itself."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda" and args.shard != "on")


# ---------------------------------------------------------------------------------------------------------------------
# The game: training and evaluation sets are instances of one class

def make_env(args, **changes):
    """A factory of environments with the run's settings and `changes` to them."""
    game = GAMES[args.game]
    settings = {name: getattr(args, name) for name in GAME_SETTINGS if getattr(args, name) is not None}
    settings |= dict(image=args.image, size=game.sizes[args.preset], prompts=load_prompts(args.prompts) if args.prompts else None) | changes
    return lambda: official.wrap(game(**settings), args.compat)


def training_env(args):
    """The factory of the game that is learnt from: with --rules one rule a seed, else make_env's."""
    if not args.rules:
        return make_env(args)
    factories = [make_env(args, rule=rule) for rule in args.rules.split(",")]
    return lambda: Mixed([make() for make in factories])


def evaluation_sets(args):
    """Name -> factory of the sets in --eval-sets; they are the game's own `shifts` of the training environment."""
    known = GAMES[args.game].shifts(args.rule, args.look, args.image)
    if args.ood_routes:
        known["visual-ood"] = {"look": args.ood_routes}
    return {name: make_env(args, **known[name]) for name in args.eval_sets.split(",")}


def evaluate(model, processor, args, processes, progress=""):
    """Play the fixed hands (or routes) of every evaluation set. Returns {set: {success, first, per_step, recognized, reward, n, ..., and of each
    hand: solved (0 or 1), right and answers (how many)}}.

    success: solved, a route with every point right, within the attempts; first: without one wrong answer; both with the binomial
    standard error sqrt(P(1-P)/N). per_step: share of all answers that are right; its error counts episodes, not answers, as
    independent. recognized: share of answers whose cards or observation are right (landmarks: of those given at a landmark);
    reward: mean sum of rewards of an episode.
    """
    results = {}
    for name, factory in evaluation_sets(args).items():
        seeds = processes.share(range(min(args.eval_hands, factory().distinct)))       # no route is walked twice
        with autocast(args, processes.device), shard.for_rollout(model, processes.largest, args.rollout_sharded) as player:
            episodes = ppo.rollout(player, processor, factory, seeds, temperature=args.eval_temperature,
                                   batch=args.rollout_batch, max_new_tokens=args.max_new_tokens, device=processes.device)
        r = summarize(episodes, processes)
        of_each = sorted(gather([(episode.seed, int(episode.success), *right_answers(episode)) for episode in episodes]))
        results[name] = r | dict(zip(("solved", "right", "answers"), list(zip(*of_each))[1:]))
        rates = "   ".join(f"{what} {100 * r[key]:5.1f} ± {100 * r[key + '_se']:.1f} %" for what, key in (
            ("success", "success"), ("first try", "first"), ("per step", "per_step")))
        at_landmarks = f" (at landmarks {100 * r['landmarks']:.1f} %)" if "landmarks" in r else ""
        processes.print(f"{progress}  {name:<10}  {rates}   {GAMES[args.game].recognition} {100 * r['recognized']:5.1f} %{at_landmarks}   "
                        f"reward {r['reward']:+6.2f}   N {r['n']}")
    return results


def judged(episode):
    """Its turns but for those that --compat leaves without a verdict."""
    return [turn for turn in episode.turns if turn.info["verdict"] != "unjudged"]


def right_answers(episode):
    """(right answers, all answers) of an episode."""
    return sum(turn.info["correct"] for turn in judged(episode)), len(judged(episode))


def summarize(episodes, processes):
    """Rates over all episodes of all ranks."""
    turns = [turn for episode in episodes for turn in judged(episode)]
    right = [right_answers(episode) for episode in episodes]
    sums = lambda width, rows: [sum(column) for column in zip([0.0] * width, *rows)]          # a rank may have no episode
    counts = sums(3, [(1, e.success, e.success and k == m) for e, (k, m) in zip(episodes, right)])
    counts += sums(3, [(1, turn.info["recognized"], turn.reward) for turn in turns])
    counts += sums(2, [(1, turn.info["recognized"]) for turn in turns if turn.info.get("landmark")])
    counts += sums(4, [(k, k * k, k * m, m * m) for k, m in right])
    n, success, first, n_turns, recognized, reward, landmarks, read, k, kk, km, mm = processes.all_reduce(
        torch.tensor(counts, dtype=torch.float64)).tolist()
    rate = lambda name, p: {name: p, f"{name}_se": math.sqrt(p * (1 - p) / n)}
    p = k / n_turns                                                        # a ratio of two sums over episodes: its error by linearisation
    return rate("success", success / n) | rate("first", first / n) | {
        "per_step": p, "per_step_se": math.sqrt(max(0.0, kk - 2 * p * km + p * p * mm)) / n_turns,
        "recognized": recognized / n_turns, "reward": reward / n, "turns": n_turns / n, "n": int(n)} | (
        {"landmarks": read / landmarks} if landmarks else {})


# ---------------------------------------------------------------------------------------------------------------------
# The tiny model: a from-scratch Llama-Vision in an ordinary Hugging Face folder

TINY = {
    "model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"], "torch_dtype": "float32",
    "image_token_index": 1024,
    "text_config": {
        "model_type": "mllama_text_model", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 6, "cross_attention_layers": [2], "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 4, "pad_token_id": 5},
    "vision_config": {
        "model_type": "mllama_vision_model", "image_size": 56, "patch_size": 14, "num_channels": 3, "hidden_size": 96,
        "attention_heads": 4, "intermediate_size": 192, "num_hidden_layers": 2, "num_global_layers": 1,
        "intermediate_layers_indices": [1, 2], "max_num_tiles": 4, "vision_output_dim": 288, "norm_eps": 1e-5,
        "hidden_act": "gelu",
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]},
}
TINY_IMAGES = {"size": {"height": 56, "width": 56}, "max_image_tiles": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>"]
INIT_STEPS = 60                                # SFT steps from the foundation to the paper's init


def foundation_mixture(args):
    """What the tiny model is 'pre-trained' on, half in text, half in images: the game under all rules and many looks (its `broad`).

    The paper's Llama comes to the game with arithmetic, with words and with eyes; this stands for that. Returns the
    mixture of sft.make_batch: (environment, weight) pairs; with --describe of pictures to describe alone.
    """
    return [(make_env(args, **settings)(), weight) for weight, settings in GAMES[args.game].broad()
            if settings.get("describe") or not args.describe]


# What the tiny tokenizer keeps apart: numbers, operators and card letters; words that differ from route to route.
APART = {"gp": r"\d+|[-+*/()=]|(?<![A-Za-z])[AJQK](?![A-Za-z])",
         "virl": r"\d+| [A-Z][a-z]+(?= is on)| [A-Z][a-z]+(?= [A-Z][a-z]+ is on)|[A-Z][a-z]+(?= [A-Z])"      # the words of a name
                 r"|\b(?:north|south)?(?:east|west|north|south)\b|\b(?:slightly|left|right|front|behind)\b"}


def train_tokenizer(mixture, vocab_size, apart):
    """Byte-level BPE on the environments' own text. What matches `apart` stays in tokens of its own; all else, spaces
    included, may merge, so that a prompt costs the tiny model some dozen tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(apart), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    dialogues = [env.demonstrate(TRAINING + k, mistakes=k % env.attempts)
                 for k in range(40) for env, _ in mixture]
    texts = [ppo.readable(message["content"]).replace("<image>", "") for said in dialogues for message in said]
    texts += ["user", "assistant", "\n\n"] * 500
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    fillers = [f"<|reserved_{i}|>" for i in range(vocab_size - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in fillers + ["<|image|>"]])   # its id: vocab_size
    return tokenizer


def prepare_tiny(args, processes):
    """Folder of the tiny model's init checkpoint for this game: the foundation after the paper's brief SFT on it.

    Made on first use and kept in runs/, by a name that follows from the foundation's weights and the game.
    """
    foundation = FOUNDATIONS / args.game
    if not (foundation / "model.safetensors").exists():
        raise UserError(f"{foundation}: no tiny model there; take it from git, or make it anew as the README.md there says")
    game = {name: getattr(args, name) for name in (
        "task", "rule", "look", "target", "routes", "skip_bad_routes", "hide_landmarks", "describe")}
    game["seed"] = derive("init")              # no run's own: what init has learnt from, none begins with
    digest = hashlib.sha256((foundation / "model.safetensors").read_bytes() + repr(game).encode()).hexdigest()[:8]
    ready = Path("runs") / f"init-{args.task}-{digest}"
    if first((ready / "final").exists):
        return ready / "final"
    processes.print(f"first use of tiny on {args.task}: making its init checkpoint, {INIT_STEPS} SFT steps, in "
                    f"{ready}")
    with contextlib.ExitStack() as stack:      # another run may be making it, too: the first to end wins
        private = first(lambda: stack.enter_context(files.aside(ready, "final")))
        init = Args(algo="sft", model=str(foundation), out=str(private), steps=INIT_STEPS, eval_every=0,
                    eval_hands=0, device=args.device, **game)
        agree(processes, init)
        ended = train(init, processes)
        if not ended:
            raise UserError("interrupted before the init checkpoint was ready; the next run makes it anew")
    processes.barrier()                                        # until it has its name
    return ready / "final"


def agree(processes, args, typed=frozenset(), newest=None):
    """Settle `args` on all ranks (harness/check.py). If one refuses, all raise the same SettingError.

    newest: the checkpoint that is resumed.
    """
    refusal = None
    try:
        settle(args, config_of(args, processes, newest), typed, processes.world)
    except SettingError as error:
        refusal = str(error)
    refusals = [text for text in gather([refusal]) if text]
    if refusals:
        raise SettingError(refusals[0])


def config_of(args, processes, newest=None):
    """Read the model's Config, without its weights; of a checkpoint only if it is as it was written."""
    if args.model == "tiny" and not newest:
        return Config.from_dict(TINY)
    if not newest:                             # `RunFolder.resume` has looked at the other
        verify(args.model, processes)
    expected = "tiny, a checkpoint or a folder with a config.json"
    return attempt(args, "model", expected, Config.from_pretrained, newest or args.model)


def verify(folder, processes):
    if checkpoint.is_checkpoint(folder):
        checkpoint.Checkpoints(Path(folder).parent, processes.rank, processes.world).verify(Path(folder))


def load(args, processes, resumed=None):
    """Return model, processor and folder of the weights of a run with complete settings. A model that is to be
    sharded comes without its weights; so does that of a run that is resumed from the checkpoint `resumed`."""
    if args.algo == "pretrain" and args.model == "tiny" and not resumed:
        args.shard = sharding(args, 0, processes)
        config, everything = Config.from_dict(TINY), foundation_mixture(dataclasses.replace(args, describe=None))
        processor = Processor(train_tokenizer(everything, config.vocab_size, APART[args.game]), image_config=TINY_IMAGES)
        model = Llama(config)
        model.init_weights(seed=derive("weights", args.seed))
        for name, parameter in model.named_parameters():
            if "gate" in name.split(".")[-1] and parameter.numel() == 1:
                torch.nn.init.constant_(parameter, 0.5)        # Llama grafted its eyes on with closed gates; these grow together
        return model.to(processes.device), processor, None
    if resumed and (compares_with_start(args) or args.probe_hands) and not args.lora_rank:           # load that; Trainer.restore does the rest
        folder, resumed = Path(str(record_of(resumed)["began"])), None
        verify(folder, processes)
    else:
        folder = resumed or (prepare_tiny(args, processes) if args.model == "tiny" else Path(args.model))
    with torch.device("meta"):
        model = Llama(Config.from_pretrained(folder))
    args.shard = sharding(args, sum(p.numel() for p in model.parameters()), processes)
    trained = record_of(folder)["config"] if checkpoint.is_checkpoint(folder) and not resumed else {}
    if trained.get("lora_rank"):
        if args.shard == "on":
            raise UserError(f"{folder} holds adapters beside the weights; with --shard on take the run's final/, in which they are merged")
        choose_what_learns(model, argparse.Namespace(**dataclasses.asdict(Args()) | trained))
    if args.shard == "off" and checkpoint.is_checkpoint(folder):
        shard.fill(model, None if resumed else folder, processes.device)
        lora.merge(model)
    elif args.shard == "off":
        model = Llama.from_pretrained(folder, device=processes.device, dtype=torch.float32)
    processor = Processor.from_pretrained(folder, model.config, images=args.image)
    return model, processor, None if resumed else folder


def compares_with_start(args):
    """Does the run need the policy that it began with, for a KL penalty or an SFT loss?"""
    return bool(args.kl_coef) if args.algo == "ppo" else sft.LOSSES[args.sft_loss].before == "initial"


def choose_what_learns(model, args):
    """Leave to learn what --tune and --lora-* say. What LoRA adds comes from args.seed, or from a checkpoint afterwards."""
    sft.freeze(model, args.tune)
    if args.lora_rank:
        lora.adapt(model, args.lora_modules, args.lora_rank, args.lora_alpha, derive("adapters", args.seed))


def sharding(args, size, processes):
    """What --shard comes to, on or off, for a model of `size` parameters."""
    possible = processes.world > 1 and args.algo != "pretrain" and not args.lora_rank
    auto = "on" if possible and (processes.device.type == "cuda" or size > 10**8) else "off"
    return auto if args.shard == "auto" else args.shard


# ---------------------------------------------------------------------------------------------------------------------
# Training

class Trainer:
    """The model with its optimizer and the state that a checkpoint holds. `update(i)` makes the i-th step.

    All randomness of step i derives from (seed, i), so there is no generator state to save.
    """

    def __init__(self, args, model, processor, processes, folder=None):
        self.args, self.model, self.processor, self.processes = args, model, processor, processes
        choose_what_learns(model, args)
        torch.manual_seed(derive("critic", args.seed))         # of the value head's first weights
        self.module = ppo.ActorCritic(model, args.critic) if args.algo == "ppo" else model
        if args.shard == "on":
            shard.shard(self.module, folder, processes.device, processes.world)
        else:
            self.module.to(processes.device)
        if args.checkpoint_activations:
            shard.checkpoint_activations(self.module)
        self.ledger = Ledger()                 # FLOPs counted, beside self.compute
        self.pace = self.ledger.paced(functools.partial(shard.pace, agree=processes.largest))
        self.began = folder and str(folder)    # the weights of step 0, for a resumed run's reference
        self.reference = self.probe = None
        if compares_with_start(args) or args.probe_hands:      # a context in which the model is the one that the run began with
            start = functools.partial(lora.disabled, model) if args.lora_rank else reference.initial(model)
            self.reference = start if compares_with_start(args) else None
            sets = evaluation_sets(dataclasses.replace(args, eval_sets="id,rule-ood"))
            self.probe = Probe(args, model, processor, processes, sets, start, args.probe_hands, args.probe_samples) if args.probe_hands else None
        policy = [p for p in model.parameters() if p.requires_grad]
        known = {id(p) for p in model.parameters()}
        critic = [p for p in self.module.parameters() if id(p) not in known and p.requires_grad]
        groups = [dict(params=policy, peak=args.lr)] + ([dict(params=critic, peak=args.critic_lr)] if critic else [])
        muon = matrices(model) if args.algo == "pretrain" else []
        groups[0]["params"] = [p for p in policy if all(p is not matrix for matrix in muon)]
        self.optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), eps=args.adam_eps, weight_decay=args.weight_decay)]
        if muon:
            group = dict(params=muon, peak=args.lr)
            self.optimizers.append(torch.optim.Muon([group], lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"))
        self.env = training_env(args)
        self.mixture = foundation_mixture(args) if args.algo == "pretrain" else [(self.env(), 1.0)]
        self.policy_size = count_parameters(model, args.task)
        self.critic_size = self.policy_size if args.algo == "ppo" and args.critic == "separate" else 0
        self.compute = 0.0                     # training compute in FLOPs: 6 N D_trained + 2 N D_rollout (paper, section 5)
        self.skipped = self.skipped_in_a_row = 0               # optimizer steps without a finite loss and gradient
        self.batch = None                      # the episodes or examples of this step

    @property
    def groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def update(self, i):
        """Learn once. Returns the metrics."""
        progress = i / self.args.steps
        scale = min(1.0, (i + 1) / max(1.0, self.args.warmup * self.args.steps))
        if self.args.lr_schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.groups:
            group["lr"] = group["peak"] * scale
        metrics = self.ppo_update(i) if self.args.algo == "ppo" else self.sft_update(i)
        self.ledger.settle(self.processes.all_reduce)
        return metrics

    def seeds(self, i, n):
        """Return the n seeds of step i. A run's are consecutive: so it walks all routes equally often."""
        first = TRAINING + derive("hands", self.args.seed) // 4 + i * n        # there are 2**61 up to 2**63
        return range(first, first + n)

    def sft_update(self, i):
        """Learn from dialogues of the expert, or from the right ones among the model's own."""
        args, processes, scored = self.args, self.processes, 0
        seeds, places = (processes.share(x) for x in (self.seeds(i, args.batch_size), range(args.batch_size)))
        if args.sft_data == "own":
            episodes = self.play(seeds)
            scored += sum(len(c.ids) for episode in episodes for c in episode.conversations)
            right = [sft.own_answers([episode]) for episode in episodes]
            examples, places = sum(right, []), processes.places(map(len, right))
        else:
            examples = sft.make_batch(self.processor, self.mixture, seeds, args.mistakes, args.learn_prompts)
        spare = examples[0] if examples else sft.make_example(self.processor, self.env(), seeds[0])
        self.batch, how = examples, dict(pace=self.pace, device=processes.device)
        if sft.LOSSES[args.sft_loss].before:
            scored += sum(len(example.ids) for example in examples)
        if self.reference:
            with autocast(args, processes.device), self.reference(), self.ledger.phase("update", self.model):
                sft.score(self.model, self.processor, examples, spare, args, **how)
        with autocast(args, processes.device), self.ledger.phase("update", self.model):
            metrics = sft.update(self.model, self.processor, examples, args, step=self.step, places=places,
                                 spare=spare, all_reduce=processes.all_reduce, **how)
        scored = processes.all_reduce(torch.tensor(scored, dtype=torch.float64)).item()
        self.compute += self.policy_size * (6 * metrics["trained_tokens"] + 2 * scored)
        return metrics

    def play(self, seeds, samples=1):
        """A rollout of the training game."""
        args, device = self.args, self.processes.device
        with (autocast(args, device),
              shard.for_rollout(self.model, self.processes.largest, args.rollout_sharded) as player,
              self.ledger.phase("rollout", player)):
            return ppo.rollout(player, self.processor, self.env, seeds, samples=samples, device=device,
                               temperature=args.temperature, batch=args.rollout_batch,
                               max_new_tokens=args.max_new_tokens,
                               keep_features=args.algo == "ppo" and self.model.vision_frozen)

    def ppo_update(self, i):
        """Play, and learn from what was played."""
        args, processes, start = self.args, self.processes, time.time()
        hands = processes.share(self.seeds(i, args.hands))     # all samples of a hand are on one rank
        episodes = self.play(hands, args.samples)
        of_hands = [episodes[k:k + args.samples] for k in range(0, len(episodes), args.samples)]
        places = processes.places(len(ppo.conversations_of(group)) for group in of_hands)
        rolled, self.batch = time.time(), episodes
        # autocast anew: what the rollout cast to bfloat16 can have no gradients
        with autocast(args, processes.device), self.ledger.phase("update", self.module):
            metrics = ppo.update(
                self.module, self.processor, episodes, args, step=self.step,
                seed=derive("minibatches", args.seed, i), train_policy=i >= args.critic_warmup,
                reference=self.reference, places=places, all_reduce=processes.all_reduce, pace=self.pace,
                device=processes.device)
        revised = [episode for episode in episodes if len(episode.turns) > 1]
        self.sample = (revised or episodes)[0]
        estimator, tokens = ppo.ESTIMATORS[args.advantage], metrics["rollout_tokens"]
        scored = tokens * ((self.reference is not None) + (estimator.per == "token" and estimator.values))
        passes = 2 * (tokens + scored) + 6 * metrics["trained_tokens"]
        self.compute += (self.policy_size + self.critic_size) * passes
        summary = summarize(episodes, processes)
        told = ("success", "first", "per_step", "recognized", "landmarks", "reward", "turns")
        return metrics | {name: summary[name] for name in told if name in summary} | {
            "rollout_seconds": rolled - start, "update_seconds": time.time() - rolled,
            "rollout_tokens_per_second": metrics["drawn_tokens"] / (rolled - start)}

    def evaluate(self, folder, i):
        """Evaluate after i steps, print and log."""
        if self.args.eval_hands:
            results = evaluate(self.model, self.processor, self.args, self.processes, f"step {i:>4}")
            with autocast(self.args, self.processes.device):
                probe = {"probe": self.probe(f"step {i:>4}")} if self.probe else {}
            folder.log(event="eval", step=i, tflops=self.compute / 1e12, counted_tflops=self.ledger.tflops, eval=results, **probe)

    def step(self, loss):
        """Sum gradients over ranks, clip, step; policy and critic are clipped apart. Returns the policy's gradient norm.

        loss: over all ranks. A loss or a gradient that is not finite on one rank is not on any (they are sums), so that all skip the
        step. FloatingPointError after --max-skipped of them in a row.
        """
        norms = []
        for group in self.groups:                  # a sharded model's gradients are sums already
            learning = group["params"] if self.args.shard == "on" else self.processes.sum_gradients(group["params"])
            norms.append(float(shard.clip(learning, self.args.max_grad_norm)))
        finite = all(math.isfinite(x) for x in [loss, *norms])
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()               # of weights in bfloat16, which have just changed
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == self.args.max_skipped:
            raise FloatingPointError(f"{self.skipped_in_a_row} steps in a row without a finite loss and gradient (loss {loss}, norms {norms})")
        return norms[0]

    def record(self, i):
        """What a checkpoint holds beside tensors. i: steps done. Of random numbers there is no state: those of a step derive from (seed, i)."""
        return {"step": i, "compute": self.compute, "flops": self.ledger.total, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row,
                "began": self.began, "config": dataclasses.asdict(self.args)}

    def restore(self, checkpoints, path):
        """Go on from a checkpoint. Returns the number of steps done."""
        record = checkpoints.load(path, self.module, self.optimizers)
        self.compute, self.ledger.total, self.skipped, self.skipped_in_a_row, self.began = (
            record[name] for name in ("compute", "flops", "skipped", "skipped_in_a_row", "began"))
        return record["step"]


def matrices(model):
    """The weight matrices of the layers: what Muon (Jordan et al. 2024) steps in pre-training; AdamW steps the rest."""
    return [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]


def count_parameters(model, task):
    """Parameters that work on a token: N of the paper's 6ND. Text tasks use neither the vision tower nor cross-attention."""
    blind = ("vision_model.", "multi_modal_projector.", *(f"layers.{i}." for i in model.config.cross_attention_layers))
    return sum(p.numel() for name, p in model.named_parameters() if task.endswith("vl") or not name.startswith(blind))


def describe(i, args, metrics, seconds_left):
    """The line a person reads."""
    if args.algo == "ppo":
        m = metrics
        ev = "" if math.isnan(m["explained_variance"]) else f"ev {m['explained_variance']:+.2f}  "          # an estimator may ask no critic
        body = (f"reward {m['reward']:+6.2f}  success {100 * m['success']:5.1f} %  per step {100 * m['per_step']:5.1f} %  kl {m['approx_kl']:.1e}  "
                f"clip {100 * m['clipfrac']:4.1f} %  {ev}entropy {m['entropy']:.2f}  "
                f"grad {m['grad_norm']:.2f}  {m['rollout_tokens_per_second']:,.0f} tok/s")
    elif metrics["nll"] is None:
        body = "nothing to learn from"
    else:
        body = f"nll {metrics['nll']:.4f}  entropy {metrics['entropy']:.3f}  grad {metrics['grad_norm']:.2f}  {metrics['tokens_per_second']:,.0f} tok/s"
    if metrics["empty_minibatches"]:
        body += f"  empty {metrics['empty_minibatches']}"
    if metrics["skipped"]:
        body += f"  skipped {metrics['skipped']}"
    return f"step {i:>4}/{args.steps}  {body}  left {int(seconds_left) // 60}:{int(seconds_left) % 60:02d}"


def train(args, processes, typed=frozenset()):
    """Do one run, from loading to the final folder. Return whether it came to its end.

    args: complete (`agree`), but for a run that is resumed; typed: names of the settings that the user gave.
    """
    folder, newest = RunFolder(args, processes), None
    if args.resume:
        newest, args = folder.resume(args, typed)
        agree(processes, args, typed, newest)
    processes.barrier()                        # nobody writes before all have looked
    model, processor, weights = load(args, processes, newest)
    trainer = Trainer(args, model, processor, processes, weights)
    start = trainer.restore(folder.checkpoints, newest) if newest else 0
    folder.start(args, start)
    processes.print(f"{args.task} {args.algo}: {sum(p.numel() for p in model.parameters()):,} parameters on {processes.hardware}; "
                    f"steps {start} to {args.steps}; log in {folder.path}")
    if start == 0 and not args.skip_first_eval:
        trainer.evaluate(folder, 0)
    with Interrupt(processes) as interrupt:
        done = loop(trainer, folder, start, interrupt)
        folder.checkpoints.finish()
    if done < args.steps:
        processes.print(f"stopped after step {done}; continue with --resume --out {folder.path}")
        return False
    half = args.algo == "pretrain"                             # the size in git
    folder.save_final(model.to(torch.bfloat16) if half else model, processor, args.shard == "on")
    processes.print(f"weights in {folder.path / 'final'}")
    return True


def loop(trainer, folder, start, interrupt):
    """Steps `start` to the last, with what is printed, logged and saved on the way. Returns the number of steps done."""
    args, processes, begun = trainer.args, trainer.processes, time.time()
    for i in range(start + 1, args.steps + 1):
        before = time.time()
        try:
            metrics = trainer.update(i - 1)
        except FloatingPointError as error:
            folder.checkpoints.finish()
            raise UserError(f"step {i}: {error}; what it was learning from is in {folder.dump(i, trainer.batch)}") from error
        metrics |= {"seconds": time.time() - before, "skipped": trainer.skipped, "memory_gb": processes.memory() / 1e9}
        metrics["tokens_per_second"] = metrics["trained_tokens"] / metrics["seconds"]
        processes.print(describe(i, args, metrics, (time.time() - begun) / (i - start) * (args.steps - i)))
        folder.log(event="step", step=i, tflops=trainer.compute / 1e12, **trainer.ledger.summary(), lr=trainer.groups[0]["lr"], **metrics)
        if args.algo == "ppo" and i % args.transcript_every == 0:
            folder.transcript(i, trainer.sample)
        last, stop = i == args.steps, interrupt.agreed()
        if last or (args.eval_every and i % args.eval_every == 0 and not stop):
            trainer.evaluate(folder, i)
        folder.checkpoints.poll()
        if last or stop or i % args.save_every == 0:
            folder.save(trainer, i)
        if stop:
            return i
    return args.steps


def evaluate_only(args, processes):
    """--algo eval: print and save the evaluation of a checkpoint."""
    model, processor, weights = load(args, processes)
    if args.shard == "on":
        shard.shard(model, weights, processes.device, processes.world)
    results = evaluate(model, processor, args, processes)
    if processes.rank == 0:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        record = {"config": dataclasses.asdict(args), "commit": git_commit(), "hardware": processes.hardware, "eval": results}
        write_atomically(Path(args.out) / "eval.json", files.to_json(record, indent=2))


def main(argv=None):
    processes = None
    try:
        args, typed = parse(argv, __doc__)
    except SettingError as error:
        refuse(error, Processes("cpu"))
    try:
        if args.dry_run:
            return plan.show(args, typed, args.dry_run)
        processes = Processes(args.device)
        if args.algo == "eval" or not args.resume:             # else `train` reads the run's settings
            agree(processes, args, typed)
        with chosen(args, processes):
            if args.algo == "eval":
                evaluate_only(args, processes)
            else:
                train(args, processes, typed)
    except BrokenPipeError:
        raise
    except SettingError as error:
        refuse(error, processes)
    except Exception as error:
        message = explain(error, args)
        if message is None or os.environ.get("DEBUG"):
            traceback.print_exc()
        leave(message or f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; checkpoints that were written before can be resumed")
    if dist.is_initialized():
        dist.destroy_process_group()


def refuse(error, processes):
    """End all processes with one line of the first, for each has the same to say; None: this one alone."""
    if not processes or processes.rank == 0:
        print(f"train.py: error: {terminal.visible(str(error))}", file=sys.stderr, flush=True)
    if processes:
        processes.barrier()                    # else torchrun might stop the first before it has printed
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(2)


def explain(error, args):
    """What happened and what to do, in one line; None for an error that this program did not expect."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"{str(error).splitlines()[0]} A smaller --rollout-batch or --token-budget, or --checkpoint-activations, takes less; --dry-run shows what takes it"
    if isinstance(error, RuntimeError) and lost(error):
        return (f"lost another rank, which may have said why ({str(error).splitlines()[0][:160]}); torchrun --max-restarts N goes on by itself from the last "
                f"checkpoint, else add --resume --out {args.out}")
    return str(error) if isinstance(error, (UserError, OSError, ValueError)) else None


if __name__ == "__main__":
    terminal.command(main)
