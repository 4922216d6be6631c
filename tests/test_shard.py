"""Sharding: one rank, two ranks with copies and two ranks with slices compute the same. Two gloo ranks run all jobs in one go, as
`python tests/test_shard.py JOBS` (see `worker`); the tests compare what they left."""

import functools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

sys.path[:0] = [str(Path(__file__).parents[1])]

import sft  # noqa: E402
import train  # noqa: E402
from harness.settings import apply_preset  # noqa: E402
from distributed import checkpoint, shard  # noqa: E402
from llama import folders  # noqa: E402
from llama.config import Config  # noqa: E402
from model import Llama  # noqa: E402
from distributed.processes import Processes
from harness.environments import make_env
from harness.load import agree
from harness.settings import Args, parse
from llama.processor import Processor
from rollout import rollout

GAME = ["--attempts", "2", "--max-new-tokens", "4", "--eval-sets", "id", "--device", "cpu"]
# A large eps: no step out of rounding noise.
LEARN = ["--steps", "3", "--lr", "1e-3", "--adam-eps", "1e-3", "--max-grad-norm", "0.1", "--minibatches", "1",
         "--eval-hands", "0", *GAME]
SFT = ["--algo", "sft", "--batch-size", "4", *LEARN]
PPO = ["--algo", "ppo", "--hands", "4", "--samples", "1", *LEARN]
CASES = {                                                                   # name: (arguments, in what sharded runs differ from whole ones)
    "gp-l-sft": (["--task", "gp-l", *SFT], []),
    "gp-vl-sft": (["--task", "gp-vl", *SFT], []),
    "gp-l-ppo": (["--task", "gp-l", *PPO], []),
    "gp-vl-ppo": (["--task", "gp-vl", *PPO, "--eval-hands", "3", "--eval-every", "0"], ["--rollout-sharded"]),
    # three micro-batches against two
    "uneven-sft": (["--task", "gp-vl", *SFT, "--batch-size", "5", "--token-budget", "1"], []),
    "uneven-ppo": (["--task", "gp-vl", *PPO, "--hands", "5", "--token-budget", "1", "--epochs", "2"], []),
    "shared": (["--task", "gp-vl", *PPO, "--critic", "shared", "--tune", "no-vision"],
               ["--checkpoint-activations", "--rollout-sharded"]),
    "tied": (["--task", "gp-l", *SFT], []),
    "separate": (["--task", "gp-vl", *PPO, "--critic", "separate", "--tune", "no-vision"],
                 ["--checkpoint-activations"]),
}
MEASURED = {"seconds", "tokens_per_second", "rollout_seconds", "update_seconds", "rollout_tokens_per_second", "memory_gb"}
DEALT = ["--epochs", "2", "--token-budget", "300", "--lr", "1e-4", "--steps", "2"]
for name, how in {                                                          # a rank has no part in some of the minibatches
        "sft in 7": [*SFT, "--batch-size", "7", "--sft-loss", "psft"],
        "own in 4": [*SFT, "--batch-size", "5", "--sft-loss", "iw-sft", "--sft-data", "own"],
        "ppo in 4": [*PPO, "--hands", "5", "--samples", "3", "--advantage", "gae-token", "--loss", "grpo"],
        "ppo in 7": [*PPO, "--hands", "7", "--critic", "separate", "--kl-coef", "0.1", "--entropy-coef", "0.1"],
        # conversations vary from route to route
        "ppo in 3": [*PPO, "--hands", "3", "--task", "virl-l", "--attempts", "1", "--after-failure", "walk-on"]}.items():
    CASES[name] = (["--task", "gp-l", *how, *DEALT, "--minibatches", name[-1]], [])
ONLY = dict.fromkeys(("shared", "tied", "separate", "sft in 7", "own in 4", "ppo in 7"), "sharded")
ONLY |= dict.fromkeys(("ppo in 4", "ppo in 3"), "whole")


def run(processes, *argv):
    args, typed = parse([str(word) for word in argv])
    if not args.resume:
        agree(processes, args, typed)
    if args.sft_data == "own":
        with mock.patch("sft.own_answers", lucky_answers):
            return train.train(args, processes, typed)
    train.evaluate_only(args, processes) if args.algo == "eval" else train.train(args, processes, typed)


def lucky_answers(episodes, real=sft.own_answers):
    """A random model is never right: say that it was in every second hand, once or twice, and so nowhere on one of the ranks."""
    for episode in episodes:
        for k, turn in enumerate(episode.turns):
            turn.info["correct"] = (episode.seed % 4, k) in ((0, 0), (2, 0), (2, 1))
    return real(episodes)


def model_of(name, small):
    """The folder of a case's model; beside the small one lies a text-only one whose head is its embedding."""
    return Path(small) / "tied" if name == "tied" else small


def worker(folder, small):
    """What each of the two ranks does."""
    processes = Processes("cpu")
    for name, (argv, differently) in CASES.items():
        common = ["--model", model_of(name, small), *argv]
        for way, more in (("whole", ["--shard", "off"]), ("sharded", ["--shard", "on", *differently])):
            if ONLY.get(name, way) == way:
                run(processes, *common, *more, "--out", folder / name / way)
    for steps in ([], ["--steps", 1], ["--resume", "--override"]):          # whole, then in two parts
        common = ["--model", small, *CASES["gp-vl-ppo"][0], "--lr-schedule", "constant", "--warmup", 0,
                  "--shard", "on"]
        run(processes, *common, *steps, "--out", folder / "resumed" / ("parts" if steps else "uninterrupted"))
    export(small, processes, folder / "export")
    run(processes, "--model", small, "--algo", "eval", "--eval-hands", 3, *GAME, "--shard", "on",
        "--out", folder / "eval")
    torch.save({"slices": slices(small, processes), "rollouts": rollouts(small, processes), "norm": broken_norm(small, processes)},
               folder / f"rank{processes.rank}.pt")
    torch.distributed.destroy_process_group()


def export(small, processes, folder):
    """The small model from slices to a folder, in files of at most 40 kB."""
    folder.mkdir(exist_ok=True)
    checkpoint.export(sharded(small, processes), folder, processes.rank, processes.world, max_shard_size=40_000)


class Spy:
    """safe_open that writes down how many numbers are read of each tensor."""
    read = {}

    def __init__(self, *args, **kwargs):
        self.file = safe_open(*args, **kwargs)

    def __enter__(self):
        self.tensors = self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.tensors.keys()

    def get_slice(self, name):
        return SliceSpy(name, self.tensors.get_slice(name))


class SliceSpy:
    def __init__(self, name, source):
        self.name, self.source = name, source
        self.get_shape, self.get_dtype = source.get_shape, source.get_dtype

    def __getitem__(self, where):
        piece = self.source[where]
        Spy.read[self.name] = Spy.read.get(self.name, 0) + piece.numel()
        return piece


def sharded(folder, processes):
    with torch.device("meta"):
        model = Llama(Config.from_pretrained(folder))
    shard.shard(model, folder, processes.device, processes.world)
    return model


def slices(folder, processes):
    """Read numbers of each tensor in the file; each parameter's own rows; the gathered whole."""
    folders.safe_open = Spy
    model = sharded(folder, processes)
    folders.safe_open = safe_open
    assert all(isinstance(p, DTensor) for p in model.parameters())
    own = {name: (shard.rows(p), p.to_local().clone()) for name, p in model.named_parameters()}
    return Spy.read, own, {name: p.full_tensor() for name, p in model.named_parameters()}


def rollouts(folder, processes):
    """{(lockstep, hands): {seed: (ids, log-probs)}} of this rank. The ranks' answers differ in length; of one hand, one has none."""
    model, found = sharded(folder, processes), {}
    for lockstep in (False, True):
        for hands in (1, 5):
            with shard.for_rollout(model, processes.largest, lockstep) as player:
                found[lockstep, hands] = play(player, Processor.from_pretrained(folder), processes.rank, hands)
    return found


def play(model, processor, rank, hands):
    args, seeds = apply_preset(Args(task="gp-vl", preset="tiny", algo="ppo"), 32), range(rank, hands, 2)
    episodes = rollout(model, processor, make_env(args), seeds, batch=2, temperature=1.0, max_new_tokens=5 - 2 * rank)
    return {e.seed: [(c.ids, c.logprobs) for c in e.conversations] for e in episodes}


def broken_norm(folder, processes):
    """What each rank finds when the gradients of one are not finite."""
    model, tokens = sharded(folder, processes), torch.full((1, 4), 7)
    (model(tokens, targets=tokens).logprobs.sum() * (torch.nan if processes.rank else 1.0)).backward()
    return float(shard.clip(list(model.parameters()), 1.0))


# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the two ranks: at these sizes threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def tied(small):
    text = {name: value for name, value in small[1].config.to_dict()["text_config"].items() if name != "cross_attention_layers"}
    Llama(Config.from_dict(text | {"model_type": "llama", "tie_word_embeddings": True})).save_pretrained(small[0] / "tied")
    small[2].save_pretrained(small[0] / "tied")


@pytest.fixture(scope="module")
def two_ranks(small, tied, working_folder, tmp_path_factory):
    """The folder in which two ranks have done all jobs."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen([sys.executable, __file__, str(folder), str(small[0])], cwd=working_folder, env=os.environ | env,
                                          stdout=open(folder / f"log{rank}", "w"), stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (folder / "log0").read_text()[-3000:] + (folder / "log1").read_text()[-3000:]
    return folder


def records(folder, event):
    return [record for record in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if record["event"] == event]


@pytest.fixture(scope="module")
def one_rank(small, tmp_path_factory):
    """Name of a case -> folder of its run on one rank, in this process."""
    @functools.cache
    def once(name):
        folder = tmp_path_factory.mktemp(name) / "run"
        run(Processes("cpu"), "--model", model_of(name, small[0]), *CASES[name][0], "--out", folder)
        return folder
    return once


def saved_tensors(path):
    """All of a checkpoint's tensors, whole."""
    found = checkpoint.slices_in(path)
    tensors = {name: torch.empty(shape) for name, (shape, _) in found.items()}
    checkpoint.fill(found, path, tensors)
    return tensors


@pytest.mark.parametrize("name, way", [(name, way) for name in CASES for way in ("whole", "sharded") if ONLY.get(name, way) == way])
def test_two_ranks_equal_one(two_ranks, one_rank, small, name, way):
    """Losses, the norm of the gradients before clipping, weights, critic, after three clipped updates."""
    one, two = one_rank(name), two_ranks / name / way
    for x, y in zip(records(one, "step"), records(two, "step"), strict=True):
        assert x.pop("flops") == y.pop("flops") and x["counted_tflops"] == y["counted_tflops"]      # empty passes, and what is passed again, are no one's
        assert x.keys() == y.keys() and {n: x[n] for n in x.keys() - MEASURED} == pytest.approx({n: y[n] for n in y.keys() - MEASURED}, abs=1e-4)
    assert [record["eval"] for record in records(one, "eval")] == [record["eval"] for record in records(two, "eval")]
    start, a, b = (Llama.from_pretrained(folder).state_dict() for folder in (model_of(name, small[0]), one / "final", two / "final"))
    assert max((a[n] - start[n]).abs().max() for n in a) > 1e-4                         # it did learn
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)
    a, b = (saved_tensors(max(folder.glob("checkpoints/step_*"))) for folder in (one, two))
    assert a.keys() == b.keys() and {name.split(".")[-1] for name in a} >= {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)
    assert max(step["grad_norm"] or 0 for step in records(one, "step")) > 0.1                                   # so that clipping had something to do


def test_sharded_resumed_equals_uninterrupted(two_ranks):
    a, b = (Llama.from_pretrained(two_ranks / "resumed" / name / "final").state_dict() for name in ("uninterrupted", "parts"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_run_of_two_ranks_goes_on_with_one(two_ranks, tmp_path):
    source = two_ranks / "resumed" / "parts"
    shutil.copytree(source, tmp_path / "run", ignore=shutil.ignore_patterns("step_000003", "final"))
    run(Processes("cpu"), "--resume", "--steps", 3, "--override", "--out", tmp_path / "run")
    a, b = (Llama.from_pretrained(folder / "final").state_dict() for folder in (two_ranks / "resumed/uninterrupted", tmp_path / "run"))
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)


def test_a_folder_of_many_files_is_written_from_slices(two_ranks, small):
    files = sorted(path.name for path in (two_ranks / "export").glob("*.safetensors"))
    assert len(files) > 4 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = {path.name: sum(tensor.nbytes for tensor in load_file(path).values()) for path in (two_ranks / "export").glob("*.safetensors")}
    weights = [tensor.nbytes for tensor in small[1].state_dict().values()]
    assert sum(sizes.values()) == sum(weights) and max(sizes.values()) <= max(40_000, *weights)
    found = Llama.from_pretrained(two_ranks / "export").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in small[1].state_dict().items())


def test_a_rank_reads_its_own_rows_only(two_ranks, small):
    ranks = [torch.load(two_ranks / f"rank{rank}.pt", weights_only=False)["slices"] for rank in range(2)]
    for name, whole in Llama.from_pretrained(small[0]).state_dict().items():
        (first, above), (second, below) = (own[name] for _, own, _ in ranks)
        assert (first.stop, second.stop) == (second.start, len(whole)) or (first.stop, len(below)) == (len(whole), 0)
        assert torch.equal(torch.cat([above, below]), whole) and torch.equal(ranks[0][2][name], whole)
    for read, own, gathered in ranks:
        assert len(read) == sum(len(part) > 0 for _, part in own.values())
        for theirs, count in read.items():
            name = folders.from_any_layout(theirs)
            assert count == own[name][1].numel() and (count < gathered[name].numel() or len(gathered[name]) == 1)


def test_gathered_and_lockstep_rollouts_equal_one_rank(two_ranks, small):
    for rank in range(2):
        for (_, hands), found in torch.load(two_ranks / f"rank{rank}.pt", weights_only=False)["rollouts"].items():
            alone = play(small[1], small[2], rank, hands)
            assert found.keys() == alone.keys()
            for seed, conversations in alone.items():
                for (ids, logprobs), (found_ids, found_logprobs) in zip(conversations, found[seed], strict=True):
                    assert ids == found_ids and logprobs == pytest.approx(found_logprobs, abs=1e-4)


def test_all_ranks_see_that_one_has_no_finite_gradient(two_ranks):
    assert all(math.isnan(torch.load(two_ranks / f"rank{rank}.pt", weights_only=False)["norm"]) for rank in range(2))


def test_evaluation_of_a_sharded_model(two_ranks):
    assert json.loads((two_ranks / "eval/eval.json").read_text())["eval"]["id"]["n"] == 3


@pytest.mark.parametrize("changes, cut, words", [({"norm.weight": None}, 0, "missing"), ({"odd": torch.zeros(1)}, 0, "unexpected"),
                                                 ({"norm.weight": torch.ones(3)}, 0, "expected"), ({}, 10, "not a whole")])
def test_broken_files_are_named(small, model, tmp_path, monkeypatch, changes, cut, words):
    """As Llama.from_pretrained does; on one rank, where everything is its own."""
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in (model.state_dict() | changes).items() if tensor is not None}, file)
    file.write_bytes(file.read_bytes()[:file.stat().st_size - cut])
    monkeypatch.setattr(shard, "rows", lambda p: slice(0, len(p)))
    monkeypatch.setattr(torch.nn.Parameter, "to_local", lambda p: p.data, raising=False)
    with pytest.raises(ValueError, match=words) as error:
        shard.read_slices(model, tmp_path)
    assert "model.safetensors" in str(error.value)


def test_checkpointed_activations_change_nothing(model, processor):
    batch = torch.randint(5, 500, (2, 9))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            shard.checkpoint_activations(model)
        model(batch, targets=batch).logprobs.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_pace():
    assert list(shard.pace(["a"], "spare", lambda n: n)) == [("a", 1.0)]
    assert list(shard.pace(["a"], "spare", lambda n: 3)) == [("a", 1.0), ("spare", 0.0), ("spare", 0.0)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(Path(sys.argv[1]), sys.argv[2])
