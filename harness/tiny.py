"""The built-in tiny model: a Llama-Vision of 1.8 million weights, in ordinary Hugging Face folders.

    torchrun train.py --algo pretrain --model tiny --task gp-l      # make a foundation, as docs/tiny tells

The paper's Llama comes to the game with arithmetic, with words and with eyes. A *foundation*, a folder per
task in docs/tiny, stands for that: it has seen the game under many rules and looks. From it `prepare`
makes *init* on first use, as the paper does, by a brief SFT on the training rule. The lengths of both
trainings, of the foundation and of this SFT, are chosen so that init scores about as the paper's does
(docs/lab-book.md).
"""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from distributed.processes import first
from envs import GAMES
from games.seeds import TRAINING, derive
from harness import files
from harness.environments import training_mixture
from harness.ranges import UserError
from harness.settings import Args
from llama.config import Config
from llama.processor import Processor
from model import Llama
from rollout import readable

FOUNDATIONS = Path(__file__).parents[1] / "docs" / "tiny"
INIT_STEPS = {"gp": 12, "virl": 25}            # SFT steps from the foundation to init, of other games 60

CONFIG = json.loads((FOUNDATIONS / "config.json").read_text(encoding="utf-8"))          # its shape
IMAGES = {"size": {"height": 56, "width": 56}, "max_image_tiles": 4,
          "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                  "<|eot_id|>", "<|finetune_right_pad_id|>"]


def first_weights(args, processes, learn):
    """Return the folder of the weights that a run begins with; None: random ones.

    learn(args, processes): does a run of SFT, and returns whether it came to its end.
    """
    if args.model != "tiny":
        return Path(args.model)
    return None if args.algo == "pretrain" else prepare(args, processes, learn)


def prepare(args, processes, learn):
    """Return the folder of the init checkpoint for the game of `args`, made on first use.

    It is kept in runs/, by a name that follows from the foundation's weights and the game.
    """
    foundation = FOUNDATIONS / args.task
    if not (foundation / "model.safetensors").exists():
        raise UserError(f"{foundation}: no tiny model there; take it from git, or make one with "
                        "--algo pretrain and give its final/ as --model")
    game = {name: getattr(args, name) for name in (
        "task", "rule", "look", "target", "routes", "hide_landmarks", "describe")}
    # a seed that no run has: what init has learnt from, none begins with
    game |= {"seed": derive("init"), "steps": INIT_STEPS.get(args.game, 60)}
    weights = (foundation / "model.safetensors").read_bytes()
    digest = hashlib.sha256(weights + repr(game).encode()).hexdigest()[:8]
    ready = Path("runs") / f"init-{args.task}-{digest}"
    if not first((ready / "final").exists):
        processes.print(f"first use of tiny on {args.task}: making its init checkpoint, {game['steps']} "
                        f"SFT steps, in {ready}")
        with contextlib.ExitStack() as stack:  # another run may be making it, too: the first to end wins
            private = first(lambda: stack.enter_context(files.aside(ready)))
            init = Args(algo="sft", model=str(foundation), out=str(private), eval_every=0,
                        eval_hands=0, device=args.device, **game)
            if not learn(init, processes):
                raise UserError("interrupted before the init checkpoint was ready; the next run makes it "
                                "anew")
        processes.barrier()                    # until it has its name
    return ready / "final"


def from_scratch(args, device):
    """Return a model with random weights and a processor with a tokenizer for the game of `args`."""
    config = Config.from_dict(CONFIG)
    everything = training_mixture(dataclasses.replace(args, task=f"{args.game}-vl", describe=None))
    tokenizer = train_tokenizer(everything, config.vocab_size, GAMES[args.game].apart)
    model = Llama(config)
    model.init_weights(seed=derive("weights", args.seed))
    for name, parameter in model.named_parameters():
        if "gate" in name.split(".")[-1] and parameter.numel() == 1:
            # Llama grafted its eyes on with closed gates; these grow together
            torch.nn.init.constant_(parameter, 0.5)
    return model.to(device), Processor(tokenizer, image_config=IMAGES)


def train_tokenizer(mixture, vocab_size, apart):
    """Train byte-level BPE on the environments' own text. What matches `apart` stays in tokens of its own;
    all else, spaces included, may merge, so that a prompt costs the tiny model some dozen tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(apart), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    dialogues = [env.demonstrate(TRAINING + k, mistakes=k % env.attempts)
                 for k in range(40) for env, _ in mixture]
    texts = [readable(message["content"]).replace("<image>", "") for said in dialogues for message in said]
    texts += ["user", "assistant", "\n\n"] * 500
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    fillers = [f"<|reserved_{i}|>" for i in range(vocab_size - tokenizer.get_vocab_size())]
    # the image token's id is vocab_size
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in [*fillers, "<|image|>"]])
    return tokenizer
