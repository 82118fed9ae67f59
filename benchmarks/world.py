"""The demo's world: scenes per second, drawn, annotated and written as COCO's files by demo/world.py.

    python benchmarks/world.py

JPEGs, panoptic PNGs, instances, keypoints and captions, by all cores and by one; per second, and per second
of CPU time, which other processes disturb less. Interleaved; medians. Drawing limits it.
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
    p.add_argument("--scenes", type=int, default=300)
    p.add_argument("--size", type=int, default=96, help="longest side in pixels")
    p.add_argument("--rounds", type=int, default=2)
    args = p.parse_args()
    runs = {"all cores": world.each, "one": lambda function, items: list(map(function, items))}
    rates = {name: [] for name in runs}  # per second, per second of CPU time
    for _ in range(args.rounds):
        for name, each in runs.items():
            with tempfile.TemporaryDirectory() as folder, patch.object(world, "each", each):
                start, cpu = time.perf_counter(), sum(os.times()[:4])
                world.write(Path(folder), "train2017", args.scenes, args.size, seed=0)
                spent = time.perf_counter() - start, sum(os.times()[:4]) - cpu
                rates[name].append([args.scenes / seconds for seconds in spent])
    medians = {name: list(map(statistics.median, zip(*v, strict=True))) for name, v in rates.items()}
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.scenes} scenes of {args.size} px")
    print("| | scenes/s | per CPU second |\n|---|---|---|")
    for name, values in medians.items():
        print(f"| {name} | {' | '.join(f'{v:.0f}' for v in values)} |")
    print(
        json.dumps(
            {**vars(args), "cores": os.cpu_count(), "scenes_per_s": medians, "pillow": PIL.__version__}
        )
    )


if __name__ == "__main__":
    main()
