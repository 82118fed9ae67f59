"""Captioning head: a training step against a plain loop of Eqs. 3 and 4; beam search of 64 images together.

    python benchmarks/captioner.py

The plain loop is the equations as they stand: it projects the features and applies the vocabulary layer at
every time step. Both train all weights and hand a gradient to the features: D = 1408, batch 8, 14 x 14
positions, vocabulary 9,490, captions as long as COCO's. The beam search is predict() with five beams on all
images at once, and on one after another; ends are barred and captions cut at 12 words, so both say as much.
Interleaved; medians. One by one, the search reads 28 MB of weights for every word: memory limits it, and
others who use the memory make it unsteady.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that ours are found from any folder

from backbone import Features
from heads.captioner import Captioner

LENGTHS = [8, 8, 9, 9, 10, 10, 11, 11, 12, 15]  # ten quantiles of 500 real captions of COCO, in words


def plain_loss(head: Captioner, f: Features, y: list[dict]) -> torch.Tensor:
    """Eqs. 3 and 4 with the doubly stochastic term, a word at a time, as they are written."""
    v = F.adaptive_avg_pool2d(f.grid, 14).flatten(2).transpose(1, 2)  # (B, N, D)
    h, c = head.init_h(v.mean(1)), head.init_c(v.mean(1))  # (B, n)
    tokens = torch.nn.utils.rnn.pad_sequence([t["tokens"] for t in y], batch_first=True)
    looked, entropy, words = torch.zeros(v.shape[:2]), 0.0, 0
    for t in range(tokens.shape[1] - 1):
        attention = head.attention
        energy = F.relu(attention.encoder_att(v) + attention.decoder_att(h)[:, None])
        alpha = attention.full_att(energy).squeeze(-1).softmax(-1)  # (B, N)
        z = head.f_beta(h).sigmoid() * (alpha[:, None] @ v).squeeze(1)
        h, c = head.decode_step(torch.cat([head.embedding(tokens[:, t]), z], 1), (h, c))
        said = tokens[:, t + 1] > 0
        logits = head.fc(head.dropout(h))
        entropy = entropy + (F.cross_entropy(logits, tokens[:, t + 1], reduction="none") * said).sum()
        looked = looked + alpha * said[:, None]
        words += int(said.sum())
    return entropy / words + (1 - looked).square().mean()


def interleaved(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each, after a warm-up."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dim", type=int, default=1408, help="width of the features (EVA-ViT-G: 1408)")
    p.add_argument("--batch", type=int, default=8, help="captions of a training step")
    p.add_argument("--images", type=int, default=64, help="of the beam search")
    p.add_argument("--repeats", type=int, default=7, help="timed steps of each")
    p.add_argument("--search-repeats", type=int, default=2, help="timed searches of each")
    p.add_argument("--threads", type=int, default=2, help="of torch")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    words = ["<pad>", *map(str, range(9486)), "<unk>", "<start>", "<end>"]
    head = Captioner(args.dim, words).train()
    f = Features(None, torch.randn(args.batch, args.dim, 18, 18, requires_grad=True), None)
    lengths = [LENGTHS[(3 * i) % len(LENGTHS)] for i in range(args.batch)]
    tokens = [torch.tensor([9488, *torch.randint(1, 9487, (n,)).tolist(), 9489]) for n in lengths]
    y = [{"image_id": i, "tokens": t} for i, t in enumerate(tokens)]

    def step(loss: Callable) -> None:
        head.zero_grad()
        f.grid.grad = None
        loss().backward()

    head.dropout.p = 0.0  # to compare values; the same work
    ours, plain = head.loss(f, y)[0], plain_loss(head, f, y)
    difference = abs(ours.item() / plain.item() - 1)
    assert difference < 1e-5, (ours, plain)
    head.dropout.p = 0.5
    runs = {
        "ours": lambda: step(lambda: head.loss(f, y)[0]),
        "plain loop": lambda: step(lambda: plain_loss(head, f, y)),
    }
    training = interleaved(runs, args.repeats)

    head.eval()
    head.fc.bias.data[-1], head.most_tokens = -1e9, 12
    many = Features(None, torch.randn(args.images, args.dim, 18, 18), None)
    ids = [{"image_id": i} for i in range(args.images)]
    runs = {
        "together": lambda: head.predict(many, ids),
        "one by one": lambda: [
            head.predict(Features(None, many.grid[i : i + 1], None), ids[i : i + 1])
            for i in range(args.images)
        ],
    }
    search = interleaved(runs, args.search_repeats)

    print(f"torch {torch.__version__}, {args.threads} threads, loss {ours:.6f}, equal to {difference:.1e}")
    print("| | s | times as fast |\n|---|---|---|")
    for what, times in (("training step", training), ("beam search", search)):
        slowest = max(times.values())
        for name, seconds in times.items():
            print(f"| {what}: {name} | {seconds:.3f} | {slowest / seconds:.1f} |")
    result = {**vars(args), "torch": torch.__version__, "training_s": training, "search_s": search}
    result["training_speedup"] = round(training["plain loop"] / training["ours"], 2)
    result["search_speedup"] = round(search["one by one"] / search["together"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
