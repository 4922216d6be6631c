"""Post-train a (vision-)language model on one rule of a game by SFT or PPO, and test it on another rule.

    torchrun train.py --task gp-vl --algo ppo                   # the built-in tiny model, on a CPU, minutes
    torchrun train.py --task gp-l --algo sft --steps 200        # the other way to learn
    torchrun train.py --task virl-vl --algo ppo                 # the other game: find the way through a city
    torchrun train.py --task gp-l --algo eval --model runs/gp-l-ppo/final
    python -m study plot runs/gp-l-sft runs/gp-l-ppo            # ID and OOD success against training compute

The games are in envs.py, the model in model.py, the algorithms in rollout.py, ppo.py and sft.py. This file
builds them for the settings of a run and steps through it. Settings, loading, evaluation and files: harness/.
"""

import contextlib
import dataclasses
import math
import time

import harness  # noqa: F401, before torch: see there
import torch

import ppo
import sft
from distributed import checkpoint, shard
from distributed.processes import interruptible
from games.seeds import TRAINING, derive
from harness import terminal, tiny
from harness.environments import training_env, training_mixture
from harness.evaluation import evaluate, evaluate_alone, play, summarize
from harness.flops import Ledger
from harness.folder import RunFolder
from harness.launch import launch
from harness.load import agree, autocast, build, load, optimizers, policy_to_compare_with
from harness.progress import describe
from harness.ranges import UserError
from llama.frozen import remember
from variants import SFT_LOSSES, algorithm
from variants.own_answers import own_answers
from variants.reference import rescore, score, score_reference


# ------------------------------------------------------------------------------------------------------------
# A run

def train(args, processes, typed=frozenset()):
    """Do one run, from loading to the final folder. Return whether it came to its end.

    args: settled (`agree`); those of a run that is resumed are read from its checkpoint here. typed: names of
    the settings that the user gave.
    """
    folder = RunFolder(args, processes)
    newest = None
    if args.resume:
        newest, args = folder.resume(args, typed)
        agree(processes, args, typed, newest)
    processes.barrier()                        # no rank writes before all have looked
    init_folder = None if newest else tiny.first_weights(args, processes, learn)
    model, processor, weights_folder = load(args, processes, init_folder, newest)
    trainer = Trainer(args, model, processor, processes, weights_folder)
    start = trainer.restore(newest) if newest else 0
    folder.start(args, start)
    size = sum(p.numel() for p in model.parameters())
    processes.print(f"{args.task} {args.algo}: {size:,} parameters on {processes.hardware}; steps {start} to "
                    f"{args.steps}; log in {folder.path}")
    if start == 0 and not args.skip_first_eval:
        trainer.evaluate(folder, 0)
    with interruptible(processes) as interrupted:
        done = loop(trainer, folder, start, interrupted)
        folder.checkpoints.finish()
    if done < args.steps:
        processes.print(f"stopped after step {done}; continue with --resume --out {folder.path}")
        return False
    folder.save_final(model, processor, args)
    processes.print(f"weights in {folder.path / 'final'}")
    return True


def loop(trainer, folder, start, interrupted):
    """Make the steps from `start` to the last; print, log, evaluate and save on the way. Return how many are
    done."""
    args, processes = trainer.args, trainer.processes
    t0 = time.time()
    for i in range(start + 1, args.steps + 1):
        before = time.time()
        metrics = trainer.update(i - 1)
        metrics |= {"seconds": time.time() - before, "skipped": trainer.skipped,
                    "memory_gb": processes.memory() / 1e9}
        metrics["tokens_per_second"] = metrics["trained_tokens"] / metrics["seconds"]
        processes.print(describe(i, args, metrics, (time.time() - t0) / (i - start) * (args.steps - i)))
        folder.log(event="step", step=i, **trainer.ledger.summary(), lr=trainer.groups[0]["lr"], **metrics)
        if args.algo == "ppo" and i % args.transcript_every == 0:
            folder.transcript(i, trainer.for_transcript)
        last = i == args.steps
        stop = interrupted()
        if last or (args.eval_every and i % args.eval_every == 0 and not stop):
            trainer.evaluate(folder, i)
        if last or stop or i % args.save_every == 0:
            folder.save(trainer, i)
        if stop:
            return i
    return args.steps


# ------------------------------------------------------------------------------------------------------------
# What learns

class Trainer:
    """The model with its optimizer and the state that a checkpoint holds. `update(i)` makes step i, counted
    from 0; elsewhere i is the number of steps done.

    All randomness of step i derives from (seed, i), so there is no generator state to save.
    """

    def __init__(self, args, model, processor, processes, weights_folder=None):
        self.args, self.model, self.processor, self.processes = args, model, processor, processes
        self.module = build(args, model, processes, weights_folder)
        self.optimizers = optimizers(args, model, self.module)
        if args.rescore == "auto":
            args.rescore = "on" if processes.device.type == "cuda" else "off"
        if args.algo == "ppo":
            self.estimator, self.loss = algorithm(args)
        self.ledger = Ledger(args, self.module, processes)     # of FLOPs
        self.began = weights_folder and str(weights_folder)    # where weights lay before step 1
        self.reference = policy_to_compare_with(args, model)   # the policy as it began, or None
        self.make_env = training_env(args)
        self.mixture = training_mixture(args)
        self.skipped = self.skipped_in_a_row = 0               # steps without a finite loss and gradient

    @property
    def groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def update(self, i):
        """Set the learning rate and make step i. Return the metrics."""
        progress = i / self.args.steps
        scale = min(1.0, (i + 1) / max(1.0, self.args.warmup * self.args.steps))
        if self.args.lr_schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.groups:
            group["lr"] = group["peak"] * scale
        return self.ppo_update(i) if self.args.algo == "ppo" else self.sft_update(i)

    def seeds(self, i, n):
        """Return the n seeds of step i. They go on from step to step, so all routes are walked equally
        often."""
        # derive is below 2**63, so that a run starts below TRAINING + 2**61 and stays below 2**63
        first = TRAINING + derive("hands", self.args.seed) // 4 + i * n
        return range(first, first + n)

    def sft_update(self, i):
        """Learn from dialogues of the expert, or from the right ones among the model's own."""
        args, processes = self.args, self.processes
        episodes = []
        seeds = processes.share(self.seeds(i, args.batch_size))
        places = processes.share(range(args.batch_size))       # of these examples among those of all ranks
        if args.sft_data == "own":
            episodes = self.play(seeds)
            right = [own_answers([episode]) for episode in episodes]
            examples, places = sum(right, []), processes.positions(map(len, right))
        else:
            examples = sft.make_batch(self.processor, self.mixture, seeds, args.mistakes, args.learn_prompts)
        filler = examples[0] if examples else sft.make_example(self.processor, self.make_env(), seeds[0])
        loss = SFT_LOSSES[args.sft_loss]
        with autocast(args, processes.device):
            if loss.before:                    # the loss compares with an earlier model: note its log-probs
                with self.reference() if loss.before == "initial" else contextlib.nullcontext():
                    score(self.model, self.processor, [[example] for example in examples], args.token_budget,
                          ranks=processes, filler=filler)
            metrics = sft.update(self.model, self.processor, examples, args, loss=loss.f, step=self.step,
                                 places=places, filler=filler, ranks=processes)
        self.ledger.add_sft(episodes, examples, metrics["trained_tokens"])
        return metrics

    def play(self, seeds, samples=1, features=None):
        """Return a rollout of the training game. features: see harness/evaluation.py."""
        return play(self.model, self.processor, self.args, self.processes, self.make_env, seeds,
                    self.args.temperature, samples, features)

    def ppo_update(self, i):
        """Play, and learn from what was played."""
        args, processes = self.args, self.processes
        start = time.time()
        features = {} if self.model.vision_frozen else None    # shared by rollout and update
        hands = processes.share(self.seeds(i, args.hands))     # all samples of a hand are on one rank
        episodes = self.play(hands, args.samples, features)
        rolled = time.time()
        scored = {}
        # not the rollout's context: the weights that it cast to bfloat16 carry no gradient
        with autocast(args, processes.device), remember(self.module, features):
            if args.rescore == "on":
                scored |= rescore(self.model, self.processor, episodes, args, processes)
            if self.reference:
                scored |= score_reference(self.model, self.processor, episodes, args, self.reference,
                                          processes)
            metrics = ppo.update(
                self.module, self.processor, episodes, args, estimator=self.estimator, loss=self.loss,
                step=self.step, seed=derive("minibatches", args.seed, i), ranks=processes) | scored
        revised = [episode for episode in episodes if len(episode.turns) > 1]
        self.for_transcript = (revised or episodes)[0]
        self.ledger.add_ppo(self.estimator, episodes, metrics["trained_tokens"])
        summary = summarize(episodes)
        told = ("success", "first", "per_step", "recognized", "landmarks", "reward", "turns")
        return metrics | {name: summary[name] for name in told if name in summary} | {
            "rollout_seconds": rolled - start, "update_seconds": time.time() - rolled,
            "rollout_tokens_per_second": metrics["drawn_tokens"] / (rolled - start)}

    def evaluate(self, folder, i):
        """Evaluate after i steps, print and log."""
        if self.args.eval_hands:
            results = evaluate(self.model, self.processor, self.args, self.processes, f"step {i:>4}")
            folder.log(event="eval", step=i, **self.ledger.summary(), eval=results)

    def step(self, loss):
        """Sum gradients over ranks, clip those of policy and critic apart, and step. Return the policy's
        norm.

        loss: over all ranks. Loss and gradients are sums over ranks, so all ranks see the same numbers, and
        skip a step together where one is not finite. UserError after --max-skipped of them in a row.
        """
        norms = []
        for group in self.groups:                  # a sharded model's gradients are sums already
            learning = group["params"]
            if self.args.shard == "off":
                learning = self.processes.sum_gradients(learning)
            norms.append(float(shard.clip_gradients(learning, self.args.max_grad_norm)))
        finite = all(math.isfinite(x) for x in [loss, *norms])
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()               # of weights in bfloat16, which have just changed
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == self.args.max_skipped:
            raise UserError(f"{self.skipped_in_a_row} steps in a row without a finite loss and gradient "
                            f"(loss {loss}, norms {norms})")
        return norms[0]                            # the first group is the policy's

    STATE = ("skipped", "skipped_in_a_row", "began")

    def record(self, i):
        """Return what a checkpoint holds beside tensors after i steps. Random numbers have no state: those of
        a step derive from (seed, i)."""
        return {name: getattr(self, name) for name in self.STATE} | {
            "step": i, "compute": self.ledger.formula, "flops": self.ledger.total,
            "config": dataclasses.asdict(self.args)}

    def restore(self, path):
        """Go on from a checkpoint. Return the number of steps done."""
        record = checkpoint.load(path, self.module, self.optimizers)
        self.ledger.formula, self.ledger.total = record["compute"], record["flops"]
        for name in self.STATE:
            setattr(self, name, record[name])
        return record["step"]


# ------------------------------------------------------------------------------------------------------------
# The command

def learn(args, processes):
    """Do a whole run inside a run: tiny.first_weights makes the init checkpoint by one."""
    agree(processes, args)
    return train(args, processes)


def run(args, processes, typed):
    """Do what --algo says."""
    if args.algo == "eval":
        evaluate_alone(args, processes, tiny.first_weights(args, processes, learn))
    else:
        train(args, processes, typed)


def main(argv=None):
    launch(argv, __doc__, run)


if __name__ == "__main__":
    terminal.command(main)
