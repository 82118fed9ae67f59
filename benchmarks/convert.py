"""Memory of convert.py on a 1 GB stand-in of EVA-ViT-E: its own proportions, fewer and narrower blocks.

    python benchmarks/convert.py

Each conversion runs in a process of its own. `private` is memory that only that process has (RssAnon at its
peak), `mapped` are pages of files that the system may drop at any time (RssFile); both less what the process
held before it began (its imports). What to read is the ratio to the size of the file that is written. The
floor is a copy in memory: load all, save all.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import backbone as vit  # noqa: E402
import lora  # noqa: E402

WIDTH, DEPTH = 896, 25  # half of EVA-ViT-E's width

CHILD = """
import sys, threading, time, functools
sys.path.insert(0, sys.argv.pop(1))
import convert, torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import _create_eva

@register_model
def eva_e_small(pretrained=False, **kwargs):
    size = dict(patch_size=14, embed_dim=%d, depth=%d, num_heads=16, mlp_ratio=60 / 7, global_pool="token")
    return _create_eva("eva_e_small", pretrained=pretrained, **{**size, "use_post_norm": True, **kwargs})

def now():
    lines = [line.split() for line in open("/proc/self/status") if line.startswith("Rss")]
    return {name[:-1]: int(kb) for name, kb, _ in lines}

before, peak, done = now(), {}, False
def watch():
    while not done:
        for name, kb in now().items():
            peak[name] = max(peak.get(name, 0), kb)
        peak["both"] = max(peak.get("both", 0), sum(now().values()))
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
t = time.time()
if sys.argv[1] == "copy":
    state = torch.load(sys.argv[2], weights_only=True, map_location="cpu")
    save_file({k: v.clone() for k, v in state.items()}, sys.argv[3])
else:
    convert.main()
done = True; thread.join()
print(peak["RssAnon"] - before["RssAnon"], peak["RssFile"] - before["RssFile"],
      peak["both"] - sum(before.values()), time.time() - t)
""" % (WIDTH, DEPTH)  # noqa: UP031 (braces)


def main() -> None:
    scratch = {}
    exec(CHILD.split("def now")[0].replace("sys.path.insert(0, sys.argv.pop(1))", ""), scratch)
    rows, name = [], "eva_e_small"
    with tempfile.TemporaryDirectory() as folder:
        src, dst, weights, tuned = (
            Path(folder) / n for n in ("eva_clip.pt", "out.safetensors", "w.safetensors", "lora.safetensors")
        )
        model = vit.load(name, "random").vit
        state = model.state_dict()
        torch.save({f"visual.{k}": v for k, v in state.items()}, src)
        save_file({k: v.bfloat16() for k, v in state.items()}, weights)
        lora.save(lora.attach(model, 64), tuned, backbone=name)
        del model, state
        merge = ["--lora", tuned, "--model", name]
        for what, target, command in (
            ("all in memory", dst, ["copy", src, dst]),
            ("import, fp32 .pt", dst, ["import", src, dst, "--model", name]),
            ("export with LoRA, fp32, timm", dst, ["export", dst, "--weights", src, "--to", "timm", *merge]),
            ("export with LoRA, bf16, timm", dst, ["export", dst, "--weights", weights, "--to", "timm", *merge]),
            ("export with LoRA, fp32, EVA-CLIP .pt", dst.with_suffix(".pt"),
             ["export", dst.with_suffix(".pt"), "--weights", src, "--to", "eva_clip", *merge]),
        ):  # fmt: skip
            child = [sys.executable, "-c", CHILD, ROOT, *command]
            told = subprocess.run(list(map(str, child)), capture_output=True, text=True, check=True).stdout
            private, mapped, both, seconds = map(float, told.splitlines()[-1].split())
            size = target.stat().st_size / 1024
            rows.append([what, size / 2**20, private / size, mapped / size, both / size, seconds])
            target.unlink()

    print(f"{platform.machine()}, torch {torch.__version__}, {DEPTH} blocks of width {WIDTH}")
    print("| conversion | written, GiB | private | mapped | both | s |\n|---|---|---|---|---|---|")
    for what, *values in rows:
        print(f"| {what} | {' | '.join(f'{v:.2f}' for v in values)} |")
    keys = ("what", "gib", "private", "mapped", "both", "seconds")
    print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))


if __name__ == "__main__":
    main()
