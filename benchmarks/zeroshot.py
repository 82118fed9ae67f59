"""Zero-shot evaluation: its loop against the bare tower, one pass against two, ranks at COCO's size.

    python benchmarks/zeroshot.py

(a) The loop of `eval_zeroshot.py` over a folder of made-up JPEGs (500 x 375) with a ViT-B/16 and 2 loader
workers, against the same tower fed from memory: the tower is what takes time, and each second of starting the
workers counts. (b) `--compare` in one pass against `--lora none` and `--lora FILE` one after the other, with
timm's test_vit (0.3 M parameters): a pass costs d + 2 t where two runs cost 2 (d + t), d for the pictures and
t for the tower. Decoding is only the bottleneck where t is small beside d. On two cores, which the tower
shares with the loaders, t is no small part of a run: one pass less one run, below; less so with pictures of
1024 x 768 (Open Images, NoCaps) than of 640 x 480 (COCO). (c) Recall of 25,010 captions and
5,000 images at D = 1,024, in a process of its own, with the most memory it was resident in (ru_maxrss);
beside it one product of the two: two are computed, block by block, none is held. (a) and (b) time the loop in
the script's own main.

Random weights; rounds interleaved; medians.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a lora.py too

import eval_zeroshot
import lora
from clip import Clip
from ranks import Ranks
from scores.ranking import Cosines, recall

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
SIZES = ((640, 480), (1024, 768))  # of (b)
TOWERS = {
    "ViT-B/16": {"layers": 12, "width": 768, "patch_size": 16, "image_size": 224},
    "test_vit": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160},
}


def write_images(out: Path, n: int, size: tuple[int, int]) -> Path:
    """n JPEGs of smooth noise in two class folders with a names.json."""
    rng = np.random.default_rng(0)
    for i in range(n):
        folder = out / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(out / "ab"[i % 2] / f"{i:04d}.jpg", quality=92)
    names = {"names": {"a": "one", "b": "other"}, "templates": ["{}"]}
    (out / "names.json").write_text(json.dumps(names))
    return out


def loop_seconds(*options) -> float:
    """Of the loop over the images in eval_zeroshot.main."""
    spent = []

    def timed(batches, *_, **__):
        start = time.perf_counter()
        yield from batches
        spent.append(time.perf_counter() - start)

    eval_zeroshot.tqdm, sys.argv = timed, ["eval_zeroshot.py", *map(str, options)]
    printed, sys.stdout = sys.stdout, open(os.devnull, "w")
    try:
        eval_zeroshot.main()
    finally:
        sys.stdout.close()
        sys.stdout = printed
        dist.destroy_process_group()
    return spent[0]


def tower_seconds(clip: Clip, images: torch.Tensor, batch: int) -> float:
    start = time.perf_counter()
    for pixels in images.split(batch):
        clip.image_features(pixels)
    return time.perf_counter() - start


def own_seconds() -> float:
    """CPU time of this process and its finished children."""
    return sum(os.times()[:4])


def all_seconds() -> float:
    """CPU time of every process on this machine."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def retrieval_seconds(captions: int, images: int, dim: int) -> dict:
    """Of one matrix product and of recall, and recall's peak memory in GB, with imports and without."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    W, f = (torch.randn(n, dim) for n in (captions, images))
    for features in (W, f):  # in place: this is not what is measured
        features.div_(features.norm(dim=1, keepdim=True))
    image_of = torch.arange(captions) % images
    start = time.perf_counter()
    recall(Cosines(W, f), image_of)
    total = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = {"peak_gb": peak * 1024e-9, "without_imports_gb": (peak - before) * 1024e-9}  # from KiB
    start = time.perf_counter()
    W @ f.T
    return {"product": time.perf_counter() - start, "total": total, **memory}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=80, help="of (a); (b) takes six times as many of each size")
    p.add_argument("--repeats", type=int, default=3, help="timed rounds")
    p.add_argument("--threads", type=int, default=2, help="of torch")
    p.add_argument("--only-retrieval", action="store_true", help="(c) in this process, as JSON")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.only_retrieval:
        print(json.dumps(retrieval_seconds(25_010, 5_000, 1_024)))
        return
    child = [
        sys.executable,
        __file__,
        "--only-retrieval",
        "--threads",
        str(args.threads),
    ]  # while this is small
    retrieval = [json.loads(subprocess.check_output(child, text=True)) for _ in range(args.repeats)]
    retrieval = {k: statistics.median(r[k] for r in retrieval) for k in retrieval[0]}

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i, vision in enumerate(TOWERS.values()):
            config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True}
            (root / f"bench_{i}.json").write_text(json.dumps(config))
            open_clip.add_model_config(root / f"bench_{i}.json")
        few = write_images(root / "few", args.images, (500, 375))
        many = {size: write_images(root / f"many{size[0]}", 6 * args.images, size) for size in SIZES}
        common_options = [
            "--workers",
            2,
            "--batch",
            16,
            "--text-cache",
            root / "texts",
            "--out",
            root / "out",
        ]

        def run(tower: int, images: Path, *options) -> float:
            clip = ("--clip", root / f"bench_{tower}.json", "--clip-weights", "random")
            return loop_seconds("classification", *clip, "--set", f"x={images}", *common_options, *options)

        ranks = Ranks(0, 1, torch.device("cpu"), torch.float32)
        bare = Clip("bench_0", "random", ranks, seed=0)
        memory = torch.randn(args.images, 3, 224, 224)
        small = Clip("bench_1", "random", ranks, 0).tower
        lora.save(lora.attach(small, rank=4), root / "lora.safetensors", backbone="test_vit")

        with_lora = ("--lora", root / "lora.safetensors")
        compare = ("--compare", root / "lora.safetensors")
        seconds = {}
        start, own, everyone = time.perf_counter(), own_seconds(), all_seconds()
        for i in range(args.repeats + 1):  # the first is the warm-up
            timed = {"tower": tower_seconds(bare, memory, 16), "loop": run(0, few)}
            for (width, _), images in many.items():
                options = {"before": (), "after": with_lora, "both": compare}
                timed |= {f"{name} {width}": run(1, images, *o) for name, o in options.items()}
            for name, value in timed.items():
                seconds.setdefault(name, []).extend([value] if i else [])
        others = (all_seconds() - everyone) - (own_seconds() - own)
        others = max(0.0, others / (time.perf_counter() - start) / os.cpu_count())
    of = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(t / u for t, u in zip(seconds["tower"], seconds["loop"], strict=True))
    n, m = args.images, 6 * args.images
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, other processes {others:.0%} of the CPU\n")
    print("| | | ratio |\n|---|---|---|")
    print(f"| (a) tower from memory | {n / of['tower']:.1f} images/s | |")
    print(f"| (a) the loop, from JPEGs | {n / of['loop']:.1f} images/s | {ratio:.2f} |")
    one_pass = {}
    for width, height in SIZES:
        before, after, both = (seconds[f"{name} {width}"] for name in ("before", "after", "both"))
        two = [b + a for b, a in zip(before, after, strict=True)]
        one_pass[width] = statistics.median(b / t for b, t in zip(both, two, strict=True))
        print(f"| (b) {width} x {height}: two runs | {statistics.median(two):.2f} s for {m} images | |")
        print(f"| (b) {width} x {height}: one pass | {of[f'both {width}']:.2f} s | {one_pass[width]:.2f} |")
    print(f"| (c) one matrix product | {retrieval['product']:.2f} s | |")
    memory = f"{retrieval['peak_gb']:.2f} GB ({retrieval['without_imports_gb']:.2f} its own)"
    print(f"| (c) products, ranks, recall | {retrieval['total']:.2f} s, {memory} | |")
    answer = {"torch": torch.__version__, **vars(args), "others": others, "seconds": seconds}
    answer |= {"loop_over_tower": ratio, "one_pass_over_two": one_pass, "retrieval": retrieval}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
