"""GOI: the linear probe's 30 epochs over cached features, with and without the choice of a learning rate.

    python benchmarks/goi.py

32,000 features of width 1,408 (EVA-ViT-G on M3IT's coco-goi) in a memory-mapped file, 80 classes. The floor
is torch's own nn.Linear, AdamW and cross_entropy on shuffled batches of the same size, without a schedule or
standardization. Interleaved; medians. Gathering the rows of a batch and the product with the layer limit it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a lora.py too

import eval_goi


def floor(f: torch.Tensor, labels: torch.Tensor, classes: int, epochs: int) -> None:
    layer = nn.Linear(f.shape[1], classes)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(f)).split(eval_goi.BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(f[rows]), labels[rows]).backward()
            optimizer.step()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--features", type=int, default=32_000)
    p.add_argument("--dim", type=int, default=1408)
    p.add_argument("--classes", type=int, default=80)
    p.add_argument("--epochs", type=int, default=30)
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--threads", type=int, default=2, help="of torch")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    labels = rng.integers(args.classes, size=args.features)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.npy"
        np.save(path, rng.standard_normal((args.features, args.dim), np.float32))
        f = np.load(path, mmap_mode="r")
        tensors = torch.from_numpy(np.array(f)), torch.from_numpy(labels)
        options = Namespace(seed=0, epochs=args.epochs)
        runs = {
            "torch, one rate": lambda: floor(*tensors, args.classes, args.epochs),
            "ours, one rate": lambda: eval_goi.fit(*tensors, args.classes, [1e-3], args.epochs, 0),
            f"ours, the best of {len(eval_goi.LRS)} rates": lambda: eval_goi.probe(
                f, labels, args.classes, options, torch.device("cpu")
            ),
        }
        times = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{args.epochs} epochs, {args.features} x {args.dim}, {args.threads} threads")
    print("| | s |\n|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.1f} |")
    print(json.dumps({**vars(args), "seconds": medians, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
