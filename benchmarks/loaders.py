"""Stage 2 with three tasks: the share of a step's time that is spent waiting for data.

    python benchmarks/loaders.py --coco DIR

Runs stage2_lora.py itself, in this process, with a clock around what it does for its next batch. The model
is eva_mini with heads of random weights, at 0.4 of the image sizes: a larger one leaves more time to load.
The first steps, in which the workers start, are not counted. Decoding and resizing limit it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a lora.py too

import stage2_lora
import tasks
import training

TASKS = ("detection", "segmentation", "captioning")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--coco", default="coco", help="folder in COCO's layout")
    p.add_argument("--workers", type=int, default=2, help="loader processes of each task")
    p.add_argument("--iters", type=int, default=24, help="steps")
    p.add_argument("--skip", type=int, default=4, help="first steps that do not count")
    p.add_argument("--image-scale", type=float, default=0.4, help="times the release's image sizes")
    args = p.parse_args()

    waits, ends = [], []
    fetch, add = training.Log.next, training.Log.add

    def fetched(self, stream):
        start = time.perf_counter()
        batch = fetch(self, stream)
        waits.append(time.perf_counter() - start)
        return batch

    def added(self, step, task, *rest):
        add(self, step, task, *rest)
        ends.append((task, time.perf_counter()))

    training.Log.next, training.Log.add = fetched, added
    with tempfile.TemporaryDirectory() as out:
        same = dict(
            coco=args.coco,
            split="train2017",
            seed=0,
            image_scale=1.0,
            size=None,
            data_fraction=1.0,
            captions=None,
        )
        same |= dict(exclude_images=None, min_count=6, skip_bad_images=False)
        torch.manual_seed(0)
        for task in TASKS:
            head = tasks.find(task).Head(192, tasks.open_stream(task, Namespace(**same)).classes)
            tasks.save_head(head, Path(out) / f"{task}.safetensors", task)
        options = dict(model="eva_mini", weights="random", coco=args.coco, heads=out, out=f"{out}/visft")
        options |= {"iters": args.iters, "workers": args.workers, "image-scale": args.image_scale}
        sys.argv = ["stage2_lora.py", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]
        stage2_lora.main()
    training.Log.next, training.Log.add = fetch, add

    times = [b - a for (_, a), (_, b) in zip(ends, ends[1:], strict=False)]  # of steps 1, 2, ...
    steps = list(zip([task for task, _ in ends[1:]], times, waits[1:], strict=True))[args.skip :]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.workers} workers per task")
    print("| task | steps | median step, s | waiting, s | share |\n|---|---|---|---|---|")
    for task in (*TASKS, "all"):
        mine = [(s, w) for name, s, w in steps if task in (name, "all")]
        total, waited = sum(s for s, _ in mine), sum(w for _, w in mine)
        median = statistics.median(s for s, _ in mine)
        print(f"| {task} | {len(mine)} | {median:.2f} | {waited:.2f} | {100 * waited / total:.1f}% |")
    print(json.dumps({**vars(args), "share": round(waited / total, 4), "steps": len(mine)}))


if __name__ == "__main__":
    main()
