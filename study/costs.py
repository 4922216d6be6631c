"""What a token costs and what adapters save, counted on the meta device for Llama-3.2-11B-Vision.

    python -m study.costs --rank 16

The first table has GFLOPs per token of a dialogue (harness/flops.py) beside the paper's 2 N D and 6 N D, the
second the memory of what learns (variants/lora.py) in float32.
"""

import torch

from harness import flops
from harness.load import count_parameters
from harness.ranges import command_line, integer
from harness.terminal import command
from model import Llama
from study.plan import LLAMA_11B
from variants import lora


def flops_table(config, length, answers):
    """Write GFLOPs per token of a dialogue of `length` tokens, `answers` of them answers, without and with an
    image of all tiles."""
    with torch.device("meta"):
        llama = Llama(config)
    rate, rows = flops.rates(llama), [["GFLOPs a token", *flops.PARTS, "counted", "2ND or 6ND"]]
    for task, what in (("gp-l", "text alone"), ("gp-vl", "with an image")):
        tiles = config.vision.max_num_tiles if task == "gp-vl" else 0
        done = flops.quantities(config, length, answers, tiles, before=1)
        forward, backward = (flops.cost(rate, done, backward=way) for way in (False, True))
        for name, factor, counted in (("scoring", 2, forward), ("update", 6, forward + backward)):
            numbers = [*(counted[part] for part in flops.PARTS), sum(counted.values()),
                       factor * length * count_parameters(llama, task)]
            rows.append([f"{name}, {what}", *(f"{number / length / 1e9:.2f}" for number in numbers)])
    return "\n".join(f"{title:<34}" + "".join(f"{cell:>17}" for cell in cells) for title, *cells in rows)


def lora_table(config, rank):
    """Write numbers learnt and GB of weights, gradients and Adam's moments, with adapters on some layers."""
    lines = [f"{'':<16}{'learnt':>16}    GB: all weights    gradients    moments"]
    for modules in ("", "all", "attention", "mlp"):
        with torch.device("meta"):
            llama = Llama(config)
        if modules:
            lora.adapt(llama, modules, rank, alpha=rank)
        whole = sum(p.numel() for p in llama.parameters())
        learnt = sum(p.numel() for p in llama.parameters() if p.requires_grad)
        weights, gradients, moments = (f"{4 * n / 1e9:.1f}" for n in (whole, learnt, 2 * learnt))
        lines.append(f"{modules or 'without':<16}{learnt:>16,}{weights:>19}{gradients:>13}{moments:>11}")
    return "\n".join(lines)


def main(argv=None):
    parser = command_line("python -m study.costs", __doc__)
    parser.add_argument("--rank", type=integer(1, 10**5), default=16,
                        help="of adapters (default: %(default)s)")
    rank = parser.parse_args(argv).rank
    print(flops_table(LLAMA_11B, 512, 128), lora_table(LLAMA_11B, rank), sep="\n\n")


if __name__ == "__main__":
    command(main)
