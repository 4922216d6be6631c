"""The processes of a run, as torchrun starts them: who this one is, what all agree on, and what stops them.

A single process needs no torchrun and makes no collective call. Where there are several, all decide together
whether to skip a step or to stop, so that none leaves the others waiting. One that dies or fails takes the
others down at once; under `torchrun --max-restarts N` they all come back and resume.
"""

import os
import platform
import re
import resource
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from harness.ranges import SettingError
from harness.terminal import silence, visible


class Processes:
    """This process among all: rank, world size, device, and sums over ranks."""

    def __init__(self, device="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if device == "auto":
            device = next(name for name in there if there[name])
        if not there[device]:
            raise SettingError(f"--device {device}: expected cpu, or another that this PyTorch sees")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        self.device = torch.device(device)
        launch = os.environ.get("TORCHELASTIC_RUN_ID")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                                    store=fresh_store(self.rank) if launch else None,
                                    rank=self.rank, world_size=self.world)
        # A name for this start of torchrun, which the workers that it starts again after a failure find, too;
        # None without torchrun.
        self.launch = gather([f"{socket.gethostname()}:{os.getppid()}" if launch == "none" else launch])[0]
        # Each node counts its own failures.
        self.restarted = self.largest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))) > 0

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM):
        """Sum over ranks, in place; return the tensor."""
        if self.world > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def largest(self, number):
        """Return the largest of all ranks' integers."""
        return int(self.all_reduce(torch.tensor(number), dist.ReduceOp.MAX))

    def total(self, numbers):
        """Sum each of some numbers over ranks -> list of floats."""
        return self.all_reduce(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def barrier(self):
        """Wait for all ranks."""
        self.all_reduce(torch.zeros(1))

    def sum_gradients(self, parameters):
        """Sum gradients over ranks, in one message. Return the parameters that have one on any rank."""
        present = self.total([p.grad is not None for p in parameters])
        parameters = [p for p, ranks in zip(parameters, present) if ranks]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in parameters]
        if gradients and self.world > 1:
            vector_to_parameters(self.all_reduce(parameters_to_vector(gradients)), gradients)
        return parameters

    def share(self, items):
        """Return this rank's share of a sequence that all ranks hold."""
        return items[self.rank::self.world]

    def lockstep(self, batches, filler):
        """Yield (batch, weight): one's own with weight 1, then `filler` with weight 0 until the rank with the
        most batches is done. So all ranks make the same number of passes, which sharded weights ask for.

        The loss of `filler` must be 0 by itself: 0 times one that is not finite would be NaN, on all ranks.
        """
        for k in range(self.largest(len(batches))):
            yield (batches[k], 1.0) if k < len(batches) else (filler, 0.0)

    def positions(self, counts):
        """Return where this rank's items stand in the order in which one process would hold all of them.

        counts: how many items each of the things has that `share` gave to this rank.
        """
        found, first = [], 0
        for index, count in sorted(gather([(k * self.world + self.rank, n) for k, n in enumerate(counts)])):
            if index % self.world == self.rank:
                found += range(first, first + count)
            first += count
        return found

    def print(self, *text):
        """Print on the first rank. Once the reader has gone, the run ends as after SIGTERM, and is saved."""
        if self.rank == 0:
            try:
                print(visible(" ".join(map(str, text))), flush=True)
            except BrokenPipeError:
                silence()
                signal.raise_signal(signal.SIGTERM)

    def memory(self):
        """Return the most memory that this process has held, in bytes: of the GPU, else of the host."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    @property
    def hardware(self):
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
        waiting = "".join(f"{key}={value}, " for key, value in os.environ.items()
                          if key in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
        return (f"{self.world} x {self.device.type} ({name}), {os.cpu_count()} cores, "
                f"{torch.get_num_threads()} threads, {waiting}torch {torch.__version__}, "
                f"Python {platform.python_version()}")


def gather(items):
    """Return the lists of all ranks as one; objects travel pickled, so few and small ones."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def first(work):
    """Call `work()` on the first rank; return what it returns on all, or raise its error on all."""
    result = error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = work()
        except (OSError, ValueError) as failure:
            error = failure
    result, error = gather([(result, error)])[0]
    if error:
        raise error
    return result


def fresh_store(rank):
    """Return a store for the ranks to meet in.

    torchrun's own one outlives the workers: after a restart they would find the addresses of the dead in it
    (pytorch issues 135712, 167288). So the first rank opens a new one and says there where it is; the others
    ask until one answers.
    """
    (board, _, _), host = next(dist.rendezvous("env://")), os.environ["MASTER_ADDR"]
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        board.set("port", str(store.port))
        return store
    while True:
        try:
            store = dist.TCPStore(host, int(board.get("port")), timeout=timedelta(seconds=5))
            store.set_timeout(timedelta(minutes=30))
            return store
        except dist.DistError:                                 # an address that a dead first rank left
            time.sleep(0.5)


def leave(message):
    """End this process with one line. One of several leaves at once, and does not wait for the others."""
    message = visible(message)
    if not dist.is_initialized():
        sys.exit(f"train.py: error: {message}")
    with suppress(OSError):                                    # whoever would read it has gone
        print(f"train.py: error: rank {dist.get_rank()}: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(1)


def lost(error):
    """Return whether a RuntimeError says that another rank is gone."""
    words = r"[Cc]onnection (closed|reset|refused)|Broken pipe|NCCL|Timed out waiting"
    return bool(re.search(words, str(error)))


@contextmanager
def interruptible(processes):
    """Turn Ctrl-C and SIGTERM, while open, into a flag that the loop reads between steps; a second Ctrl-C
    quits at once. Yield a function that returns True on all ranks if it was raised on any."""
    raised = []

    def handle(number, frame):
        if raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        raised.append(number)
        processes.print("\nstopping after this step, then saving (Ctrl-C again quits at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: processes.largest(len(raised)) > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
