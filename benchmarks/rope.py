"""Rotary positions in a padded batch, where each image has a grid of its own, beside an unpadded batch.

    python benchmarks/rope.py

Forward and backward of frozen blocks of width 768 down to the first one, as stage 2 takes them, on as many
tokens either way: two images of 32 x 32 patches, or one of them and one of 32 x 24 with padding. Padded and
unpadded take turns in one process. Times are CPU time, medians; ratios are medians over the rounds, with
quartiles; `best` is the ratio of the fastest runs. Learned positions stand for what the padding's mask costs
without RoPE. The blocks' products limit both; with all blocks of a model, the sines and cosines, which are
computed once, weigh less than here.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a lora.py too

import backbone as vit

MODELS = {
    "vit_base_patch16_224": "learned positions",
    "eva02_base_patch14_224": "a grid of pretraining, stretched",
    "vit_base_patch16_dinov3": "from -1 to 1",
    "vit_base_patch16_rope_mixed_224": "frequencies of each block and head",
}
MOST = 1.03  # padded / unpadded


def built(name: str, depth: int) -> vit.Backbone:
    create = timm.create_model
    timm.create_model = lambda *args, **options: create(*args, depth=depth, **options)
    try:
        backbone = vit.load(name, "random")
    finally:
        timm.create_model = create
    backbone.vit.blocks[0].norm1.weight.requires_grad_()
    return backbone


def seconds(backbone: vit.Backbone, images: torch.Tensor, valid: torch.Tensor | None) -> float:
    """Of CPU time, all threads together."""
    begin = time.process_time()
    backbone(images, valid).grid.mean().backward()
    return time.process_time() - begin


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--depth", type=int, default=1, help="blocks of each model")
    p.add_argument("--rounds", type=int, default=25, help="at least 2; one more before them is not counted")
    p.add_argument("--threads", type=int, default=1, help="of torch: CPU time of more is not the time of one")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    print("| model | positions | tokens | unpadded, ms | padded, ms | padded / unpadded | quartiles | best |")
    print("|---|---|---|---|---|---|---|---|")
    results = {}
    for name, positions in MODELS.items():
        backbone = built(name, args.depth)
        side = 32 * backbone.patch
        images, valid = torch.randn(2, 3, side, side), torch.ones(2, side, side, dtype=torch.bool)
        valid[1, :, 24 * backbone.patch :] = False
        kinds, taken = {"unpadded": None, "padded": valid}, {"unpadded": [], "padded": []}
        for r in range(args.rounds + 1):
            for kind in sorted(kinds, reverse=r % 2 == 0):
                taken[kind].append(seconds(backbone, images, kinds[kind]))
        unpadded, padded = (taken[kind][1:] for kind in kinds)
        low, ratio, high = statistics.quantiles((b / a for a, b in zip(unpadded, padded, strict=True)), n=4)
        best = min(padded) / min(unpadded)
        tokens = 32 * 32 + backbone.vit.num_prefix_tokens
        medians = [1e3 * statistics.median(values) for values in (unpadded, padded)]
        told = f"{medians[0]:.0f} | {medians[1]:.0f} | {ratio:.3f} | {low:.3f} to {high:.3f} | {best:.3f}"
        print(f"| {name} | {positions} | {tokens:,} | {told} |", flush=True)
        results[name] = {"unpadded": unpadded, "padded": padded, "ratio": ratio, "best": best}
    worst = max(result["ratio"] for result in results.values())
    print(f"\nAim: at most {MOST} times the unpadded batch; the worst is {worst:.3f}.\n")
    print(json.dumps({"depth": args.depth, "threads": args.threads, "aim": MOST, **results}))


if __name__ == "__main__":
    main()
