"""Can the segmentation head learn at all? Four images by heart, scored by pycocotools on the same four.

    python benchmarks/overfit.py --coco DIR

A head that cannot reach a high mask AP on the images it was trained on has a fault that no loss curve shows.
The backbone is a random frozen eva_mini, whose features of the four images, not augmented, are computed once.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that ours are found from any folder

import backbone as vit
import training
from data.coco import annotation_file
from data.segmentation import Segmentation
from data.stream import collate
from files import read_picture
from heads.coco_results import mask_results
from heads.mask2former import Mask2Former


def example(stream: Segmentation, row: int, side: int) -> tuple[torch.Tensor, dict]:
    """One image, its long side resized to `side`, and its target."""
    size = tuple(stream.sizes[row].tolist())
    image = read_picture(stream.folder / stream.names[row], size)
    h, w = (round(s * side / max(size)) for s in size)
    masks = torch.stack([torch.from_numpy(mask) for mask in stream.masks(row)])
    target = {
        "image_id": int(stream.ids[row]),
        "orig_size": size,
        "size": (h, w),
        "labels": torch.from_numpy(stream.data.labels[stream.data.first[row] : stream.data.first[row + 1]]),
        "masks": TF.resize(masks, [h, w], interpolation=TF.InterpolationMode.NEAREST),
    }
    return TF.resize(image, [h, w]), target


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--coco", default="coco", help="folder in COCO's layout")
    p.add_argument("--split", default="train2017")
    few = [12448, 173350, 191381, 360772]  # of train2017: 1 to 3 objects each, none tiny
    p.add_argument("--images", type=int, nargs="+", default=few, metavar="ID")
    p.add_argument("--side", type=int, default=448, help="long side in pixels")
    p.add_argument("--iters", type=int, default=120)
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    begin = time.perf_counter()

    stream = Segmentation(args.coco, args.split)
    rows = [stream.ids.tolist().index(image) for image in args.images]
    backbone = vit.load("eva_mini", "random")
    samples = [example(stream, row, args.side) for row in rows]
    images, valid, y = collate(samples, backbone.patch, backbone.mean, backbone.std)
    with torch.no_grad():
        f = backbone(images, valid)
    head = Mask2Former(backbone.dim, stream.categories)

    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=training.WEIGHT_DECAY)
    for step in range(args.iters):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, args.lr, 20, args.iters)
        loss, parts = head.loss(f, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), training.CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24:
            told = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
            print(f"step {step + 1}: loss {loss:.2f} {told}, {time.perf_counter() - begin:.0f} s", flush=True)

    results = mask_results(head.eval().predict(f, y), stream.categories)
    truth = COCO(annotation_file(args.coco, "instances", args.split))
    scored = COCOeval(truth, truth.loadRes(results), "segm")
    scored.params.imgIds = args.images
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    seconds = time.perf_counter() - begin
    print("| steps | mask AP on the same images | s |\n|---|---|---|")
    print(f"| {args.iters} | {scored.stats[0]:.2f} | {seconds:.0f} |")
    print(json.dumps({"mask_ap": scored.stats[0], "seconds": seconds, **vars(args)}))


if __name__ == "__main__":
    main()
