"""Sharding: one rank, two ranks with copies and two ranks with slices compute the same. Two gloo ranks run
all jobs in one go, as `torchrun tests/test_shard.py FOLDER MODEL` (see `worker`); the tests compare what
they left."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

sys.path[:0] = [str(Path(__file__).parents[1])]

import train  # noqa: E402
from distributed import checkpoint, shard  # noqa: E402
from distributed.processes import Processes  # noqa: E402
from harness.environments import make_env  # noqa: E402
from harness.load import agree  # noqa: E402
from harness.settings import Args, apply_preset, parse  # noqa: E402
from llama.config import Config  # noqa: E402
from llama.folders import read_weights  # noqa: E402
from llama.processor import Processor  # noqa: E402
from model import Llama  # noqa: E402
from rollout import rollout  # noqa: E402
from test_train import records  # noqa: E402
from variants.own_answers import own_answers  # noqa: E402

GAME = "--attempts 2 --max-new-tokens 4 --eval-sets id --device cpu"
# A large eps: no step out of rounding noise.
LEARN = f"--steps 3 --lr 1e-3 --adam-eps 1e-3 --max-grad-norm 0.1 --minibatches 1 --eval-hands 0 {GAME}"
SFT = f"--algo sft --batch-size 4 {LEARN}"
PPO = f"--algo ppo --hands 4 --samples 1 {LEARN}"
DEALT = "--epochs 2 --token-budget 300 --lr 1e-4 --steps 2 --minibatches"
CASES = {              # name: settings, and behind a bar those of sharded runs
    "gp-l-sft": f"--task gp-l {SFT}",
    "gp-vl-sft": f"--task gp-vl {SFT}",
    "gp-l-ppo": f"--task gp-l {PPO}",
    "gp-vl-ppo": f"--task gp-vl {PPO} --eval-hands 3 --eval-every 0",
    # three micro-batches against two
    "uneven-sft": f"--task gp-vl {SFT} --batch-size 5 --token-budget 1",
    "uneven-ppo": f"--task gp-vl {PPO} --hands 5 --token-budget 1 --epochs 2",
    "shared": f"--task gp-vl {PPO} --critic shared --tune no-vision | --checkpoint-activations",
    "tied": f"--task gp-l {SFT}",
    "separate": f"--task gp-vl {PPO} --critic separate --tune no-vision | --checkpoint-activations",
    # a rank has no part in some of the minibatches
    "sft in 7": f"--task gp-l {SFT} --batch-size 7 --sft-loss psft {DEALT} 7",
    "own in 4": f"--task gp-l {SFT} --batch-size 5 --sft-loss iw-sft --sft-data own {DEALT} 4",
    "ppo in 4": f"--task gp-l {PPO} --hands 5 --samples 3 --advantage gae-token --loss grpo {DEALT} 4",
    "ppo in 7": f"--task gp-l {PPO} --hands 7 --critic separate --kl-coef 0.1 --entropy-coef 0.1 {DEALT} 7",
    # conversations vary from route to route
    "ppo in 3": f"--task virl-l {PPO} --hands 3 --attempts 1 --after-failure walk-on {DEALT} 3",
}
SHARDED, WHOLE = "shared, tied, separate, sft in 7, own in 4, ppo in 7", "ppo in 4, ppo in 3"
RUNS = [(name, way) for way, others in (("whole", SHARDED), ("sharded", WHOLE))
        for name in CASES if name not in others.split(", ")]
MEASURED = ("seconds tokens_per_second rollout_seconds update_seconds rollout_tokens_per_second memory_gb "
            "flops").split()


def run(processes, *argv):
    """Run a command line, of which each argument may be several words."""
    args, typed = parse(" ".join(map(str, argv)).split())
    if not args.resume:
        agree(processes, args, typed)
    if args.sft_data == "own":
        with mock.patch("train.own_answers", lucky_answers):
            return train.train(args, processes, typed)
    train.run(args, processes, typed)


def lucky_answers(episodes):
    """Say that a random model, which is never right, was it in every second hand, once or twice, and so
    nowhere on one of the ranks."""
    for episode in episodes:
        for k, turn in enumerate(episode.turns):
            turn.info["correct"] = (episode.seed % 4, k) in ((0, 0), (2, 0), (2, 1))
    return own_answers(episodes)


def settings(name, small):
    """Return what the ranks of a case, however many, have in common, with the small model or a text-only one
    beside it whose head is its embedding."""
    return f"--model {Path(small) / 'tied' if name == 'tied' else small} {CASES[name].partition('|')[0]}"


def worker(folder, small):
    """Do what each of the two ranks does."""
    processes = Processes("cpu")
    for name, way in RUNS:
        more = f"--shard on {CASES[name].partition('|')[2]}" if way == "sharded" else "--shard off"
        run(processes, settings(name, small), more, "--out", f"{folder}/{name}/{way}".replace(" ", "-"))
    for steps in ("", "--steps 1", "--resume --override"):     # whole, then in two parts
        run(processes, settings("gp-vl-ppo", small), "--lr-schedule constant --warmup 0 --shard on", steps,
            "--out", folder / "resumed" / ("parts" if steps else "uninterrupted"))
    sharded(small, processes).save_pretrained(folder / "export", processes.rank)
    run(processes, "--model", small, "--algo eval --eval-hands 3 --shard on", GAME, "--out", folder / "eval")
    torch.save({"slices": slices(small, processes), "rollouts": rollouts(small, processes),
                "norm": broken_norm(small, processes)}, folder / f"rank{processes.rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)                                # as harness/launch.py


def sharded(folder, processes):
    with torch.device("meta"):
        model = Llama(Config.from_pretrained(folder))
    shard.shard(model, folder, processes.device, processes.world)
    return model


def slices(folder, processes):
    """Return how many numbers were read of each tensor in the file, each parameter's own rows, and the
    whole."""
    read = {}

    def counted(*args):
        for name, tensor in read_weights(*args):
            read[name] = tensor.numel()
            yield name, tensor

    with mock.patch.object(shard, "read_weights", counted):
        model = sharded(folder, processes)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    own = {name: (shard.rows(p), p.to_local().clone()) for name, p in model.named_parameters()}
    return read, own, {name: p.full_tensor() for name, p in model.named_parameters()}


def rollouts(folder, processes):
    """Play hands on this rank -> {hands: {seed: (ids, log-probs)}}. The ranks' answers differ in length; of
    one hand, one has none."""
    model, found = sharded(folder, processes), {}
    for hands in (1, 5):
        with shard.for_rollout(model) as player:
            found[hands] = play(player, Processor.from_pretrained(folder), processes.rank, hands)
    return found


def play(model, processor, rank, hands):
    args = apply_preset(Args(task="gp-vl", preset="tiny", algo="ppo"), 32)
    episodes = rollout(model, processor, make_env(args), range(rank, hands, 2), batch=2, temperature=1.0,
                       max_new_tokens=5 - 2 * rank)
    return {e.seed: [(c.ids, c.logprobs) for c in e.conversations] for e in episodes}


def broken_norm(folder, processes):
    """Return what each rank finds when the gradients of one are not finite."""
    model, tokens = sharded(folder, processes), torch.full((1, 4), 7)
    (model(tokens, targets=tokens).logprobs.sum() * (torch.nan if processes.rank else 1.0)).backward()
    return float(shard.clip_gradients(list(model.parameters()), 1.0))


# ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute as the two ranks do: at these sizes threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def tied(small):
    text = small[1].config.to_dict()["text_config"] | {"model_type": "llama", "tie_word_embeddings": True}
    del text["cross_attention_layers"]
    Llama(Config.from_dict(text)).save_pretrained(small[0] / "tied")
    small[2].save_pretrained(small[0] / "tied")


@pytest.fixture(scope="module")
def two_ranks(small, tied, working_folder, tmp_path_factory):
    """Return the folder in which two ranks have done all jobs."""
    folder = tmp_path_factory.mktemp("two")
    words = f"-m torch.distributed.run --nproc-per-node 2 --standalone {__file__} {folder} {small[0]}".split()
    done = subprocess.run([sys.executable, *words], cwd=working_folder, timeout=300, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]
    return folder


@pytest.fixture(scope="module")
def left(two_ranks):
    """Return what the two ranks saved of themselves."""
    return [torch.load(two_ranks / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank(small, tmp_path_factory):
    """Return a function: name of a case -> folder of its run on one rank, in this process."""
    @functools.cache
    def once(name):
        folder = tmp_path_factory.mktemp("one") / "run"
        run(Processes("cpu"), settings(name, small[0]), "--out", folder)
        return folder
    return once


def saved_tensors(path):
    """Return all of a checkpoint's tensors."""
    return load_file(path / checkpoint.TENSORS)


def final(folder):
    return Llama.from_pretrained(folder / "final").state_dict()


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@pytest.mark.parametrize("name, way", RUNS)
def test_two_ranks_equal_one(two_ranks, one_rank, small, name, way):
    """In losses, the norm of the gradients before clipping, weights and critic, after clipped updates."""
    one, two = one_rank(name), two_ranks / name.replace(" ", "-") / way
    steps = records(one, "step")
    for x, y in zip(steps, records(two, "step"), strict=True):
        # Empty passes, and what is passed again, are no one's.
        assert x["flops"] == y["flops"] and x["counted_tflops"] == y["counted_tflops"]
        assert x.keys() == y.keys()
        x, y = ({n: value for n, value in step.items() if n not in MEASURED} for step in (x, y))
        assert x == pytest.approx(y, abs=1e-4)
    assert [record["eval"] for record in records(one, "eval")] == [
        record["eval"] for record in records(two, "eval")]
    start = Llama.from_pretrained(settings(name, small[0]).split()[1]).state_dict()
    # It did learn, and clipping had something to do.
    assert max((weight - start[n]).abs().max() for n, weight in final(one).items()) > 1e-4
    assert max(step["grad_norm"] or 0 for step in steps) > 0.1
    assert close(final(one), final(two))
    a, b = (saved_tensors(max(folder.glob("checkpoints/step_*"))) for folder in (one, two))
    assert close(a, b) and {n.split(".")[-1] for n in a} >= {"weight", "exp_avg", "exp_avg_sq", "step"}


def test_sharded_resumed_equals_uninterrupted(two_ranks):
    a, b = (final(two_ranks / "resumed" / name) for name in ("uninterrupted", "parts"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_run_of_two_ranks_goes_on_with_one(two_ranks, tmp_path):
    shutil.copytree(two_ranks / "resumed/parts", tmp_path / "run",
                    ignore=shutil.ignore_patterns("step_000003", "final"))
    run(Processes("cpu"), "--resume --steps 3 --override --out", tmp_path / "run")
    assert close(final(two_ranks / "resumed/uninterrupted"), final(tmp_path / "run"))


def test_a_folder_is_written_from_slices(two_ranks, small):
    found = Llama.from_pretrained(two_ranks / "export").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in small[1].state_dict().items())


def test_a_rank_reads_its_own_rows_only(left, small):
    ranks = [rank["slices"] for rank in left]
    for name, whole in Llama.from_pretrained(small[0]).state_dict().items():
        (first, above), (second, below) = (own[name] for _, own, _ in ranks)
        assert (first.stop, second.stop) == (second.start, len(whole)) or (first.stop, len(below)) == (
            len(whole), 0)
        assert torch.equal(torch.cat([above, below]), whole) and torch.equal(ranks[0][2][name], whole)
    for read, own, gathered in ranks:
        assert len(read) == len(own)
        for name, count in read.items():
            assert count == own[name][1].numel()
            assert count < gathered[name].numel() or len(gathered[name]) == 1


def test_gathered_rollouts_equal_one_rank(left, small):
    for rank in range(2):
        for hands, found in left[rank]["rollouts"].items():
            alone = play(*small[1:], rank, hands)
            assert found.keys() == alone.keys()
            for seed, conversations in alone.items():
                for (ids, logprobs), (its_ids, its_logprobs) in zip(conversations, found[seed], strict=True):
                    assert ids == its_ids and logprobs == pytest.approx(its_logprobs, abs=1e-4)


def test_all_ranks_see_that_one_has_no_finite_gradient(left):
    assert all(math.isnan(rank["norm"]) for rank in left)


def test_evaluation_of_a_sharded_model(two_ranks):
    assert json.loads((two_ranks / "eval/eval.json").read_text())["eval"]["id"]["n"] == 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(Path(sys.argv[1]), sys.argv[2])
