"""How well the OCR head reads after minutes: the demo's model and words.

    python benchmarks/reading.py

eval_ocr.py trains on 16,000 words of the demo's world and reads 210 others like them, and as many in other
fonts, blurred, curved, cluttered, and words that training has not; after one step and after all. Minutes are
those of the whole command, reading included, with --cache: M sees each word once. The head's step limits it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo import world  # noqa: E402


def read(folder: Path, out: Path, iters: int) -> tuple[dict[str, float], float]:
    """Words right by set, in percent, and minutes, of eval_ocr.py with so many steps of training."""
    model = "--model eva_mini.px112 --weights demo/eva_mini_clip.safetensors --size 56 112 --workers 1"
    head = f"--charset 36 --width 128 --batch 32 --lr 1e-3 --warmup 100 --iters {iters} --cache {out}"
    options = f"{model} {head} --train {folder}/train --test {folder}/test --out {out}".split()
    start = time.perf_counter()
    subprocess.run([sys.executable, "eval_ocr.py", *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    minutes = (time.perf_counter() - start) / 60
    rows = json.loads((out / "result.json").read_text())["rows"]
    return {r["set"]: r["before"] for r in rows if r["metric"] == "accuracy"}, minutes


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--words", type=int, default=16_000, help="to train on")
    p.add_argument("--iters", type=int, default=1700, help="steps")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        world.write_words(folder / "train", "plain", args.words, seed=2)
        for k, kind in enumerate(world.WORD_SETS):
            world.write_words(folder / "test" / kind, kind, 210, seed=3 + k)
        first, _ = read(folder, folder / "first", 1)
        trained, minutes = read(folder, folder / "trained", args.iters)
    print(f"| words | after 1 step, % right | after {args.iters} steps |\n|---|---|---|")
    for name, right in trained.items():
        print(f"| {name} | {first[name]:.1f} | {right:.1f} |")
    print(f"\n{minutes:.1f} minutes.")
    print(json.dumps({**vars(args), "first": first, "trained": trained, "minutes": minutes}))


if __name__ == "__main__":
    main()
