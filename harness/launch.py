"""From a command line to a run: settings that all ranks agree on, the folder held, and errors in one line."""

import sys

import torch
import torch.distributed as dist

from distributed.processes import lost
from harness import terminal
from harness.ranges import UserError


def refuse(error, processes):
    """End all processes with one line of the first, for each has the same to say."""
    if processes.rank == 0:
        print(f"train.py: error: {terminal.visible(str(error))}", file=sys.stderr, flush=True)
    processes.barrier()                        # else torchrun might stop the first before it has printed
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(2)


def explain(error, args):
    """Return what happened and what to do, in one line; None for an error that nobody expected."""
    if isinstance(error, torch.OutOfMemoryError):
        return (f"{str(error).splitlines()[0]} A smaller --rollout-batch or --token-budget, or "
                "--checkpoint-activations, takes less; python -m study.plan shows what takes it")
    if isinstance(error, RuntimeError) and lost(error):
        return (f"lost another rank, which may have said why ({str(error).splitlines()[0][:160]}); torchrun "
                "--max-restarts N goes on by itself from the last checkpoint, else add --resume --out "
                f"{args.out}")
    return str(error) if isinstance(error, (UserError, OSError, ValueError)) else None
