"""Measure PPO updates at a model's shape on this machine, with random weights: nothing is downloaded.

    python -m benchmarks.shape study/llama-11b --task gp-l --lora-rank 16 --checkpoint-activations \\
        --hands 16 --samples 4 --rollout-batch 64 --max-new-tokens 96 --epochs 1 --steps 2 --out runs/shape

FOLDER holds a config.json; the options are train.py's. Of each step, log.jsonl in --out has rollout_seconds,
drawn_tokens, update_seconds, trained_tokens and memory_gb. The tokenizer is the tiny model's, so prompts are
shorter than real ones. Answers by random weights never end: all are --max-new-tokens long, and all episodes
have five turns. The first update compiles the kernels.
"""
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

import train
from benchmarks.generate import TINY
from harness.folder import RunFolder
from harness.ranges import command_line, text
from harness.terminal import command
from llama.config import Config
from model import Llama


def make_folder(shape, folder):
    """Write what --model takes, but for weights: the shape's config and the tiny model's tokenizer."""
    shutil.copytree(TINY, folder)
    tiny, config, pictures = (json.loads(file.read_bytes()) for file in (
        TINY / "config.json", Path(shape) / "config.json", TINY / "preprocessor_config.json"))
    side = config["vision_config"]["image_size"]
    config |= {"image_token_index": tiny["image_token_index"]}
    pictures |= {"size": {"height": side, "width": side}}
    for name, content in (("config", config), ("preprocessor_config", pictures)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def random_weights(folder, device="cpu", dtype=None):
    """Stand in for Llama.from_pretrained."""
    with torch.device(device):
        return Llama(Config.from_pretrained(folder))


def main(argv=None):
    parser = command_line("python -m benchmarks.shape", __doc__, usage="%(prog)s FOLDER [train.py's options]")
    parser.add_argument("shape", type=text("a folder", os.path.isdir), metavar="FOLDER")
    args, settings = parser.parse_known_args(argv)
    Llama.from_pretrained = random_weights
    RunFolder.save = RunFolder.save_final = lambda *_: None
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        make_folder(args.shape, model)
        train.main(f"--algo ppo --preset paper --eval-hands 0 --model {model}".split() + settings)


if __name__ == "__main__":
    command(main)
