"""A small world in COCO format: scenes of coloured shapes, deterministic by seed. No script knows of it.

    python demo/world.py OUT --train 64 --val 16 --size 224

Writes OUT/{train,val}2017/*.jpg and OUT/annotations/{instances,captions}_{train,val}2017.json.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "circle": 24, "star": 10, "cross": 12}
COLORS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 180), "orange": (255, 127, 14),
    "purple": (148, 103, 189), "yellow": (240, 220, 50), "white": (240, 240, 240), "black": (25, 25, 25),
}  # fmt: skip


def outline(shape: str, center: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """The shape's corners, (n, 2) as x, y in pixels."""
    n = SHAPES[shape]
    turn = angle + 2 * math.pi * np.arange(n) / n
    reach = np.full(n, radius)
    if shape == "star":
        reach[1::2] *= 0.45
    if shape == "cross":  # twelve corners: four notches
        turn = angle + np.concatenate(
            [[q - 0.3, q + 0.3, q + math.pi / 4] for q in np.arange(4) * math.pi / 2]
        )
        reach = np.tile([radius, radius, 0.42 * radius], 4)
    return center + reach[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)


def scene(rng: np.random.Generator, size: int) -> tuple[Image.Image, list[dict], list[str]]:
    """One picture of 1-5 shapes, its objects back to front, and five captions that name some of them."""
    width, height = (int(rng.integers(size * 3 // 4, size + 1)) for _ in range(2))
    ramp = np.linspace(*rng.uniform(60, 200, (2, 3)), width)[None] + rng.normal(0, 12, (height, width, 3))
    image = Image.fromarray(ramp.clip(0, 255).astype(np.uint8))
    draw, objects = ImageDraw.Draw(image), []
    for _ in range(rng.integers(1, 6)):
        shape, color = (str(rng.choice(list(names))) for names in (SHAPES, COLORS))
        center = rng.uniform((0.15 * width, 0.15 * height), (0.85 * width, 0.85 * height))
        corners = outline(shape, center, size * rng.uniform(0.08, 0.22), rng.uniform(0, 2 * math.pi))
        corners = corners.clip(0, (width - 1, height - 1))
        draw.polygon([tuple(corner) for corner in corners], fill=COLORS[color])
        objects.append({"shape": shape, "color": color, "corners": corners})
    names = [f"a {o['color']} {o['shape']}" for o in objects]
    captions = [f"{a} and {b}" if a != b else a for a, b in (rng.choice(names, 2) for _ in range(5))]
    return image, objects, captions


def write(out: Path, split: str, count: int, size: int, seed: int) -> None:
    """The images of a split and their instances_*.json and captions_*.json."""
    (out / split).mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    images, instances, captions = [], [], []
    for image_id in range(1, count + 1):
        image, objects, sentences = scene(np.random.default_rng((seed, image_id)), size)
        name = f"{image_id:012d}.jpg"
        image.save(out / split / name, quality=92)
        images.append({"id": image_id, "file_name": name, "width": image.width, "height": image.height})
        for o in objects:
            (x0, y0), (x1, y1), xy = o["corners"].min(0), o["corners"].max(0), o["corners"]
            area = abs(np.sum(xy[:, 0] * np.roll(xy[:, 1], 1) - xy[:, 1] * np.roll(xy[:, 0], 1))) / 2
            category_id = list(SHAPES).index(o["shape"]) + 1
            instances.append({
                "id": len(instances) + 1, "image_id": image_id, "category_id": category_id,
                "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": [xy.flatten().round(2).tolist()],
                "area": area, "iscrowd": 0,
            })  # fmt: skip
        for sentence in sentences:
            captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": sentence})
    categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(SHAPES, 1)]
    contents = {
        "instances": {"annotations": instances, "categories": categories},
        "captions": {"annotations": captions},
    }
    for kind, content in contents.items():
        path = out / "annotations" / f"{kind}_{split}.json"
        path.write_text(json.dumps({"images": images, **content}))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="folder to write, in COCO's layout")
    p.add_argument("--train", type=int, default=64, help="training images")
    p.add_argument("--val", type=int, default=16, help="validation images")
    p.add_argument("--size", type=int, default=224, help="longest side in pixels")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    write(args.out, "train2017", args.train, args.size, args.seed)
    write(args.out, "val2017", args.val, args.size, args.seed + 1_000_000)
    print(f"{args.out}: {args.train} + {args.val} scenes")


if __name__ == "__main__":
    main()
