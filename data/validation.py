"""COCO's images to evaluate on: each once, in the order of their ids, not augmented."""

import argparse
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from data.coco import LISTS, SQUARE, annotation_file, boxes, check_on_disk, read, read_objects
from data.stream import collate
from files import BadImage, Items, read_json, read_picture, shown

KINDS = {"panoptic": "panoptic", "captioning": "captions"}  # whose annotation file is not instances_*.json


class Images(Dataset):
    """items[i] -> image (3, h, w) uint8, target: item i, image_id, orig_size, size.

    Images without annotations are evaluated in detection and segmentation (whatever is found there is wrong);
    they have no truth in panoptic segmentation and captioning, and are left out with a note.
    truth: what is scored against: pycocotools' data set; {image_id: its panoptic annotation}, or its captions
    Raises ValueError, FileNotFoundError as data.coco's readers.
    """

    collate = staticmethod(collate)

    def __init__(self, folder, task, split, scale=1.0, limit=None, size=None):
        path = self.annotations = annotation_file(folder, KINDS.get(task, "instances"), split)
        file = read(path, LISTS[:2] if task == "captioning" else LISTS)
        self.categories = [{"id": c["id"], "name": c["name"]} for c in file.categories]
        used, notes = range(len(file.names)), []
        match task:
            case "captioning":
                from data.captions import references

                self.truth, notes = references(file)
                used = [row for row in used if file.ids[row].item() in self.truth]
            case "panoptic":
                from data.segmentation import panoptic_categories, read_panoptic

                self.categories, found = panoptic_categories(file), read_panoptic(file)
                self.truth, used = {a["image_id"]: a for a in found}, [a["row"] for a in found]
            case _:
                from data.outlines import check, truth

                masks = task == "segmentation"
                objects = read_objects(file, check if masks else None)
                more = {"segmentation": objects.outlines} if masks else {}
                self.truth, notes = truth(file, objects, self.categories, **more), objects.notes
                if objects.crowd.all():
                    notes = [*notes, f"{path}: no annotation to score against: all scores are -"]
        left_out = len(file.names) - len(used)
        self.notes = [f"{path}: {len(file.names)} images, {left_out} without annotation left out", *notes]
        if not used:
            raise ValueError(f"{path}: none of its {left_out} images is annotated: nothing to evaluate")
        names = check_on_disk(path, Path(folder) / split, [file.names[row] for row in used])
        images = zip(file.ids[used].tolist(), names, map(tuple, file.sizes[used].tolist()), strict=True)
        self.images = list(images)[:limit]
        self.image_ids = [image_id for image_id, *_ in self.images]
        self.folder, self.task, self.scale, self.size = Path(folder) / split, task, scale, size
        self.patch = 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        image_id, name, size = self.images[i]
        try:
            image = read_picture(self.folder / name, size)
        except BadImage as error:
            return error
        resized, target = prepare(image, self.task, self.patch, self.scale, self.size)
        return resized, {"item": i, "image_id": image_id, **target}


def prepare(image: Tensor, task: str, patch: int, scale: float = 1.0, square=None) -> tuple[Tensor, dict]:
    """image (3, H, W) uint8 at the size at which a task is evaluated, and its target: orig_size, size.

    scale, square: as --image-scale and --size of the stages
    """
    h, w = orig_size = tuple(image.shape[1:])
    if square:
        size = (square, square)
    elif task == "captioning":  # squashed to a square of whole patches, as for training
        size = (max(1, round(scale * 256 / patch)) * patch,) * 2
    else:
        # The release's sizes in pixels. Detection: short side 800 but the long one at most 672, so always 672
        long = max(1, round(scale * 672))
        if task != "detection":  # fitted into the square of training, 1022
            long = max(1, round(scale * SQUARE) // patch) * patch
        size = tuple(max(1, round(long * side / max(h, w))) for side in (h, w))
    resized = TF.resize(image, list(size), antialias=True)
    return resized, {"orig_size": orig_size, "size": size}


def open_items(task: str, args: argparse.Namespace) -> Dataset:
    """A task's images, or persons, as the options of eval_heads.py describe them."""
    match task:
        case "pose":
            from data.persons import PersonBoxes

            return PersonBoxes(args.coco, args.split, args.image_scale, args.limit, args.persons, args.size)
    return Images(args.coco, task, args.split, args.image_scale, args.limit, args.size)


# --- predictions that are there already


def read_results(path: str | Path, kind: str, truth: dict) -> list[dict]:
    """COCO's results, as pycocotools may be given them: of each what `kind` needs, and nothing else.

    kind: bbox, segm, keypoints; truth: what they are scored against
    Raises ValueError naming a result with numbers that are not finite, or of an unknown image or category.
    """
    results, images, categories = (
        Items(path, read_json(path), "results"),
        truth["images"],
        truth["categories"],
    )
    rows = results.refer("image_id", {image["id"]: row for row, image in enumerate(images)}, "image")
    results.refer("category_id", {c["id"]: row for row, c in enumerate(categories)}, "category")
    scores = results.floats("score", results.column("score", int, float))
    check_finite(results, "score", scores[:, None])
    match kind:
        case "bbox":
            key, found = "bbox", boxes(results)
            check_finite(results, "bbox", found)
            found = found.tolist()
        case "segm":
            from data.outlines import check, code

            sizes = np.array([(image["height"], image["width"]) for image in images], np.int32).reshape(-1, 2)
            key, found = "segmentation", results.column("segmentation", dict)
            check(results, sizes[rows])
            found = [code(outline, *sizes[row].tolist()) for outline, row in zip(found, rows, strict=True)]
        case "keypoints":
            key, found = "keypoints", results.column("keypoints", list)
            n = 3 * len(categories[0]["keypoints"])
            for k, values in enumerate(found):
                if len(values) != n or not {int, float}.issuperset(map(type, values)):
                    results.refuse(k, f"keypoints must be {n} numbers, got {shown(values)}")
            check_finite(results, "keypoints", results.floats("keypoints", found).reshape(-1, n))
    known = zip(results.items, scores.tolist(), found, strict=True)
    ids = ("image_id", "category_id")
    return [{**{k: r[k] for k in ids}, "score": score, key: value} for r, score, value in known]


def check_finite(results: Items, key: str, values: np.ndarray) -> None:
    """values: (N, K), the numbers of each result. float32 must hold them, too."""
    if (wrong := ~(np.abs(values) < np.finfo(np.float32).max).all(1)).any():
        k = int(wrong.argmax())
        results.refuse(k, f"{key} must be finite, got {shown(results.items[k][key])}")


def read_panoptic_results(path: str | Path, image_ids: list) -> list[dict]:
    """The annotations of a panoptic results file in the order of image_ids.

    Raises ValueError naming one that is not one, of an unknown image, or an image without one.
    """
    content = read_json(path)
    found = Items(path, content.get("annotations") if isinstance(content, dict) else None, "annotations")
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    rows, names = found.refer("image_id", row_of, "image"), found.column("file_name", str)
    found.ids("image_id")
    for k, infos in enumerate(found.column("segments_info", list)):
        segments = Items(path, infos, f"{found.where(k)}: segments_info")
        segments.column("category_id", int, str)
        if wrong := [i for i, value in enumerate(segments.ids()) if type(value) is not int or value < 1]:
            segments.refuse(wrong[0], "id must be a whole number above 0")
    if absent := sorted(set(range(len(image_ids))) - set(rows)):
        raise ValueError(f"{path}: {len(absent)} images have no prediction: {shown(image_ids[absent[0]])}")
    return [{**found.items[k], "file_name": names[k]} for k in np.argsort(rows, kind="stable").tolist()]
