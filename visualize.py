"""Pictures of what M and its heads see, before and after ViSFT; curves of what was trained.

    python visualize.py attention IMAGE|FOLDER ... --compare out/visft/lora_005000.safetensors     # Fig. 3
    python visualize.py predict IMAGE|FOLDER ... --heads out --tasks detection captioning --lora FILE
    python visualize.py curves out/detection/log.jsonl out/visft/log.jsonl

attention: of [CLS] to the patches in the last layer, each attention head and their mean; the raw arrays go to
NAME.npz (`before` and `after`, (heads, H, W), each head sums to 1 together with what [CLS] pays to itself).
predict: boxes, masks, a panoptic map, keypoints, or a caption with the place each word was said of; a PNG per
image and task, at the sizes of eval_heads.py. curves: every loss of a log.jsonl, and below the seconds a step
took and the share of them that it waited for data. Writes PNGs to --out.
"""

import argparse
import itertools
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import evaluation
import files
import lora
import tasks
from backbone import (
    IMAGENET_NORM,
    Backbone,
    add_backbone_options,
    backbone_settings,
    check_backbone_options,
    load,
)
from ranks import launch, to_device

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
BONES = [  # between COCO's keypoints
    *(f"left_{a} left_{b}" for a, b in (("shoulder", "elbow"), ("elbow", "wrist"), ("shoulder", "hip"))),
    *(f"left_{a} left_{b}" for a, b in (("hip", "knee"), ("knee", "ankle"), ("eye", "ear"))),
]
BONES += [bone.replace("left", "right") for bone in BONES]
BONES += [f"left_{part} right_{part}" for part in ("shoulder", "hip")] + ["nose left_eye", "nose right_eye"]


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = p.add_subparsers(dest="kind", required=True)
    for kind, what in (("attention", "Fig. 3: where [CLS] looks"), ("predict", "what the heads answer")):
        q = kinds.add_parser(kind, help=what)
        q.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER")
        which = q.add_mutually_exclusive_group()
        which.add_argument(
            "--lora", default="none", metavar="FILE|none", help="show M with this dW, or without"
        )
        which.add_argument("--compare", metavar="FILE", help="show both, without and with this dW")
        add_backbone_options(q)
        q.add_argument("--out", type=Path, default=Path("out/pictures"), help="folder for the PNGs")
        q.add_argument("--limit", type=int, help="only the first N images")
        if kind == "attention":
            q.add_argument(
                "--size", type=int, help="side that images are squashed to (default: the model's own)"
            )
        else:
            tasks.add_size_options(q, ", as the heads were trained")  # --image-scale, --size
            persons = "pose: boxes, COCO results; an image's id is its name (default: the whole image is one)"
            q.add_argument("--persons", type=Path, metavar="FILE", help=persons)
            q.add_argument(
                "--heads", nargs="+", default=["out"], help="head files, or folders that hold them"
            )
            q.add_argument(
                "--tasks", nargs="+", choices=tasks.NAMES, default=["detection"], help="which heads"
            )
            q.add_argument(
                "--sure", type=float, default=0.5, help="least score of a box, mask or keypoint that is shown"
            )
    q = kinds.add_parser("curves", help="losses and speed over steps")
    q.add_argument("logs", nargs="+", type=Path, metavar="log.jsonl")
    q.add_argument("--out", type=Path, default=Path("out/pictures"), help="folder for curves.png")
    args = p.parse_args()
    if args.kind == "curves":
        return curves(args.logs, args.out)
    check_options(args)
    endings = [""] if args.kind == "attention" else [f"_{task}" for task in args.tasks]
    pictures = output_names(find_images(args.images)[: args.limit], args.out, endings)

    # --- model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load(args.model, args.weights, torch.float32, device, use_cls=not args.no_cls)
    if args.imagenet_norm:
        backbone.mean, backbone.std = IMAGENET_NORM
    set_M = evaluation.attach(backbone.vit, args)
    variants = ["before", "after"] if args.compare else ["after" if args.lora else "before"]

    # --- loop
    args.out.mkdir(parents=True, exist_ok=True)
    if args.kind == "attention":
        attention(backbone, set_M, variants, pictures, args)
    else:
        predict(backbone, set_M, variants, pictures, args)


def check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded. Leaves the LoRA file, or None, in args.lora."""
    for name in ("size", "limit"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.kind == "predict":
        tasks.check_size(args)
    args.lora = args.compare or (None if args.lora == "none" else args.lora)
    check_backbone_options(args)
    if args.lora:
        tuned = lora.read_header(args.lora).get("backbone", args.model)
        if tuned != args.model:
            raise ValueError(f"{args.lora} was tuned on {tuned}, not on --model {args.model}")


def find_images(places: list[Path]) -> list[Path]:
    """Files as they are, and the pictures in folders, by name. Raises FileNotFoundError if there are none."""
    pictures = []
    for place in places:
        inside = [place]
        if place.is_dir():
            inside = sorted(file for file in place.glob("*") if file.suffix.lower() in PICTURES)
        if not inside or not inside[0].is_file():
            raise FileNotFoundError(
                f"{place}: no such picture, and no folder with {', '.join(PICTURES)} in it"
            )
        pictures += inside
    return pictures


def output_names(pictures: list[Path], out: Path, endings: list[str]) -> dict[Path, str]:
    """{picture: what its outputs' names begin with}: its own name, behind its folder's where two have one.

    Raises ValueError if an output would take the place of one of the pictures.
    """
    names = {}
    for path in dict.fromkeys(pictures):
        same = [other for other in dict.fromkeys(pictures) if other.stem == path.stem]
        name = path.stem if len(same) == 1 else f"{path.resolve().parent.name}_{path.stem}"
        names[path] = name if name not in names.values() else f"{name}_{len(names)}"
    outputs = {(out / f"{name}{ending}.png").resolve() for name in names.values() for ending in endings}
    if hit := outputs & {path.resolve() for path in pictures}:
        raise ValueError(f"--out {out}: {min(hit)} is a picture to look at, and would be overwritten")
    return names


# --- attention


@torch.no_grad()
def cls_attention(backbone: Backbone, images: Tensor) -> Tensor:
    """What [CLS] pays to each patch in the last layer: images (B, 3, h, w) normalized -> (B, heads, H, W)."""
    layer, seen = backbone.vit.blocks[-1].attn, []
    fused, layer.fused_attn = layer.fused_attn, False  # timm's plain path hands the weights to attn_drop
    hook = layer.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    try:
        f = backbone(images)
    finally:
        layer.fused_attn = fused
        hook.remove()
    H, W = f.grid.shape[2:]
    return seen[0][:, :, 0, -H * W :].float().unflatten(-1, (H, W))


def attention(backbone: Backbone, set_M, variants: list[str], pictures: dict[Path, str], args) -> None:
    """NAME.npz and NAME.png for each file: a row for each variant, the mean and then each attention head."""
    if not backbone.has_cls:
        raise ValueError(f"--model {args.model}{' --no-cls' * args.no_cls}: there is no [CLS] to look from")
    from torchvision.transforms.v2 import functional as TF

    side = args.size or backbone.vit.patch_embed.img_size[0]
    if side % backbone.patch:
        raise ValueError(f"--size {side}: must be a multiple of the patch, {backbone.patch}")
    for path, name in pictures.items():
        pixels = TF.resize(files.read_picture(path), [side, side], antialias=True)
        image = TF.normalize(TF.to_dtype(pixels, scale=True), backbone.mean, backbone.std)
        maps = {}
        for variant in variants:
            set_M(variant)
            maps[variant] = (
                cls_attention(backbone, image[None].to(backbone.vit.cls_token.device))[0].cpu().numpy()
            )
        np.savez(args.out / f"{name}.npz", **maps)
        save_attention(pixels, maps, args.out / f"{name}.png")


def save_attention(pixels: Tensor, maps: dict[str, np.ndarray], out: Path) -> None:
    """One scale of brightness per column, so that before and after can be compared."""
    columns = {v: [m.mean(0), *m] for v, m in maps.items()}
    count = len(next(iter(columns.values())))
    axes, extent = panels(pixels, list(maps), count, 1.6, 1.75)
    for row, shown in zip(axes, columns.values(), strict=True):
        for k, (axis, values) in enumerate(zip(row[1:], shown, strict=True)):
            most = max(c[k].max() for c in columns.values())
            axis.imshow(pixels.float().mean(0), cmap="gray", extent=extent)
            axis.imshow(
                values, cmap="inferno", alpha=0.75, vmin=0, vmax=most, extent=extent, interpolation="bilinear"
            )
            axis.set_title(f"head {k}" if k else "mean of heads", fontsize=9)
    finish(axes, out)


def panels(pixels: Tensor, variants: list[str], columns: int, width: float, height: float):
    """Axes, a row for each variant with the picture before `columns` more; the extent of what covers it."""
    import matplotlib.pyplot as plt  # here and below: a second that --help need not wait

    size = (width * (columns + 1), height * len(variants))
    _, axes = plt.subplots(len(variants), columns + 1, figsize=size, squeeze=False, layout="constrained")
    for axis, variant in zip(axes[:, 0], variants, strict=True):
        axis.imshow(pixels.permute(1, 2, 0))
        axis.set_title(variant, fontsize=9)
    return axes, (0, pixels.shape[2], pixels.shape[1], 0)


def finish(axes: np.ndarray, out: Path) -> None:
    import matplotlib.pyplot as plt

    for axis in axes.flat:
        axis.axis("off")
    plt.savefig(out, dpi=130)
    plt.close()
    print(out, flush=True)


@cache
def colors() -> tuple[tuple[float, float, float], ...]:
    import matplotlib.pyplot as plt

    return plt.get_cmap("tab10").colors


# --- predictions


def predict(backbone: Backbone, set_M, variants: list[str], pictures: dict[Path, str], args) -> None:
    """NAME_TASK.png for each file and task: the picture with the answers, one column for each variant."""
    from data.validation import prepare

    persons = read_persons(args.persons) if args.persons else None
    for task in args.tasks:
        path = tasks.find_head(args.heads, task, backbone_settings(args) | {"size": args.size})
        head = tasks.load_head(path, backbone.dim).to(next(backbone.parameters()).device)
        for file, name in pictures.items():
            pixels, answers = files.read_picture(file), {}
            if task == "pose":
                samples = crops(pixels, file, persons, backbone.patch, args.image_scale, args.size)
            else:
                image, target = prepare(pixels, task, backbone.patch, args.image_scale, args.size)
                samples = [(image, {"image_id": 0, **target})]
            for variant in variants:
                set_M(variant)
                answers[variant] = answer(backbone, head, task, samples)
            out = args.out / f"{name}_{task}.png"
            if task == "captioning":
                save_caption(pixels, answers, head.config["vocabulary"], out)
            else:
                save_answers(pixels, answers, head.config["categories"], args.sure, out)


@torch.no_grad()
def answer(backbone: Backbone, head: nn.Module, task: str, samples: list[tuple[Tensor, dict]]) -> dict:
    """What a head says of one image, or of the crops of its persons."""
    from data.persons import PersonBoxes
    from data.validation import Images
    from heads.coco_results import oks_nms

    if not samples:
        return {"persons": []}
    collate = PersonBoxes.collate if task == "pose" else Images.collate
    images, valid, y = collate(samples, backbone.patch, backbone.mean, backbone.std)
    f = backbone(*to_device([images, valid], next(backbone.parameters()).device))
    if task == "pose":
        return {"persons": oks_nms(head.predict(f, y), head.config["categories"][0].get("sigmas"))}
    return (head.predict_panoptic if task == "panoptic" else head.predict)(f, y)[0]


def read_persons(path: Path) -> dict[int | str, list[tuple[list[float], float]]]:
    """{image id: its boxes x, y, w, h and their scores}. Raises ValueError as read_results does."""
    from data.persons import read_results

    found, (_, ids, boxes, scores) = {}, read_results(path)
    for image_id, box, score in zip(ids, boxes.tolist(), scores.tolist(), strict=True):
        if all(-1e6 < v < 1e6 for v in box) and min(box[2:]) > 0 and score > 0:
            found.setdefault(image_id, []).append((box, score))
    return found


def crops(
    pixels: Tensor, file: Path, persons: dict | None, patch: int, scale: float, size=None
) -> list[tuple]:
    """What the pose head is to see of each person. Raises ValueError if the file's name is no image id."""
    from data.pose import person_crop

    if persons is None:
        boxes = [((0, 0, pixels.shape[2], pixels.shape[1]), 1.0)]
    elif file.stem in persons or file.stem.isdecimal():
        boxes = persons.get(file.stem) or persons.get(int(file.stem), [])
    else:
        raise ValueError(
            f"{file}: --persons goes by image ids, and this name is none (000000000139.jpg: 139)"
        )
    made = [(person_crop(pixels, box, patch, scale, size), score) for box, score in boxes]
    return [(crop, {**target, "image_id": 0, "score": score}) for (crop, target), score in made]


def save_answers(pixels: Tensor, answers: dict, categories: list[dict], sure: float, out: Path) -> None:
    """Boxes, masks, a panoptic map or keypoints over the picture, which stands on the left."""
    import matplotlib.pyplot as plt

    h, w = pixels.shape[1:]
    _, axes = plt.subplots(
        1,
        len(answers) + 1,
        figsize=(4 * (len(answers) + 1), 4 * h / w + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes[0]:
        axis.imshow(pixels.permute(1, 2, 0))
    for axis, (variant, answer) in zip(axes[0, 1:], answers.items(), strict=True):
        if "segments" in answer:
            shown = draw_segments(axis, answer, categories)
        elif "persons" in answer:
            shown = draw_persons(axis, answer["persons"], categories[0]["keypoints"], sure)
        else:
            shown = draw_objects(axis, answer, categories, sure)
        axis.set_title(f"{variant}: {shown}", fontsize=9)
    finish(axes, out)


def draw_objects(axis, answer: dict, categories: list[dict], sure: float) -> str:
    """Boxes or masks with their class and score, of those that are at least `sure`."""
    from matplotlib.patches import Rectangle

    kept = (answer["scores"] >= sure).nonzero()[:, 0].tolist()
    for i in kept:
        label = int(answer["labels"][i])
        color = colors()[label % len(colors())]
        if "boxes_xyxy" in answer:
            x0, y0, x1, y1 = answer["boxes_xyxy"][i].tolist()
            size = x1 - x0, y1 - y0
            axis.add_patch(Rectangle((x0, y0), *size, fill=False, edgecolor=color, linewidth=1.5))
        else:
            mask = answer["masks"][i].cpu().numpy()
            tint = np.zeros((*mask.shape, 4), np.float32)
            tint[mask] = (*color, 0.55)
            axis.imshow(tint)
            rows, columns = np.nonzero(mask)
            x0, y0 = (columns.min(), rows.min()) if len(rows) else (0, 0)
        text = f"{categories[label]['name']} {answer['scores'][i]:.2f}"
        axis.text(x0, y0, text, fontsize=7, color="white", backgroundcolor=(*color, 0.8), clip_on=True)
    best = max(answer["scores"].tolist(), default=0.0)
    return f"{len(kept)} at {sure} or more, the best {best:.2f}"


def draw_segments(axis, answer: dict, categories: list[dict]) -> str:
    segments, names = answer["segments"].cpu().numpy(), {c["id"]: c["name"] for c in categories}
    for k, info in enumerate(answer["segments_info"]):
        mask = segments == info["id"]
        tint = np.zeros((*mask.shape, 4), np.float32)
        tint[mask] = (*colors()[k % len(colors())], 0.6)
        axis.imshow(tint)
        rows, columns = np.nonzero(mask)
        axis.text(np.median(columns), np.median(rows), names[info["category_id"]], fontsize=7, color="white")
    return f"{len(answer['segments_info'])} segments"


def draw_persons(axis, persons: list[dict], names: list[str], sure: float) -> str:
    """Keypoints that are at least `sure`, and the bones between them."""
    count = 0
    for person, color in zip(persons, itertools.cycle(colors())):
        kept = {
            n: (x, y)
            for n, (x, y, score) in zip(names, person["keypoints"].tolist(), strict=True)
            if score >= sure
        }
        count += len(kept)
        for a, b in map(str.split, BONES):
            if a in kept and b in kept:
                axis.plot(*zip(kept[a], kept[b], strict=True), color=color, linewidth=1.5)
        if kept:
            axis.scatter(*zip(*kept.values(), strict=True), color=[color], edgecolors="white", s=14, zorder=3)
    return f"{count} keypoints at {sure} or more, {len(persons)} persons"


def save_caption(pixels: Tensor, answers: dict, vocabulary: list[str], out: Path) -> None:
    """A row for each variant: the picture, then each word, <unk> too, and where it was said of."""
    words = {v: [vocabulary[token] for token in answer["tokens"].tolist()] for v, answer in answers.items()}
    words = {variant: said[: -1 if said[-1] == "<end>" else None] for variant, said in words.items()}
    most = max(map(len, words.values()))
    axes, extent = panels(pixels, list(answers), most, 1.7, 2.1)
    for row, (variant, answer) in zip(axes, answers.items(), strict=True):
        for axis, word, weights in zip(row[1:], words[variant], answer["attention"].cpu(), strict=False):
            axis.imshow(pixels.float().mean(0), cmap="gray", extent=extent)
            axis.imshow(weights, cmap="inferno", alpha=0.6, extent=extent, interpolation="bilinear")
            axis.set_title(word, fontsize=9)
    finish(axes, out)


# --- curves


def curves(logs: list[Path], out: Path) -> None:
    """curves.png: one panel for each log, one line for each `TASK/loss` in it."""
    import matplotlib.pyplot as plt

    rows = [read_log(path) for path in logs]
    timed = any("waiting" in line for lines in rows for line in lines)  # older logs do not tell
    shape = dict(height_ratios=[3.2, 1.4][: 1 + timed], figsize=(4.5 * len(logs), 3.2 + 1.6 * timed))
    _, axes = plt.subplots(1 + timed, len(logs), **shape, squeeze=False, layout="constrained")
    for axis, path, lines in zip(axes[0], logs, rows, strict=True):
        for name in sorted({key for line in lines for key in line if key.endswith("/loss")}):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), ".-", markersize=3, label=name)
        axis.set_title(path.parent.name, fontsize=10)
        axis.set_xlabel("step")
        axis.set_yscale("log")  # the tasks' losses differ tenfold and more
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    for axis, lines in zip(axes[1:].flat, itertools.cycle(rows)):
        draw_speed(axis, [line for line in lines if "waiting" in line])
    out.mkdir(parents=True, exist_ok=True)
    plt.savefig(out / "curves.png", dpi=130)
    plt.close()
    print(out / "curves.png", flush=True)


def draw_speed(axis, lines: list[dict]) -> None:
    """Seconds a step, and on the right the share of them that waited for data; nothing of an older log."""
    if not lines:
        return axis.axis("off")
    share = axis.twinx()
    for one, key, label, color in (
        (axis, "seconds", "s / step", "C0"),
        (share, "waiting", "waiting for data", "C1"),
    ):
        one.plot([line["step"] for line in lines], [line[key] for line in lines], color=color)
        one.set_ylabel(label, color=color, fontsize=8)
        one.tick_params(axis="y", labelsize=8)
    axis.set_ylim(0, 1.1 * max(line["seconds"] for line in lines))
    share.set_ylim(0, 1)
    axis.set_xlabel("step")


def read_log(path: Path) -> list[dict]:
    """Raises FileNotFoundError, or ValueError if it is not a log of ours."""
    if not path.is_file():
        raise FileNotFoundError(f"no log at {path}")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if not any(key.endswith("/loss") for line in lines for key in line):
            raise ValueError("no loss in it")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a log.jsonl of stage1_heads.py or stage2_lora.py: {error}"
        ) from error
    return lines


if __name__ == "__main__":
    launch(main)
