"""The losses of frozen heads on held-out scenes, before and after stage 2: does dW do what it was trained to?

    python demo/losses.py HEADS COCO LORA --out OUT      # OUT/result.json, rows as the evaluations have them

Each scene once, squashed to 112 px, as in the demo's stages; the same points of masks are drawn for both.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that ours are found from any folder

import backbone as vit
import evaluation
import files
import lora
import tasks
from data.stream import collate

SIZE, TASKS = 112, ("detection", "segmentation", "captioning")
M = "eva_mini.px112", str(Path(__file__).with_name("eva_mini_clip.safetensors"))


@torch.no_grad()
def losses(
    heads: dict, streams: dict, backbone: vit.Backbone, scenes: int | None
) -> dict[str, dict[str, np.ndarray]]:
    """{task: {before, after: (n,) of the first scenes}}; one is the same picture in every task's stream."""
    found = {task: {"before": [], "after": []} for task in heads}
    rows = next(iter(streams.values())).rows[:scenes]
    for row in tqdm(rows, "scenes"):
        torch.manual_seed(int(row))  # which caption
        samples = [stream.read(int(row), backbone.patch) for stream in streams.values()]
        batches = [collate([s], backbone.patch, backbone.mean, backbone.std) for s in samples]
        for variant in ("before", "after"):
            lora.switch(backbone.vit, on=variant == "after")
            f = backbone(*batches[0][:2])
            for (task, head), (*_, y) in zip(heads.items(), batches, strict=True):
                torch.manual_seed(int(row))  # which points
                found[task][variant].append(head.loss(f, y)[0].item())
    return {task: {v: np.array(x) for v, x in of.items()} for task, of in found.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("heads", "coco", "lora"):
        p.add_argument(name, type=Path)
    p.add_argument("--scenes", type=int, help="so many of them, the first (default: all)")
    p.add_argument("--out", type=Path, default=Path("out/losses"))
    args = p.parse_args()
    backbone, heads, streams = vit.load(*M), {}, {}
    lora.load(backbone.vit, args.lora)
    for task in TASKS:
        heads[task] = tasks.load_head(args.heads / f"{task}.safetensors", backbone.dim)
        options = {"vocabulary": heads[task].config["vocabulary"]} if task == "captioning" else {}
        streams[task] = tasks.find(task).Stream(args.coco, "val2017", size=SIZE, **options)
    found = losses(heads, streams, backbone, args.scenes)
    rows = [
        evaluation.result_row(task, "loss", {v: x / 100 for v, x in of.items()})  # no percents
        for task, of in found.items()
    ]
    print(evaluation.rows_table(rows))
    files.write_json(args.out / "result.json", {"rows": rows})


if __name__ == "__main__":
    main()
