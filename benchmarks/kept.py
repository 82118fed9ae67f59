"""Stage 1 with features of the frozen M that are kept (--cache), against asking M at every step.

    python benchmarks/kept.py

Runs `stage1_heads.py` itself on the demo's world, its scenes squashed to --size, by turns without and with
--cache, and takes the medians of the seconds a step that log.jsonl has after the first three. The features
are computed once, before the steps that are timed: a second of M for every image, as often as it would have
seen it otherwise. What is left of a step is its head: the smaller it is beside M, the more is gained.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VIT_B, MINI = "vit_base_patch16_224.augreg_in21k", "eva_mini.px112"
SMALL = ["--layers", "3", "3", "--queries", "20"]
CASES = {  # M and the options of its head
    "captioning, ViT-B/16": (VIT_B, ["--task", "captioning"]),
    "pose, ViT-B/16": (VIT_B, ["--task", "pose"]),
    "detection with 3 + 3 layers and 20 queries, ViT-B/16": (VIT_B, ["--task", "detection", *SMALL]),
    "captioning, the demo's M": (MINI, ["--task", "captioning"]),
    "detection with 3 + 3 layers and 20 queries, the demo's M": (MINI, ["--task", "detection", *SMALL]),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--iters", type=int, default=9, help="steps of a run")
    p.add_argument("--rounds", type=int, default=2, help="runs of each, by turns")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--size", type=int, default=224, help="px of M's pictures; the demo's M: half")
    args = p.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made = [ROOT / "demo/world.py", folder / "world", "--train", 64, "--val", 14, "--words", 2]
        subprocess.run([sys.executable, *map(str, made)], check=True, stdout=subprocess.DEVNULL)
        for case, (model, head) in CASES.items():
            size = args.size // 2 if model == MINI else args.size
            options = ["--model", model, *head, "--weights", "random", "--coco", folder / "world/coco"]
            options += [
                "--size",
                size,
                "--batch",
                args.batch,
                "--iters",
                args.iters,
                "--log-every",
                1,
                "--workers",
                0,
            ]

            def step(more: list, options=options) -> list[float]:
                out = Path(tempfile.mkdtemp(dir=folder))
                command = [sys.executable, ROOT / "stage1_heads.py", *options, *more, "--out", out]
                subprocess.run([str(c) for c in command], check=True, capture_output=True)
                lines = (out / "log.jsonl").read_text().splitlines()
                return [json.loads(line)["seconds"] for line in lines[3:]]

            kept = ["--cache", folder / "kept"]
            step(kept)  # computes the features
            seconds = {"asking M": [], "kept": []}
            for _ in range(args.rounds):
                seconds["asking M"] += step([])
                seconds["kept"] += step(kept)
            found[case] = {name: statistics.median(values) for name, values in seconds.items()}
    print("| stage 1 of | s a step, asking M | s a step, kept | times as fast |\n|---|---|---|---|")
    for case, s in found.items():
        print(f"| {case} | {s['asking M']:.3f} | {s['kept']:.3f} | {s['asking M'] / s['kept']:.1f} |")
    print("\n" + json.dumps({**vars(args), **found}))


if __name__ == "__main__":
    main()
