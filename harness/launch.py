"""Start a run from a command line: agree on settings across ranks, lock the folder, print errors in one
line."""

import os
import sys
import traceback
from contextlib import ExitStack

import torch
import torch.distributed as dist

from distributed.processes import Processes, first, leave, lost
from harness import terminal
from harness.folder import choose
from harness.load import agree
from harness.ranges import SettingError, UserError
from harness.settings import parse


def launch(argv, description, work):
    """Parse the command line and call work(args, processes, typed) with the run's folder held.

    typed: names of the settings that the user gave. Those of a resumed run are not settled yet.
    """
    processes = None
    try:
        args, typed = parse(argv, description)
    except SettingError as error:              # all ranks read the same words
        refuse(error, Processes("cpu"))
    try:
        processes = Processes(args.device)
        if args.algo == "eval" or not args.resume:             # else `train` reads the run's settings
            agree(processes, args, typed)
        with ExitStack() as held:              # by the first rank; the others go with it
            args.out, args.resume = first(lambda: choose(args, processes, held))
            work(args, processes, typed)
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
        sys.stdout.flush()
        os._exit(0)                            # Python's own end meets threads of torch, and at times aborts


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
    """Return what happened and what to do, in one line; None for an error that nobody expected."""
    if isinstance(error, torch.OutOfMemoryError):
        return (f"{str(error).splitlines()[0]} A smaller --rollout-batch or --token-budget, or "
                "--checkpoint-activations, takes less; python -m study.plan shows what takes it")
    if isinstance(error, RuntimeError) and lost(error):
        return (f"lost another rank, which may have said why ({str(error).splitlines()[0][:160]}); torchrun "
                "--max-restarts N goes on by itself from the last checkpoint, else add --resume --out "
                f"{args.out}")
    return str(error) if isinstance(error, (UserError, OSError, ValueError)) else None
