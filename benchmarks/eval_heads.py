"""In-domain evaluation: its loop against the bare backbone on the same images; panoptic quality.

    python benchmarks/eval_heads.py

The backbone has EVA-ViT-G's width, 1408, and by default a quarter of its 40 blocks: with all of them the
heads weigh four times less. Both do the same batches in turn; the images, of half the evaluation's size, are
decoded beforehand. The loop is forward, answer and result format.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # before this folder, which has an eval_heads.py too

import backbone as vit
import eval_heads
import tasks
from data.segmentation import read_segments
from data.validation import open_items
from demo import world
from scores import panoptic_quality


def segments(rng, height: int, width: int, count: int) -> tuple[np.ndarray, list[dict]]:
    """Each pixel belongs to the nearest of `count` random points, by a distance of its own."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    best, ids = np.full((height, width), np.inf, np.float32), np.zeros((height, width), np.int32)
    for k, (cy, cx, stretch) in enumerate(rng.uniform((0, 0, 0.3), (height, width, 3), (count, 3)), 1):
        distance = (y - cy) ** 2 * stretch + (x - cx) ** 2 / stretch
        ids, best = np.where(distance < best, np.int32(k * 1000), ids), np.minimum(distance, best)
    return ids, [{"id": int(i), "category_id": int(rng.integers(1, 134))} for i in np.unique(ids)]


def save(ids: np.ndarray, path: Path) -> None:
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(path)


def quality_seconds(folder: Path, count: int, distinct: int = 50) -> float:
    """Seconds to read and count `count` pairs of 640 x 480 annotations, in one process."""
    rng, pairs = np.random.default_rng(0), []
    categories = [{"id": i, "name": str(i), "isthing": i <= 80} for i in range(1, 134)]
    for k in range(distinct):
        truth, info = segments(rng, 480, 640, int(rng.integers(5, 50)))
        found = np.roll(truth, rng.integers(-20, 20, 2), (0, 1))
        save(truth, folder / f"truth{k}.png")
        save(found, folder / f"found{k}.png")
        pairs.append((folder / f"truth{k}.png", info, folder / f"found{k}.png"))
    start, total = time.perf_counter(), 0
    for k in range(count):
        truth, info, found = pairs[k % distinct]
        maps = (read_segments(path) for path in (truth, found))
        total += panoptic_quality.image_counts(next(maps), info, next(maps), info, categories)
    panoptic_quality.panoptic_quality(total, categories)
    return time.perf_counter() - start


def loops(task: str, backbone, folder: Path, args) -> dict[str, list[float]]:
    """Seconds for each batch of the bare backbone, and of the evaluation."""
    options = argparse.Namespace(
        coco=folder, split="val2017", image_scale=args.image_scale, size=None, limit=None
    )
    options.persons, options.out, options.seed = None, folder / "out", 0
    items = open_items(task, options)
    items.patch = backbone.patch
    torch.manual_seed(0)
    head = tasks.find(task).Head(backbone.dim, items.categories).eval()
    scorer = eval_heads.open_scorer(task, items, options)
    collate = partial(items.collate, patch=backbone.patch, mean=backbone.mean, std=backbone.std)
    batches = [collate([items[i % len(items)]]) for i in range(args.rounds + 1)]
    seconds = {"bare": [], "evaluation": []}
    for images, valid, y in batches:
        with torch.no_grad():
            start = time.perf_counter()
            backbone(images, valid)
            middle = time.perf_counter()
            f = backbone(images, valid)
            for answer in head.predict(f, y):
                scorer.keep(answer, "before")
            end = time.perf_counter()
        seconds["bare"].append(middle - start)
        seconds["evaluation"].append(end - middle)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--depth", type=int, default=10, help="blocks of the backbone (EVA-ViT-G: 40)")
    p.add_argument("--image-scale", type=float, default=0.5, help="times the sizes of the evaluation")
    p.add_argument("--rounds", type=int, default=3, help="timed batches of one image, or one person")
    p.add_argument("--maps", type=int, default=200, help="images of the panoptic count")
    p.add_argument("--threads", type=int, default=2, help="of torch")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    cpu = platform.processor() or platform.machine()
    print(f"{cpu}, torch {torch.__version__}, {args.threads} threads, fp32")

    timm_create, timm.create_model = timm.create_model, partial(timm.create_model, depth=args.depth)
    backbone = vit.load("eva_g", "random")
    timm.create_model = timm_create
    table = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world.write(folder, "val2017", args.rounds + 8, 640, seed=0)  # so many that some have persons
        for task in ("detection", "segmentation", "panoptic", "pose"):
            table[task] = {k: statistics.median(v) for k, v in loops(task, backbone, folder, args).items()}
        seconds = quality_seconds(folder, args.maps)

    print(
        "| task | bare backbone, s / image | evaluation, s / image | throughput / bare |\n|---|---|---|---|"
    )
    for task, t in table.items():
        print(f"| {task} | {t['bare']:.2f} | {t['evaluation']:.2f} | {t['bare'] / t['evaluation']:.2f} |")
    rate = f"{args.maps / seconds:.0f} images a second in one process"
    print(f"\nPanoptic quality, read from PNGs of 640 x 480: {rate}.")
    print(json.dumps({**vars(args), "seconds": table, "panoptic_seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
