"""The losses of frozen heads on held-out scenes, before and after stage 2: does dW do what it was trained to?

    python demo/losses.py HEADS COCO LORA --out OUT      # OUT/result.json, rows as the evaluations have them

Every scene once, squashed to 112 px, as in the demo's stages; the same points of masks are drawn for both.
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
def losses(head: torch.nn.Module, backbone: vit.Backbone, stream) -> np.ndarray:
    """(n,) of each scene."""
    found = []
    for row in tqdm(stream.rows, stream.task):
        torch.manual_seed(int(row))  # which caption, which points
        sample = stream.read(int(row), backbone.patch)
        images, valid, y = collate([sample], backbone.patch, backbone.mean, backbone.std)
        found.append(head.loss(backbone(images, valid), y)[0].item())
    return np.array(found)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("heads", "coco", "lora"):
        p.add_argument(name, type=Path)
    p.add_argument("--out", type=Path, default=Path("out/losses"))
    args = p.parse_args()
    backbone, rows = vit.load(*M), []
    lora.load(backbone.vit, args.lora)
    for task in TASKS:
        path = args.heads / f"{task}.safetensors"
        head, options = tasks.load_head(path, backbone.dim), {"size": SIZE}
        if task == "captioning":
            options["vocabulary"] = head.config["vocabulary"]
        stream = tasks.find(task).Stream(args.coco, "val2017", **options)
        of = {}
        for variant in ("before", "after"):
            lora.switch(backbone.vit, on=variant == "after")
            of[variant] = losses(head, backbone, stream)
        rows.append(evaluation.result_row(task, "loss", {k: v / 100 for k, v in of.items()}))  # no percents
    print(evaluation.rows_table(rows))
    files.write_json(args.out / "result.json", {"rows": rows})


if __name__ == "__main__":
    main()
