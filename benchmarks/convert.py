"""Conversion of weights: memory of convert.py on a stand-in for EVA-ViT-E.

    python benchmarks/convert.py

The stand-in has the blocks of EVA-ViT-E at half the width and 25 of them (1.7 GB in fp32), and a LoRA of rank
64. Each conversion runs in a process of its own. `private` is memory that only this process has (RssAnon at
its peak), `mapped` are pages of files, which the system may drop at any time (RssFile), `both` the peak of
their sum: all less what the process held before it began (its imports), as parts of the size of the file
written. From bf16 the file grows, as merged weights are fp32. Reading and writing the disk limits it.
"""

import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import _create_eva

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import backbone as vit  # noqa: E402
import convert  # noqa: E402
import lora  # noqa: E402


@register_model
def eva_e_small(pretrained=False, **kwargs):
    """EVA-ViT-E's blocks at half the width: 425 M parameters, 1.7 GB."""
    size = dict(embed_dim=896, depth=25, num_heads=8, mlp_ratio=60 / 7, use_post_norm=True)
    return _create_eva(
        "eva_e_small", pretrained=pretrained, **{**size, "patch_size": 14, "global_pool": "token", **kwargs}
    )


def held() -> dict[str, int]:
    """RssAnon and RssFile of this process, KiB."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0][:-1]: int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssFile:")}


def child() -> None:
    """Convert as the command line says, watched; prints the peaks in KiB, and seconds."""
    before, peaks, done = held(), [], threading.Event()

    def watch():
        while not done.wait(0.002):
            now = {name: kib - before[name] for name, kib in held().items()}
            peaks.append((now["RssAnon"], now["RssFile"], sum(now.values())))

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    if sys.argv[1] == "copy":
        state = torch.load(sys.argv[2], weights_only=True)
        save_file({name: value.clone() for name, value in state.items()}, sys.argv[3])
    else:
        convert.main()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(*map(max, zip(*peaks, strict=True)), seconds)


def main() -> None:
    rows, name = [], "eva_e_small"
    with tempfile.TemporaryDirectory() as folder:
        names = ("eva_clip.pt", "bf16.safetensors", "lora.safetensors", "out.safetensors", "out.pt")
        fp32, bf16, tuned, out, out_pt = (Path(folder) / name for name in names)
        model = vit.load(name, "random").vit
        torch.save({f"visual.{k}": v for k, v in model.state_dict().items()}, fp32)
        save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, bf16)
        lora.save(lora.attach(model, 64), tuned, backbone=name)
        del model
        merge = ["--model", name, "--lora", tuned]
        commands = {
            "a copy in memory, for comparison": ["copy", fp32, out],
            "import": ["import", fp32, out, "--model", name],
            "export to timm": ["export", out, "--weights", fp32, "--to", "timm", *merge],
            "export to timm from bf16": ["export", out, "--weights", bf16, "--to", "timm", *merge],
            "export to EVA-CLIP's .pt": ["export", out_pt, "--weights", fp32, "--to", "eva_clip", *merge],
        }
        for what, command in commands.items():
            command = [sys.executable, __file__, *map(str, command)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            *peaks, seconds = map(float, told.splitlines()[-1].split())
            written = out_pt if out_pt.exists() else out
            size = written.stat().st_size / 1024
            rows.append([what, size / 2**20, *(peak / size for peak in peaks), seconds])
            written.unlink()

    print(f"{platform.machine()}, torch {torch.__version__}, 25 blocks of width 896, LoRA of rank 64")
    print("| conversion | written, GiB | private | mapped | both | s |\n|---|---|---|---|---|---|")
    for what, *values in rows:
        print(f"| {what} | {' | '.join(f'{v:.2f}' for v in values)} |")
    keys = ("what", "gib", "private", "mapped", "both", "seconds")
    print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))


if __name__ == "__main__":
    child() if len(sys.argv) > 1 else main()
