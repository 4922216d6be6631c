"""Measure the tokens per second of `generate`, next to those of transformers on the same model.

    OMP_NUM_THREADS=2 python -m benchmarks.generate              # the tiny model, on a CPU
    python -m benchmarks.generate --model study/llama-11b --batches 1,16,64      # the 11B shape, on a GPU

Every implementation samples at temperature 1, for text and for images, and draws exactly `new-tokens` tokens
per row. The prompts are random, 256 tokens, and so are the weights where the folder holds only a config.json.
"eager" is ours without its CUDA graph. The implementations take turns. The table holds medians, without the
first turn, which warms up.

    tokens/s     with the time to read prompts and images
    step         milliseconds for one token more in every row
    ratio        tokens/s divided by those of transformers
"""
import itertools
import os
import statistics
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import DEVICE, GPU, columns, head, machine, milliseconds, save, show, take_turns
from harness.ranges import FILE, command_line, integer, several, text
from harness.terminal import command
from llama.config import Config
from llama.generate import generate
from llama.images import Images
from model import Llama

TINY = Path(__file__).resolve().parents[1] / "docs/tiny/gp-vl"
DTYPE = torch.bfloat16 if GPU else torch.float32
COLUMNS = columns("prompts 7, batch 5, of 12, tokens/s 8.0f, step 7.2f, ratio 5.2f")


def load(folder):
    """Return our model and that of transformers."""
    import transformers                        # slow to import, and not there without the 'test' extra
    kind = transformers.MllamaForConditionalGeneration
    if any(Path(folder).glob("*.safetensors")):
        ours, theirs = (each.from_pretrained(folder, dtype=DTYPE).to(DEVICE) for each in (Llama, kind))
    else:
        torch.set_default_dtype(DTYPE)
        with DEVICE:
            ours = Llama(Config.from_pretrained(folder))
            theirs = kind(transformers.AutoConfig.from_pretrained(folder))
        torch.set_default_dtype(torch.float32)
    # transformers 5 keeps the output of layer i, not its input, as Meta trained the weights
    theirs.model.vision_model.intermediate_layers_indices = [
        i - 1 for i in ours.config.vision.intermediate_layers_indices]
    return ours, theirs.eval()


def draw_prompts(config, image, batch):
    """Return conversations of equal length, and their Images or None."""
    prompts = torch.randint(0, config.vocab_size, (batch, 256))
    if not image:
        return prompts.tolist(), None
    prompts[:, 0] = config.image_token_id
    size, real = config.vision.image_size, torch.ones(batch, config.vision.max_num_tiles, dtype=torch.int64)
    pixels = torch.rand(*real.shape, 3, size, size)
    return prompts.tolist(), Images([*pixels], real[:, 0], real, torch.arange(batch))


def reference_inputs(image_token_id, conversations, images):
    """Return the arguments of transformers' generate for prompts of equal length."""
    ids = torch.tensor(conversations)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if images is not None:
        sees = (ids == image_token_id).cumsum(1) > 0
        mask = sees[:, :, None] & images.aspect_ratio_mask.bool()[:, None]                    # (B, T, tiles)
        inputs |= dict(pixel_values=torch.stack(images.pixel_values)[:, None].to(DTYPE),
                       aspect_ratio_ids=images.aspect_ratio_ids[:, None],
                       aspect_ratio_mask=images.aspect_ratio_mask[:, None],
                       cross_attention_mask=mask.long()[:, :, None])
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def measure(ours, theirs, conversations, images, tokens, repeats):
    """Return {name: (milliseconds of a whole answer, of its first token alone)}."""
    inputs = reference_inputs(ours.config.image_token_id, conversations, images)

    def we(n, graph=None):
        generate(ours, conversations, images=images, max_new_tokens=n, stop_ids=[],
                 seeds=list(range(len(conversations))), graph=graph)

    def they(n):
        theirs.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=True, top_k=0, top_p=1.0,
                        temperature=1.0, pad_token_id=0)

    ways = {"ours": we, "transformers": they} | ({"ours, eager": partial(we, graph=False)} if GPU else {})
    runs = {(name, n): lambda way=way, n=n: milliseconds(way, n)
            for name, way in ways.items() for n in (tokens, 1)}
    times = {key: statistics.median(found) for key, found in take_turns(runs, repeats).items()}
    return {name: (times[name, tokens], times[name, 1]) for name in ways}


def main(argv=None):
    parser = command_line("python -m benchmarks.generate", __doc__)
    parser.add_argument("--model", type=text("a folder of a Llama-3.2-Vision", os.path.isdir), default=TINY)
    parser.add_argument("--batches", type=several(integer(1)), default="1,64")
    for name, default in (("new-tokens", 64), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=integer(2), default=default)
    parser.add_argument("--json", type=FILE, metavar="FILE")
    args = parser.parse_args(argv)
    (ours, theirs), rows = load(args.model), []
    print(f"{sum(p.numel() for p in ours.parameters()):,} parameters, {args.new_tokens} new tokens; "
          f"{machine()}")
    head(COLUMNS)
    for image, batch in itertools.product((False, True), map(int, args.batches.split(","))):
        prompts = draw_prompts(ours.config, image, batch)
        found = measure(ours, theirs, *prompts, args.new_tokens, args.repeats)
        for name, (ms, first) in found.items():
            rows.append({"prompts": "image" if image else "text", "batch": batch, "of": name,
                         "tokens/s": 1000 * batch * args.new_tokens / ms,
                         "step": (ms - first) / (args.new_tokens - 1),
                         "ratio": found["transformers"][0] / ms})
            show(rows[-1], COLUMNS)
    save(args.json, machine() | {"rows": rows})


if __name__ == "__main__":
    command(main)
