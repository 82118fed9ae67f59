"""COCO's annotation files -> arrays, checked.

coco/annotations/instances_train2017.json, panoptic_train2017.json
coco/train2017/000000000009.jpg
coco/annotations/panoptic_train2017/000000000009.png
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

LISTS = ("images", "annotations", "categories")  # what every file but that of captions has
SQUARE = 1024  # px that segmentation's images are fitted into; the release's, which cuts it to 1022


@dataclass
class Instances:
    """An instances_*.json, or a panoptic_*.json, as arrays: cheap to share with the workers.

    ids (n,), names n file names, sizes (n, 2) as h, w; boxes_xyxy (N, 4) in pixels and labels (N,) in 0..C-1
    of all images, those of image i at first[i]:first[i + 1]; notes: what was left out and why, for the user;
    outlines: their `segmentation`s as JSON in one buffer, that of annotation k at ends[k]:ends[k + 1];
    segments (N,): panoptic segment ids
    """

    ids: np.ndarray
    names: list[str]
    sizes: np.ndarray
    boxes_xyxy: np.ndarray
    labels: np.ndarray
    first: np.ndarray
    categories: list[dict]
    notes: list[str] = field(default_factory=list)
    outlines: np.ndarray | None = None
    ends: np.ndarray | None = None
    segments: np.ndarray | None = None


def annotation_file(coco: str | Path, kind: str, split: str) -> Path:
    """Where COCO's layout has them; kind: instances, panoptic, captions, person_keypoints.

    Raises FileNotFoundError, saying where to get them.
    """
    path = Path(coco) / "annotations" / f"{kind}_{split}.json"
    if not path.is_file():
        archive = "annotations_trainval2017.zip"
        if kind == "panoptic":
            archive = f"panoptic_{archive}"
        raise FileNotFoundError(
            f"--coco {coco}: no {path}; unpack {split}.zip and {archive} of "
            "https://cocodataset.org/#download there"
        )
    return path


def read_json(path: Path, needed: tuple[str, ...]) -> dict:
    """A COCO file's top level. Raises ValueError if it is not JSON or lacks one of the needed lists."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; download it again") from error
    lacks = [k for k in needed if not (isinstance(content, dict) and isinstance(content.get(k), list))]
    if lacks:
        raise ValueError(f"{path} is not a COCO annotation file: no list called {', '.join(lacks)}")
    return content


def read_instances(coco: str | Path, split: str, masks: bool = False) -> Instances:
    """Boxes, classes and, if asked for, masks: crowds left out, unusable annotations left out with a count.

    Raises ValueError for an annotation with an unknown image or category, or a mask of another image's size;
    FileNotFoundError for an image that is not on disk.
    """
    path = annotation_file(coco, "instances", split)
    content = read_json(path, LISTS)
    try:
        categories = sorted(content["categories"], key=lambda c: c["id"])
        categories = [{"id": c["id"], "name": c["name"]} for c in categories]
        label_of = {c["id"]: label for label, c in enumerate(categories)}  # COCO's 1..90 with gaps -> 0..79
        images = sorted(content["images"], key=lambda image: image["id"])
        row_of = {image["id"]: row for row, image in enumerate(images)}
        kept = [a for a in content["annotations"] if not a.get("iscrowd", 0)]
        for a in kept:
            if a["category_id"] not in label_of:
                raise ValueError(f"{path}: annotation {a['id']}: unknown category id {a['category_id']}")
            if a["image_id"] not in row_of:
                raise ValueError(f"{path}: annotation {a['id']}: unknown image id {a['image_id']}")
            box = a["bbox"]
            if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
                raise ValueError(f"{path}: annotation {a['id']}: bbox must be [x, y, w, h], got {box}")
        sizes = np.array([(image["height"], image["width"]) for image in images], np.int32).reshape(-1, 2)
        row = np.array([row_of[a["image_id"]] for a in kept], np.int64)
        xywh = np.array([a["bbox"] for a in kept], np.float64).reshape(-1, 4)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO instances file: {type(error).__name__}: {error}") from error
    check_on_disk(path, Path(coco) / split, [image["file_name"] for image in images])

    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    limit = sizes[row][:, [1, 0, 1, 0]] if len(row) else boxes
    usable = np.isfinite(xywh).all(1) & (xywh[:, 2:] > 0).all(1)
    boxes = np.clip(np.nan_to_num(boxes), 0, limit)
    usable &= (boxes[:, 2:] > boxes[:, :2]).all(1)  # a box beside its image has no area in it
    if masks:
        usable &= [has_mask(a, tuple(sizes[i].tolist()), path) for a, i in zip(kept, row, strict=True)]
    order = np.argsort(row[usable], kind="stable")
    labels = np.array([label_of[a["category_id"]] for a in kept], np.int64)
    data = Instances(
        ids=np.array([image["id"] for image in images], np.int64),
        names=[image["file_name"] for image in images],
        sizes=sizes,
        boxes_xyxy=boxes[usable][order].astype(np.float32),
        labels=labels[usable][order],
        first=np.searchsorted(row[usable][order], np.arange(len(images) + 1)),
        categories=categories,
    )
    if masks:
        outlines = [json.dumps(a["segmentation"]).encode() for a, u in zip(kept, usable, strict=True) if u]
        outlines = [outlines[i] for i in order]
        data.outlines = np.frombuffer(b"".join(outlines), np.uint8)
        data.ends = np.cumsum([0, *map(len, outlines)])
    crowds = len(content["annotations"]) - len(kept)
    data.notes.append(
        f"{path}: {len(images)} images, {usable.sum()} boxes, {crowds} crowd annotations left out"
    )
    if not usable.all():
        first = kept[int(np.argmin(usable))]
        data.notes.append(
            f"{path}: {(~usable).sum()} unusable annotations dropped (NaN, no area, no mask), "
            f"the first {first['id']} of image {first['image_id']}"
        )
    return data


def check_on_disk(path: Path, folder: Path, names: list[str]) -> None:
    """Raises FileNotFoundError if files that the annotations in `path` speak of are not in the folder."""
    found = set(os.listdir(folder)) if folder.is_dir() else set()
    absent = [name for name in names if name not in found]
    if absent:
        raise FileNotFoundError(f"{path}: {len(absent)} of {len(names)} images not in {folder}: {absent[0]}")


def has_mask(annotation: dict, size: tuple[int, int], path: Path) -> bool:
    """Whether it has polygons of three points or more, or an RLE. Raises ValueError for a wrong RLE size."""
    outline = annotation.get("segmentation")
    if isinstance(outline, dict):
        if tuple(outline["size"]) != size:
            where = f"{path}: annotation {annotation['id']} of image {annotation['image_id']}"
            raise ValueError(f"{where}: its RLE is for {outline['size']}, the image is {list(size)} (h, w)")
        return True
    return bool(outline) and all(len(polygon) >= 6 for polygon in outline)


def read_panoptic(coco: str | Path, split: str) -> Instances:
    """The segments of panoptic_*.json, things and stuff: crowds left out. Raises as read_instances does."""
    path = annotation_file(coco, "panoptic", split)
    content = read_json(path, LISTS)
    try:
        categories = sorted(content["categories"], key=lambda c: c["id"])
        categories = [{"id": c["id"], "name": c["name"], "isthing": bool(c["isthing"])} for c in categories]
        label_of = {c["id"]: label for label, c in enumerate(categories)}
        images = {image["id"]: image for image in content["images"]}
        annotations = sorted(content["annotations"], key=lambda a: a["image_id"])
        pictures = [images[a["image_id"]] for a in annotations]
        kept = [[s for s in a["segments_info"] if not s.get("iscrowd", 0)] for a in annotations]
        for a, segments in zip(annotations, kept, strict=True):
            for s in segments:
                if s["category_id"] not in label_of:
                    where = f"{path}: image {a['image_id']}: segment {s['id']}"
                    raise ValueError(f"{where}: unknown category id {s['category_id']}")
        data = Instances(
            ids=np.array([image["id"] for image in pictures], np.int64),
            names=[image["file_name"] for image in pictures],
            sizes=np.array([(image["height"], image["width"]) for image in pictures], np.int32).reshape(
                -1, 2
            ),
            boxes_xyxy=np.zeros((0, 4), np.float32),
            labels=np.array([label_of[s["category_id"]] for segments in kept for s in segments], np.int64),
            first=np.cumsum([0, *map(len, kept)]),
            categories=categories,
            segments=np.array([s["id"] for segments in kept for s in segments], np.int64),
        )
        maps = [a["file_name"] for a in annotations]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO panoptic file: {type(error).__name__}: {error}") from error
    check_on_disk(path, Path(coco) / split, data.names)
    check_on_disk(path, path.with_suffix(""), maps)
    crowds = sum(len(a["segments_info"]) for a in annotations) - len(data.labels)
    data.notes.append(f"{path}: {len(maps)} images, {len(data.labels)} segments, {crowds} crowds left out")
    return data


def read_ids(path: str | Path) -> set[int]:
    """COCO image ids: a JSON list, lines, or the test and val images of a Karpathy dataset_coco.json."""
    text = Path(path).read_text()
    try:
        if Path(path).suffix != ".json":
            return {int(line) for line in text.split()}
        content = json.loads(text)
        if isinstance(content, dict):
            return {int(image["cocoid"]) for image in content["images"] if image["split"] in ("test", "val")}
        return {int(i) for i in content}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: neither image ids nor a Karpathy dataset_coco.json ({error})") from error
