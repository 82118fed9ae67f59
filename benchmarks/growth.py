"""How the time and the memory of a step of stage 2 grow with tokens, depth, batch and ranks.

    python benchmarks/growth.py     # CPU, fp32; markdown table, growth.png, JSON

eva_mini with other depths and image sizes, LoRA of rank 64 through DETR, one thread for each rank (1 or 2
gloo processes). One size changes at a time. Rounds are interleaved and the time is the median; memory is the
peak of what one more step makes on top of weights and AdamW's state, counted, so it repeats to the byte; both
on rank 0. It is linear in tokens, depth and batch, and does not depend on the ranks.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a lora.py too

from memory import LiveBytes, batch_of

import backbone as vit
import lora
import tasks
import training

BASE = {"tokens": 256, "depth": 6, "batch": 1, "ranks": 1}  # tokens of each image; [CLS] comes to them
GROWS = {"tokens": (64, 256, 576, 1024), "depth": (3, 6, 12), "batch": (1, 2, 4), "ranks": (1, 2)}


def stage_2(tokens: int, depth: int, batch: int, blocks: int):
    """A step of stage 2 with detection, to be called again and again."""
    backbone = vit.load("eva_mini", "random")
    backbone.vit.blocks = nn.ModuleList(copy.deepcopy(backbone.vit.blocks[0]) for _ in range(depth))
    backbone.recompute = depth if blocks < 0 else blocks
    trained = list(lora.parameters(lora.attach(backbone.vit, rank=64)).values())
    M = training.parallel(backbone, torch.device("cpu"))
    head = tasks.find("detection").Head(backbone.dim, [{"id": i} for i in range(80)])
    head.requires_grad_(False).eval()
    optimizer = training.sharded_adamw([{"params": trained}])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    images, y = batch_of("detection", batch, (14 * round(tokens**0.5),) * 2, targets=7)

    def step() -> None:
        loss, _ = head.loss(M(images), y)
        training.minimize(loss, optimizer, scaler)

    return step


def measure(rank: int, world: int, cases: list[dict], reps: int, blocks: int, folder: str) -> None:
    """One rank; rank 0 writes [median seconds, peak bytes] of each case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    steps = [stage_2(case["tokens"], case["depth"], case["batch"], blocks) for case in cases]
    seconds, peaks = [[] for _ in cases], []
    for round_ in range(reps + 1):  # the first makes AdamW's state
        for step, times in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            if round_:
                times.append(time.perf_counter() - start)
    for step in steps:
        with LiveBytes() as live:
            step()
        peaks.append(live.peak)
    if rank == 0:
        found = [[statistics.median(times), peak] for times, peak in zip(seconds, peaks, strict=True)]
        Path(folder, f"found{world}.json").write_text(json.dumps(found))
    dist.barrier()
    del steps, step
    dist.destroy_process_group()


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(GROWS), figsize=(3 * len(GROWS), 5), sharey="row", layout="constrained"
    )
    for column, name in zip(axes.T, GROWS, strict=True):
        mine = sorted((row for row in rows if row["grows"] == name), key=lambda row: row[name])
        for axis, key, label in zip(column, ("seconds", "MB"), ("s / step", "MB at the peak"), strict=True):
            axis.plot([row[name] for row in mine], [row[key] for row in mine], "o-")
            axis.set(xlim=(0, None), xlabel=name, ylabel=label if name == "tokens" else None)
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:  # a row shares them, so after all is drawn: else later points lie outside
        axis.set_ylim(0, None)
    figure.savefig(path, dpi=120)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reps", type=int, default=5, help="rounds to take medians over")
    p.add_argument("--checkpoint-blocks", type=int, default=0, help="as in stage 2 (-1: all)")
    p.add_argument("--out", default="benchmarks", help="folder for growth.png")
    args = p.parse_args()

    rows = [{**BASE, name: value, "grows": name} for name, values in GROWS.items() for value in values]
    with tempfile.TemporaryDirectory() as folder:
        for world in GROWS["ranks"]:
            cases = [row for row in rows if row["ranks"] == world]
            mp.spawn(measure, (world, cases, args.reps, args.checkpoint_blocks, folder), nprocs=world)
            found = json.loads(Path(folder, f"found{world}.json").read_text())
            for row, (seconds, peak) in zip(cases, found, strict=True):
                row["seconds"], row["MB"] = round(seconds, 4), round(peak / 1e6, 2)

    print(f"torch {torch.__version__}, {args.reps} rounds, {args.checkpoint_blocks} blocks recomputed\n")
    print("| grows | tokens | depth | batch | ranks | s / step | peak, MB |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['grows']} |",
            *(f"{row[name]} |" for name in BASE),
            f"{row['seconds']:.3f} | {row['MB']} |",
        )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    plot(rows, out / "growth.png")
    print("\n![time and memory of a step](growth.png)\n")
    print(json.dumps({**vars(args), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
