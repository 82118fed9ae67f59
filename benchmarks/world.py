"""The demo's world: scenes per second, drawn, annotated and written as COCO's files by demo/world.py.

    python benchmarks/world.py

JPEGs, panoptic PNGs, instances, keypoints and captions, by all cores and by one. Interleaved; medians.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import PIL

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a lora.py too

from demo import world


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scenes", type=int, default=600)
    p.add_argument("--size", type=int, default=96, help="longest side in pixels")
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    runs = {"all cores": world.each, "one": lambda function, items: list(map(function, items))}
    rates = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, each in runs.items():
            with tempfile.TemporaryDirectory() as folder, patch.object(world, "each", each):
                start = time.perf_counter()
                world.write(Path(folder), "train2017", args.scenes, args.size, seed=0)
                rates[name].append(args.scenes / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.scenes} scenes of {args.size} px")
    print("| | scenes/s |\n|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.0f} |")
    print(
        json.dumps(
            {**vars(args), "cores": os.cpu_count(), "scenes_per_s": medians, "pillow": PIL.__version__}
        )
    )


if __name__ == "__main__":
    main()
