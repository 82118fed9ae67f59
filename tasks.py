"""The in-domain tasks (Table 1): each one's head T_n, its stream of (x, y), its file, Sec. 4.2's numbers.

A head is built as Head(dim, categories or vocabulary), keeps its arguments in `config`, and answers
    loss, parts = head.loss(f, y)     # scalar; detached scalars for the log
    head.predict(f, y)                # a list of B dicts: the task's answer for each image, or person
Its file is safetensors with a JSON header to rebuild it from: usable without the data set.

To predict, y holds for each image: image_id, orig_size (h, w), size after the resize, padded_size. For each
of pose's crops (data.pose.person_crop): image_id, crop_cxcywh and score of the box.
"""

import argparse
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

import files
from data.coco import annotation_file, flags, read, read_ids
from data.stream import Stream

NAMES = ("detection", "segmentation", "panoptic", "captioning", "pose")


class Task(NamedTuple):
    """kind: of the annotation file; iters, lr, batch: of stage 1; prob, batch2: of stage 2 (batches per GPU,
    of 8)"""

    Head: type[nn.Module]
    Stream: type[Stream]
    kind: str
    iters: int
    lr: float
    batch: int
    prob: float
    batch2: int


def find(task: str) -> Task:
    """Imports what this task needs, and nothing of the others."""
    dense = dict(iters=150_000, lr=5e-5, batch=1, prob=0.3, batch2=1)  # Sec. 4.2
    match task:
        case "detection":
            from data.detection import Detection
            from heads.detr import Detr

            return Task(Detr, Detection, "instances", **dense)
        case "segmentation":
            from data.segmentation import Segmentation
            from heads.mask2former import Mask2Former

            return Task(Mask2Former, Segmentation, "instances", **dense)
        case "panoptic":
            from data.segmentation import PanopticSegmentation
            from heads.mask2former import Panoptic

            return Task(Panoptic, PanopticSegmentation, "panoptic", **dense)
        case "captioning":
            from data.captions import Captions
            from heads.captioner import Captioner

            return Task(Captioner, Captions, "captions", 100_000, 4e-4, 32, prob=0.4, batch2=8)  # Sec. 4.2
        case "pose":
            from data.pose import Pose as Crops
            from heads.pose import Pose

            # Not in the paper, which only says that pose was added (Table 12); ViTPose's, 210 epochs
            return Task(Pose, Crops, "person_keypoints", 60_000, 5e-4, 64, prob=0.3, batch2=8)
    raise ValueError(f"unknown task {task}: expected one of {', '.join(NAMES)}")


def annotations(task: str, args: argparse.Namespace) -> Path:
    """Where a task's annotations are. Raises FileNotFoundError, saying where to get them."""
    captions = getattr(args, "captions", None)
    if task != "captioning" or not captions:
        return annotation_file(args.coco, find(task).kind, args.split)
    if not Path(captions).is_file():
        raise FileNotFoundError(f"--captions {captions}: no such file")
    return Path(captions)


def open_streams(names: list[str], args: argparse.Namespace, words: list | None = None) -> dict[str, Stream]:
    """The training streams of several tasks; a file that two of them need is read once."""
    once = cache(read)
    return {task: open_stream(task, args, once, words) for task in names}


def open_stream(
    task: str, args: argparse.Namespace, read: Callable = read, words: list | None = None
) -> Stream:
    """A task's training stream as the options of both stages describe it; words: a vocabulary, if given."""
    exclude = read_ids(args.exclude_images) if args.exclude_images else set()
    options = dict(scale=args.image_scale, size=args.size, fraction=args.data_fraction)
    options |= dict(exclude=exclude, read=read)
    if task == "captioning":
        options |= dict(captions=args.captions, min_count=args.min_count, vocabulary=words)
    return find(task).Stream(args.coco, args.split, args.seed, **options, skip_bad=args.skip_bad_images)


# --- sizes of heads


def add_head_options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("sizes of the head, which its file keeps").add_argument
    add("--queries", type=int, help="detection, segmentation, panoptic (Sec. 4.2: 100)")
    layers = "of encoder and decoder: detection (Sec. 4.2: 6 6), segmentation, panoptic (6 9)"
    add("--layers", type=int, nargs=2, metavar=("ENC", "DEC"), help=layers)
    add("--points", type=int, help="segmentation, panoptic: of a mask, in the loss (Mask2Former: 12544)")
    add("--dropout", type=float, help="detection (the release: 0.1), captioning (0.5)")


def head_sizes(task: str, args: argparse.Namespace) -> dict:
    """The sizes that were given. Raises ValueError for those that the task's head does not have."""
    given = {k: getattr(args, k) for k in ("queries", "layers", "points", "dropout")}
    given = {k: value for k, value in given.items() if value is not None}
    if other := given.keys() - inspect.signature(find(task).Head).parameters:
        raise ValueError(f"--{min(other)} has no effect on the head of {task}")
    for name, value in given.items():
        if name != "dropout" and np.min(value) < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if not 0 <= given.get("dropout", 0) < 1:
        raise ValueError(f"--dropout must be in [0, 1), got {given['dropout']}")
    return given


# --- sizes of images


def add_size_options(p: argparse.ArgumentParser, as_trained: str = "") -> None:
    add = p.add_argument_group("sizes of images").add_argument
    add("--image-scale", type=float, default=1.0, help=f"times the release's sizes{as_trained}")
    squashed = "squash every image to a square of so many px, not augmented: not the paper's"
    add("--size", type=int, metavar="PX", help=squashed + as_trained)


def check_size(args: argparse.Namespace) -> None:
    if not 0 < args.image_scale <= 2:
        raise ValueError(f"--image-scale must be in (0, 2], got {args.image_scale}")
    if args.size is not None and args.size < 2:
        raise ValueError(f"--size must be at least 2, got {args.size}")
    if args.size is not None and args.image_scale != 1:
        raise ValueError("--image-scale has no effect with --size, which is the same for all tasks")


# --- head files


def save_head(head: nn.Module, path: str | Path, task: str, **header) -> None:
    """Write the weights and what rebuilds the head without its data set: task, sizes, categories or words."""
    files.save(head.state_dict(), path, head={"task": task, "config": head.config, **header})


def load_head(path: str | Path, dim: int) -> nn.Module:
    """A head in eval mode. Raises ValueError if it was made for features of another width than `dim`."""
    header = files.read_header(path, "head")
    if header["task"] not in NAMES:
        raise ValueError(f"{path} is a head for {files.shown(header['task'])}, not for {' or '.join(NAMES)}")
    config = {k: v for k, v in header["config"].items() if k != "simple"}  # pose heads once had it, False
    if "categories" in config:
        categories = files.Items(path, config["categories"], "categories")
        categories.ids()
        categories.column("name", str)
        flags(categories, "isthing", default=1)
    return files.read_head(path, find(header["task"]).Head, config, dim).eval()


def find_head(places: list[str], task: str, settings: dict) -> Path:
    """The file of a task's head, among files and folders with TASK.safetensors or TASK/TASK.safetensors.

    settings: what it must have been trained on: backbone, no_cls, imagenet_norm
    Raises FileNotFoundError saying where it looked, or ValueError if the head knows other features.
    """
    looked = []
    for place in map(Path, places):
        candidates = [place / f"{task}.safetensors", place / task / f"{task}.safetensors"]
        if place.is_file():
            candidates = [place] if files.read_header(place, "head")["task"] == task else []
        looked += candidates
        path = next((path for path in candidates if path.is_file()), None)
        if path:
            header = files.read_header(path, "head")
            wrong = [f"{k} {header[k]}, not {v}" for k, v in settings.items() if header.get(k, v) != v]
            if wrong:
                raise ValueError(f"{path} was trained with {'; '.join(wrong)}: both stages must agree")
            return path
    where = " or ".join(map(str, looked or places))
    raise FileNotFoundError(
        f"no {task} head at {where}: stage1_heads.py --task {task} trains it; or see --heads"
    )


def check_M(path: Path, fingerprint: str) -> None:
    """Raises ValueError if a head was trained on another M than the one with this fingerprint."""
    if files.read_header(path, "head").get("M", fingerprint) != fingerprint:
        raise ValueError(f"{path} was trained on another M: both stages must have the same --weights")


def check_classes(head: nn.Module, classes: list, path: Path) -> None:
    """Raises ValueError if the head's categories or words are not those of the data, in the same order."""
    captioner = "vocabulary" in head.config
    had = head.config["vocabulary" if captioner else "categories"]
    if had == classes:
        return
    at = next((i for i, (a, b) in enumerate(zip(had, classes, strict=False)) if a != b), "the end")
    what, how = ("categories", "in the same order")
    if captioner:
        what, how = "words", "made from the same captions with the same --min-count"
    raise ValueError(
        f"{path} knows {len(had)} {what}, the data has {len(classes)}, unlike from {at} on: "
        f"they must be the same, {how}"
    )
