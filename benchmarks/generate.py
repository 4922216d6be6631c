"""Measure the tokens per second of `generate`, next to those of transformers with the same weights.

    python -m benchmarks.generate --model docs/tiny/gp-vl --new-tokens 64 --repeats 5 --threads 2

Both sample at temperature 1 from real prompts of the game, text and image, batch 1 and 64, and must draw
exactly `new-tokens` tokens per row. Medians of interleaved repeats after one that warms up; prefill and
image encoding are included.
"""
import itertools
import os
import statistics
from pathlib import Path

import torch

from benchmarks.measure import head, machine, milliseconds, show, take_turns
from envs import GeneralPoints
from harness.ranges import command_line, integer, text
from harness.terminal import command
from llama.generate import generate
from llama.processor import Processor
from model import Llama

TINY = Path(__file__).resolve().parents[1] / "docs/tiny/gp-vl"
COLUMNS = {"prompts": "7", "batch": "5", "ours": "7.0f", "transformers": "12.0f", "ratio": "5.2f"}


def reference_inputs(processor, conversations, images):
    """Return the arguments of transformers' generate for prompts of equal length."""
    ids = torch.tensor(conversations)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if images is not None:
        sees = (ids == processor.image_token_id).cumsum(1) > 0
        mask = sees[:, :, None] & images.aspect_ratio_mask.bool()[:, None]                    # (B, T, tiles)
        inputs |= dict(pixel_values=torch.stack(images.pixel_values)[:, None],
                       aspect_ratio_ids=images.aspect_ratio_ids[:, None],
                       aspect_ratio_mask=images.aspect_ratio_mask[:, None],
                       cross_attention_mask=mask.long()[:, :, None])
    return inputs


def main(argv=None):
    parser = command_line("python -m benchmarks.generate", __doc__)
    parser.add_argument("--model", type=text("a folder", os.path.isdir), default=TINY)
    for name, default in (("new-tokens", 64), ("repeats", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=integer(1), default=default)
    args = parser.parse_args(argv)
    import transformers                        # slow to import, and not there without the 'test' extra
    torch.set_num_threads(args.threads)
    processor = Processor.from_pretrained(args.model)
    ours, theirs = (kind.from_pretrained(args.model, dtype=torch.float32).eval()
                    for kind in (Llama, transformers.MllamaForConditionalGeneration))
    # transformers 5 keeps the output of layer i, not its input, as Meta trained the weights
    theirs.model.vision_model.intermediate_layers_indices = [
        i - 1 for i in ours.config.vision.intermediate_layers_indices]
    parameters = sum(p.numel() for p in ours.parameters())
    print(f"{parameters:,} parameters, {args.new_tokens} new tokens; {machine()}")
    sampling = dict(max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, do_sample=True, top_k=0,
                    top_p=1.0, temperature=1.0, pad_token_id=processor.pad_id)
    head(COLUMNS)
    rows = []
    for image, batch in itertools.product((False, True), (1, 64)):
        env = GeneralPoints(image=image, size=(224, 56))
        prompts = [processor.render(env.reset(seed)[0].messages) for seed in range(batch)]
        conversations = [prompt.ids for prompt in prompts]
        images = processor.images([prompt.images[0] if image else None for prompt in prompts])
        inputs = reference_inputs(processor, conversations, images)
        times = take_turns({
            "ours": lambda i: milliseconds(lambda: generate(
                ours, conversations, images=images, max_new_tokens=args.new_tokens, stop_ids=[],
                seeds=list(range(batch)))),
            "transformers": lambda i: milliseconds(lambda: theirs.generate(**inputs, **sampling)),
        }, args.repeats)
        rates = {name: 1000 * batch * args.new_tokens / statistics.median(found)
                 for name, found in times.items()}
        rows.append(rates | {"prompts": "image" if image else "text", "batch": batch,
                             "ratio": rates["ours"] / rates["transformers"]})
        show(rows[-1], COLUMNS)
    return rows


if __name__ == "__main__":
    command(main)
