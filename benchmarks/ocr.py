"""OCR evaluation: reading an LMDB against bare Pillow, and a training step against its two parts.

    python benchmarks/ocr.py

Reading: pictures per second on one core, of JPEGs of MJSynth's size squashed to 224 px; the floor decodes and
resizes the same bytes from a list in memory. Step: eval_ocr.train, loader and log included, per step (the
time of 2 n steps less that of n), against the frozen forward pass and the head's forward, backward and update
on features at hand. Interleaved; medians. Decoding limits the reading, the two forward passes the step.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from io import BytesIO
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a lora.py too

import backbone as vit
import eval_ocr
from data import words
from ranks import Ranks, launch, start
from training import minimize, sharded_adamw


def write_set(path: Path, count: int) -> list[bytes]:
    """Random words as JPEGs of 31 px height, as MJSynth's, in clovaai's layout."""
    rng, font, pictures = np.random.default_rng(0), ImageFont.load_default(22), []
    with lmdb.open(str(path), map_size=1 << 30) as environment, environment.begin(write=True) as records:
        for i in range(1, count + 1):
            text = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 12)))
            noise = rng.integers(120, 255, (31, int(font.getlength(text)) + 10, 3)).astype(np.uint8)
            image = Image.fromarray(noise)
            ImageDraw.Draw(image).text((5, 2), text, (20, 20, 60), font)
            file = BytesIO()
            image.save(file, "JPEG")
            pictures.append(file.getvalue())
            records.put(b"image-%09d" % i, pictures[-1])
            records.put(b"label-%09d" % i, text.encode())
        records.put(b"num-samples", str(count).encode())
    return pictures


def seconds(run, *args) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def reading(sets: dict, pictures: list[bytes], size: tuple[int, int], rounds: int) -> dict[str, float]:
    """Pictures per second."""
    read = words.Words(sets, size)

    def ours():
        for i in range(len(read)):
            read[i]

    def floor():
        for data in pictures:
            np.array(Image.open(BytesIO(data)).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC))

    times = {"ours": [], "Pillow": []}
    for _ in range(rounds + 1):
        times["Pillow"].append(seconds(floor))
        times["ours"].append(seconds(ours))
    return {name: len(read) / statistics.median(t[1:]) for name, t in times.items()}


def steps(args: Namespace, stream: words.WordStream, ranks: Ranks, rounds: int) -> dict[str, float]:
    """Milliseconds per step."""
    backbone = vit.load(args.model, "random", ranks.dtype, ranks.device)
    head = eval_ocr.new_head(args, backbone).to(ranks.device).train()
    optimizer = sharded_adamw([{"params": list(head.parameters())}])
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=ranks.dtype == torch.float16)
    images = torch.randn(args.batch, 3, *args.size, device=ranks.device)
    y = [{"label": "word"}] * args.batch
    with torch.no_grad(), ranks.autocast():
        f = backbone(images)

    def wait():
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def forward():
        with ranks.autocast():
            for _ in range(args.steps):
                backbone(images)
        wait()

    def head_step():
        for _ in range(args.steps):
            minimize(head.loss(f, y)[0], optimizer, scaler)
        wait()

    def train(n: int):
        args.iters = n
        with tempfile.TemporaryDirectory() as args.out:
            eval_ocr.train(args, "before", backbone, stream, ranks)

    times = {"forward": [], "head": [], "n": [], "2n": []}
    for _ in range(rounds + 1):
        times["n"].append(seconds(train, args.steps))
        times["forward"].append(seconds(forward))
        times["head"].append(seconds(head_step))
        times["2n"].append(seconds(train, 2 * args.steps))
    per = {k: [1000 * t / args.steps for t in v[1:]] for k, v in times.items()}
    per["step"] = [b - a for a, b in zip(per.pop("n"), per.pop("2n"), strict=True)]
    return {name: statistics.median(values) for name, values in per.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="eva_mini", help="backbone, random weights")
    p.add_argument("--width", type=int, default=128, help="of the head")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--steps", type=int, default=3, help="n")
    p.add_argument("--words", type=int, default=400, help="pictures to read")
    p.add_argument("--rounds", type=int, default=5, help="timed rounds, after one of warm-up")
    p.add_argument("--workers", type=int, default=1, help="loader processes in training")
    p.add_argument("--threads", type=int, default=2, help="of torch")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    fixed = dict(size=(224, 224), charset=36, seed=0, lr=1e-4, warmup=0, resume=False)
    fixed |= dict(save_every=10**9, log_every=10**9, lora=None, no_cls=False, imagenet_norm=False)
    fixed |= dict(cache=None)
    settings = Namespace(**vars(args), **fixed, backbone_dtype="auto", weights="random")
    ranks = start(settings, p)
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_set(Path(folder) / "set", args.words)
        sets = words.find([folder])
        rates = reading(sets, pictures, settings.size, args.rounds)
        stream = words.WordStream({"words": sets}, words.CHARSETS[36], settings.size, seed=0)
        ms = steps(settings, stream, ranks, args.rounds)
    ratio = rates["ours"] / rates["Pillow"], ms["step"] / (ms["forward"] + ms["head"])
    print("| reading | pictures / s | / Pillow |\n|---|---|---|")
    print(f"| Pillow, from memory | {rates['Pillow']:.0f} | 1.00 |")
    print(f"| ours, from LMDB | {rates['ours']:.0f} | {ratio[0]:.2f} |")
    print("\n| frozen forward, ms | head's step, ms | sum, ms | training step, ms | / sum |")
    print("|---|---|---|---|---|")
    total = ms["forward"] + ms["head"]
    print(f"| {ms['forward']:.0f} | {ms['head']:.0f} | {total:.0f} | {ms['step']:.0f} | {ratio[1]:.2f} |")
    print(json.dumps({**vars(args), "rates": rates, "ms": ms, "ratios": ratio, "torch": torch.__version__}))


if __name__ == "__main__":
    launch(main)
