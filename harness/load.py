"""Load a model with its processor, choose what learns in it, and make the optimizers."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

import ppo
from distributed import shard
from distributed.processes import gather
from games.seeds import derive
from harness import tiny
from harness.check import attempt, settle
from harness.ranges import SettingError
from llama.config import Config
from llama.folders import read_json
from llama.processor import Processor
from model import Linear, Llama
from variants import SFT_LOSSES, lora, official, tune
from variants.reference import initial


def autocast(args, device):
    """Compute in bfloat16 with float32 weights on CUDA, in float32 elsewhere. A sharded model gathers its
    weights in bfloat16 by itself."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda" and args.shard != "on")


def agree(processes, args, typed=frozenset(), newest=None):
    """Settle `args` on all ranks (harness/check.py). If one refuses, all raise the same SettingError.

    newest: the checkpoint that is resumed.
    """
    refusals = []
    try:
        settle(args, config_of(args, newest), typed, processes.world)
    except SettingError as error:
        refusals = [str(error)]
    for refusal in gather(refusals):
        raise SettingError(refusal)


def config_of(args, newest=None):
    """Read the model's Config, without its weights."""
    if not newest and args.model == "tiny":
        return Config.from_dict(tiny.CONFIG)
    expected = "tiny, a checkpoint or a folder with a config.json"
    return attempt(args, "model", expected, Config.from_pretrained, newest or args.model)


def load(args, processes, folder, resumed=None):
    """Return model, processor and folder of the weights of a run with complete settings.

    folder: where the run begins, None for random weights; resumed: the checkpoint where it goes on. A resumed
    model comes without its weights, and so does one that is to be sharded.
    """
    if not folder and not resumed:
        args.shard = "off"                     # as only pre-training begins so
        return *tiny.from_scratch(args, processes.device), None
    if resumed and compares_with_start(args) and not args.lora_rank:
        folder = Path(read_json(resumed, "record.json")["began"])    # Trainer.restore does the rest
        resumed = None
    folder = Path(resumed or folder)
    with torch.device("meta"):
        model = Llama(Config.from_pretrained(folder))
    args.shard = sharding(args, sum(p.numel() for p in model.parameters()), processes)
    if args.shard == "off":
        shard.fill(model, None if resumed else folder, processes.device)
    processor = Processor.from_pretrained(folder, model.config, images=args.image)
    return model, processor, None if resumed else folder


def sharding(args, size, processes):
    """Return what --shard comes to, on or off, for a model of `size` parameters."""
    possible = processes.world > 1 and args.algo != "pretrain" and not args.lora_rank
    auto = "on" if possible and (processes.device.type == "cuda" or size > 10**8) else "off"
    return auto if args.shard == "auto" else args.shard


def compares_with_start(args):
    """Return whether the run needs the policy that it began with: a KL penalty or an SFT loss does."""
    return bool(args.kl_coef) if args.algo == "ppo" else SFT_LOSSES[args.sft_loss].before == "initial"


def policy_to_compare_with(args, model):
    """Return a reference to the policy that the run began with (a function that returns a context, see
    variants/reference.py); None where nothing compares with it."""
    if not compares_with_start(args):
        return None
    return partial(lora.disabled, model) if args.lora_rank else initial(model)


def choose_what_learns(model, args):
    """Let only what --tune and --lora-* name learn. LoRA's matrices are drawn from args.seed; a checkpoint
    may replace them later."""
    tune.freeze(model, args.tune)
    if args.lora_rank:
        lora.adapt(model, args.lora_modules, args.lora_rank, args.lora_alpha, derive("adapters", args.seed))


def build(args, model, processes, folder):
    """Return the module that learns: the policy, for PPO with its critic, on its device or sharded.

    folder: of the weights of a model that is to be sharded, see `load`.
    """
    choose_what_learns(model, args)
    torch.manual_seed(derive("critic", args.seed))             # of the value head's first weights
    module = ppo.ActorCritic(model, args.critic) if args.algo == "ppo" else model
    if args.algo == "ppo":
        official.change_model(model, official.switches(args.compat))
    if args.shard == "on":
        shard.shard(module, folder, processes.device, processes.world)
    else:
        module.to(processes.device)
        if processes.device.type == "cuda":
            halve_frozen(module)
    if args.checkpoint_activations:
        shard.checkpoint_activations(module)
    return module


def halve_frozen(module):
    """Keep the linear layers that do not learn in bfloat16, in which they compute: autocast would cast them
    anew for every product, and each step of decoding would read them in float32. Not one that is tied to an
    embedding, which nobody casts."""
    embeddings = [part.weight for part in module.modules() if isinstance(part, nn.Embedding)]
    for part in module.modules():
        if isinstance(part, (Linear, nn.Linear)) and not part.weight.requires_grad:
            if all(part.weight is not weight for weight in embeddings):
                part.to(torch.bfloat16)


def optimizers(args, model, module):
    """Return AdamW for the policy `model` and, in a group of its own, for the critic that `module` adds.

    In pre-training the matrices of the layers are stepped by Muon (Jordan et al. 2024) instead. A group's
    "peak" is its learning rate, before any schedule.
    """
    adam = dict(lr=args.lr, betas=tuple(args.betas), eps=args.adam_eps, weight_decay=args.weight_decay)
    policy = set(model.parameters())
    muon = [p for name, p in model.named_parameters()
            if args.algo == "pretrain" and p.ndim == 2 and "layers." in name]
    rest = [p for p in model.parameters() if p.requires_grad and p not in set(muon)]
    critic = [p for p in module.parameters() if p.requires_grad and p not in policy]
    groups = [dict(params=rest, peak=args.lr)] + [dict(params=critic, peak=args.critic_lr)] * bool(critic)
    found = [torch.optim.AdamW(groups, **adam)]
    if muon:
        found.append(torch.optim.Muon([dict(params=muon, peak=args.lr)], lr=args.lr,
                                      weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return found


def count_parameters(model, task):
    """Count the parameters that work on a token: N of the paper's 6ND. Text tasks use neither the vision
    encoder nor cross-attention."""
    layers = [f"layers.{i}." for i in model.config.cross_attention_layers]
    blind = () if task.endswith("vl") else ("vision_model.", "multi_modal_projector.", *layers)
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(blind))
