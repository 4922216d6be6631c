"""Make a run of PPO wait before each update for a line on stdin, then print its metrics as a line of JSON,
with the share of padding in what it has learnt from and the process's peak memory.

speed.py starts this with the code of one commit or another on PYTHONPATH. Of that code this file knows only
`main`, `Trainer`, and what `Llama.forward` is given.
"""
import json
import sys
import time

import train
import torch

UPDATE = train.Trainer.update


def update(trainer, i):
    """Stand in for Trainer.update."""
    if trainer.args.algo != "ppo":             # the init checkpoint in the making
        return UPDATE(trainer, i)
    rows = []

    def look(model, args, kwargs):
        if torch.is_grad_enabled():
            ids = args[0] if args else kwargs["input_ids"]     # (B, T)
            rows.append((int(kwargs["lengths"].sum()), ids.numel()))

    input()
    with trainer.model.register_forward_pre_hook(look, with_kwargs=True):
        metrics = UPDATE(trainer, i)
    real, padded = map(sum, zip(*rows))
    metrics |= {"padding": 1 - real / padded, "GB": trainer.processes.memory() / 1e9}
    print(json.dumps(metrics), flush=True)
    return metrics


if __name__ == "__main__":
    if torch.get_num_threads() == 1:
        time.time = time.process_time          # so that other processes do not count
    train.Trainer.update = update
    train.main(sys.argv[1:])
