"""COCO's annotation files -> arrays, checked once, for training and evaluation alike.

coco/annotations/instances_train2017.json, panoptic_train2017.json
coco/train2017/000000000009.jpg
coco/annotations/panoptic_train2017/000000000009.png

Ids of images and categories are whole numbers or text, and unique; those of annotations are not used and may
be doubled or missing. `iscrowd` is 0 where it is missing; `area` that of the mask, or else of the box.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from unicodedata import normalize

import numpy as np

from files import Items, expecting, read_json, shown

LISTS = "images", "annotations", "categories"  # of which files of captions have no third
SQUARE = 1024  # px that segmentation's images are fitted into; the release's, which cuts it to 1022


@dataclass
class Coco:
    """A file whose images, categories and references are checked; images and categories by rising id.

    ids (n,), names n file names, sizes (n, 2) as h, w; rows (N,): the image of each annotation;
    categories: all that the file says of them; kinds: the same in its order
    """

    path: Path
    ids: np.ndarray
    names: list[str]
    sizes: np.ndarray
    categories: list[dict]
    kinds: Items
    annotations: Items
    rows: np.ndarray

    def label_of(self) -> dict[int | str, int]:
        """{category id: label in 0..C-1}: COCO's 1..90 with gaps -> 0..79."""
        return {c["id"]: label for label, c in enumerate(self.categories)}


def read(path: str | Path, lists: tuple[str, ...] = LISTS) -> Coco:
    """Raises ValueError naming the item that is not as COCO's are: place in the file, id, field."""
    content = read_json(path)
    with expecting(path, "a COCO annotation file"):
        if lacks := [name for name in lists if type(content.get(name)) is not list]:
            raise ValueError(f"{path} is not a COCO annotation file: no list called {', '.join(lacks)}")
        images, annotations, categories = (
            Items(path, content[name] if name in lists else [], name) for name in LISTS
        )
        ids, names = images.ids(), images.column("file_name", str)
        sizes = list(zip(images.column("height", int), images.column("width", int), strict=True))
        order = sorted(range(len(ids)), key=ids.__getitem__)
        known = zip(categories.ids(), categories.column("name", str), categories.items, strict=True)
    for i, (h, w) in enumerate(sizes):
        if not (0 < h < 2**31 and 0 < w < 2**31):
            images.refuse(i, f"width and height must be positive, got {w} x {h}")
    return Coco(
        path=Path(path),
        ids=np.array([ids[i] for i in order]) if ids else np.zeros(0, np.int64),
        names=[names[i] for i in order],
        sizes=np.array([sizes[i] for i in order], np.int32).reshape(-1, 2),
        categories=sorted(({**c, "id": key, "name": name} for key, name, c in known), key=lambda c: c["id"]),
        kinds=categories,
        annotations=annotations,
        rows=np.array(
            annotations.refer("image_id", {ids[i]: k for k, i in enumerate(order)}, "image"), np.int64
        ),
    )


# --- objects


@dataclass
class Objects:
    """Annotations that can be used, in the order of the file; those that cannot are counted in notes.

    places (N,) in the file's list; rows (N,) of their images; labels (N,) in 0..C-1; crowd (N,) bool;
    boxes_xywh (N, 4) in pixels; areas (N,), NaN where the file has none; outlines: N `segmentation`s, or None
    """

    places: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    outlines: list | None
    notes: list[str]

    def part(self, which: np.ndarray) -> "Objects":
        """Those at these places of the arrays."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("outlines", "notes")}
        shapes = self.outlines and [self.outlines[i] for i in which]
        return Objects(**{k: v[which] for k, v in arrays.items()}, outlines=shapes, notes=self.notes)


def read_objects(file: Coco, outlines: Callable | None = None) -> Objects:
    """outlines: data.outlines.check, if the masks are wanted. Raises ValueError naming the annotation."""
    annotations = file.annotations
    labels = np.array(annotations.refer("category_id", file.label_of(), "category"), np.int64)
    crowd = flags(annotations, "iscrowd")
    areas = annotations.floats("area", annotations.column("area", int, float, default=np.nan))
    if (wrong := (areas < 0) | np.isinf(areas)).any():
        annotations.refuse(int(wrong.argmax()), f"area must be at least 0, got {areas[wrong][0]}")
    xywh = boxes(annotations)
    inside = np.clip(np.nan_to_num(to_xyxy(xywh)), 0, file.sizes[file.rows][:, [1, 0, 1, 0]])
    shapes, why = None, {
        "with a box that is not finite": ~np.isfinite(xywh).all(1),
        "with a box without area": ~(xywh[:, 2:] > 0).all(1),
        "with a box beside its image": ~(inside[:, 2:] > inside[:, :2]).all(1),
    }  # fmt: skip
    notes = []
    if outlines:
        shapes, notes = outlines(annotations, file.sizes[file.rows])
        why["without a usable outline"] = np.array([shape is None for shape in shapes], bool)
    usable = np.ones(len(xywh), bool)
    for kind, wrong in why.items():
        if (first := np.flatnonzero(wrong & usable)).size:
            where = annotations.where(int(first[0]))
            notes.append(
                f"{file.path}: {len(first)} unusable annotations dropped, {kind}; the first is {where}"
            )
        usable &= ~wrong
    every = Objects(np.arange(len(xywh)), file.rows, labels, crowd, xywh, areas, shapes, notes)
    return every.part(np.flatnonzero(usable))


def flags(items: Items, key: str, default: int | None = 0) -> np.ndarray:
    """(N,) bool of 0 or 1. Raises ValueError for text, as "0" would be true; for none without a default."""
    values = items.column(key, int, bool, default=default)
    if other := [i for i, value in enumerate(values) if value not in (0, 1)]:
        items.refuse(other[0], f"{key} must be 0 or 1, got {values[other[0]]}")
    return np.array(values, bool)


def boxes(items: Items) -> np.ndarray:
    """(N, 4) float64. Raises ValueError for one that is not [x, y, w, h]; NaN is for the caller to judge."""
    found = items.column("bbox", list)
    for i, box in enumerate(found):
        if len(box) != 4 or not {int, float}.issuperset(map(type, box)):
            items.refuse(i, f"bbox must be [x, y, w, h], got {shown(box)}")
    return items.floats("bbox", found).reshape(-1, 4)


def to_xyxy(xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)


# --- for training


@dataclass
class Instances:
    """An instances_*.json, or a panoptic_*.json, as arrays: cheap to share with the workers.

    ids (n,), names n file names, sizes (n, 2) as h, w; boxes_xyxy (N, 4) in pixels and labels (N,) in 0..C-1
    of all images, those of image i at first[i]:first[i + 1]; notes: what was left out and why, for the user;
    outlines: their `segmentation`s, N of them; segments (N,): panoptic segment ids
    """

    ids: np.ndarray
    names: list[str]
    sizes: np.ndarray
    boxes_xyxy: np.ndarray
    labels: np.ndarray
    first: np.ndarray
    categories: list[dict]
    notes: list[str] = field(default_factory=list)
    outlines: list | None = None
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


def read_instances(
    coco: str | Path, split: str, outlines: Callable | None = None, read: Callable = read
) -> Instances:
    """Boxes, classes and, if asked for, masks: crowds left out, unusable annotations left out with a count.

    outlines: as in read_objects. Raises ValueError as `read`, FileNotFoundError for an image not on disk.
    """
    file = read(annotation_file(coco, "instances", split))
    names = check_on_disk(file.path, Path(coco) / split, file.names)
    objects = read_objects(file, outlines)
    kept = np.flatnonzero(~objects.crowd)
    kept = objects.part(kept[np.argsort(objects.rows[kept], kind="stable")])
    rows, corners = kept.rows, to_xyxy(kept.boxes_xywh)
    crowds = f"{objects.crowd.sum()} crowd annotations left out"
    return Instances(
        ids=file.ids,
        names=names,
        sizes=file.sizes,
        boxes_xyxy=np.clip(corners, 0, file.sizes[rows][:, [1, 0, 1, 0]]).astype(np.float32),
        labels=kept.labels,
        first=np.searchsorted(rows, np.arange(len(names) + 1)),
        categories=[{"id": c["id"], "name": c["name"]} for c in file.categories],
        notes=[f"{file.path}: {len(names)} images, {len(rows)} boxes, {crowds}", *objects.notes],
        outlines=kept.outlines,
    )


def check_on_disk(path: Path, folder: Path, names: list[str]) -> list[str]:
    """The names as the folder has them, in it or below, in whichever Unicode form.

    Raises FileNotFoundError if files that the annotations in `path` speak of are not there.
    """

    @cache
    def listed(place: str) -> tuple[set[str], dict[str, str]]:
        there = set(os.listdir(folder / place)) if (folder / place).is_dir() else set()
        return there, {normalize("NFC", name): name for name in there}

    @cache
    def find(name: str) -> str | None:
        place, last = os.path.split(os.path.normpath(name))
        place = find(place) if place.strip("/.") else place
        there, composed = listed(place) if place is not None else (set(), {})
        last = last if last in there else composed.get(normalize("NFC", last))
        return last and os.path.join(place, last)

    top = listed("")[0]
    found = [name if name in top else find(name) for name in names]
    if None in found:
        many = f"{found.count(None)} of {len(names)} images"
        raise FileNotFoundError(f"{path}: {many} not in {folder}: {shown(names[found.index(None)])}")
    return found


def read_ids(path: str | Path) -> set[int] | set[str]:
    """Image ids: a JSON list, lines, or the test and val images of a Karpathy dataset_coco.json."""
    if Path(path).suffix != ".json":
        lines = Path(path).read_text("utf-8-sig").split()
        return {int(line) for line in lines} if all(line.isdecimal() for line in lines) else set(lines)
    content = read_json(path)
    with expecting(path, "a list of image ids, nor a Karpathy dataset_coco.json"):
        if isinstance(content, dict):
            images = Items(path, content.get("images"), "images")
            ids, splits = images.column("cocoid", int), images.column("split", str)
            return {i for i, part in zip(ids, splits, strict=True) if part in ("test", "val")}
        return set(Items(path, [{"id": i} for i in content], "its list").ids())
