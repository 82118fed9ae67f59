"""Instance and panoptic segmentation: masks and classes, with Mask2Former's large-scale jitter."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from data import outlines
from data.coco import (
    SQUARE,
    Coco,
    Instances,
    annotation_file,
    check_on_disk,
    flags,
    read,
    read_instances,
)
from data.stream import Stream, randint
from files import BadImage, Items, read_picture


@dataclass
class Jitter:
    """Large-scale jitter, as Mask2Former: flip half of the images, resize to 0.1..2 times what fits a
    square, crop to the square. Padding to the full square is left out: it would be masked everywhere.

    rows, columns: for each pixel of the result, the source pixel that lies under its centre
    """

    rows: np.ndarray
    columns: np.ndarray
    size: tuple[int, int]  # of the whole image after the resize
    corner: tuple[int, int]  # top, left of the crop
    flip: bool

    @classmethod
    def draw(cls, height: int, width: int, side: int) -> "Jitter":
        scale = float(torch.empty(()).uniform_(0.1, 2.0)) * side / max(height, width)
        size = tuple(max(1, round(scale * s)) for s in (height, width))
        corner = tuple(randint(0, max(0, s - side)) for s in size)
        return cls.cut(height, width, side, size, corner, flip=bool(torch.rand(()) < 0.5))

    @classmethod
    def cut(cls, height: int, width: int, side: int, size=None, corner=(0, 0), flip=False) -> "Jitter":
        """By default none: the whole image, squashed to the square."""
        size = size or (side, side)
        rows, columns = (
            ((np.arange(min(side, s)) + c + 0.5) * full / s).astype(np.int64).clip(max=full - 1)
            for s, c, full in zip(size, corner, (height, width), strict=True)
        )
        return cls(rows, width - 1 - columns if flip else columns, size, corner, flip)

    def image(self, image: Tensor) -> Tensor:
        image = TF.horizontal_flip(image) if self.flip else image
        image = TF.resize(image, list(self.size), antialias=True)
        return TF.crop(image, *self.corner, len(self.rows), len(self.columns))

    def map(self, mask: np.ndarray) -> np.ndarray:
        """The same of a mask or a map of ids, (height, width), by nearest neighbour."""
        return mask[self.rows[:, None], self.columns]


class Segmentation(Stream):
    """target: labels (n,) in 0..C-1 and masks (n, h, w) bool."""

    task = "segmentation"

    def __init__(
        self, coco, split, seed=0, scale=1.0, fraction=1.0, exclude=frozenset(), skip_bad=False, read=read,
        size=None,
    ):  # fmt: skip
        data = self.data = self.load(coco, split, read)
        self.folder, self.ids, self.names, self.sizes = Path(coco) / split, data.ids, data.names, data.sizes
        self.categories, self.notes = data.categories, data.notes
        self.scale, self.size = scale, size
        self.choose(seed, fraction, exclude, skip_bad, np.diff(data.first))

    def load(self, coco, split, read) -> Instances:
        data = read_instances(coco, split, outlines.check, read)
        self.outlines, self.ends = outlines.pack(data.outlines)
        data.outlines = None  # they take ten times as much
        self.annotations = (data.labels, self.outlines)
        return data

    def sample(self, image: Tensor, row: int, patch: int) -> tuple[Tensor, dict]:
        side = max(1, round(self.scale * SQUARE) // patch) * patch  # 1022 = 73 patches of 14
        h, w = image.shape[1:]
        jitter = Jitter.cut(h, w, self.size) if self.size else Jitter.draw(h, w, side)
        labels = self.data.labels[self.data.first[row] : self.data.first[row + 1]]
        masks = np.zeros((len(labels), len(jitter.rows), len(jitter.columns)), bool)
        inside = np.zeros(len(labels), bool)
        for i, source in enumerate(self.masks(row)):  # one at a time, and in place: they are large
            mask = masks[inside.sum()]
            mask[:] = jitter.map(source)
            inside[i] = mask.any()  # else the crop has left the object out
        target = {
            "labels": torch.from_numpy(labels[inside]),
            "masks": torch.from_numpy(masks[: inside.sum()]),
        }
        return jitter.image(image), target

    def masks(self, row: int) -> Iterator[np.ndarray]:
        """The masks of an image's annotations, (h, w) uint8."""
        h, w = self.sizes[row].tolist()
        for k in range(self.data.first[row], self.data.first[row + 1]):
            outline = json.loads(bytes(self.outlines[self.ends[k] : self.ends[k + 1]]))
            yield rle.decode(outlines.code(outline, h, w))


# --- panoptic


class PanopticSegmentation(Segmentation):
    """The same of things and stuff together: every segment of the panoptic PNG is a target."""

    task = "panoptic"

    def load(self, coco, split, read) -> Instances:
        file = read(annotation_file(coco, "panoptic", split))
        annotated = read_panoptic(file)
        kept = [[s for s in a["segments_info"] if not s["iscrowd"]] for a in annotated]
        label_of, segments = file.label_of(), [s for of_image in kept for s in of_image]
        rows = [a["row"] for a in annotated]
        names = [file.names[row] for row in rows]
        left_out = sum(len(a["segments_info"]) for a in annotated) - len(segments)
        data = Instances(
            ids=file.ids[rows],
            names=check_on_disk(file.path, Path(coco) / split, names),
            sizes=file.sizes[rows],
            boxes_xyxy=np.zeros((0, 4), np.float32),
            labels=np.array([label_of[s["category_id"]] for s in segments], np.int64),
            first=np.cumsum([0, *map(len, kept)]),
            categories=panoptic_categories(file),
            segments=np.array([s["id"] for s in segments], np.int64),
            notes=[f"{file.path}: {len(rows)} images, {len(segments)} segments, {left_out} crowds left out"],
        )
        crowds = ([s["id"] for s in a["segments_info"] if s["iscrowd"]] for a in annotated)
        self.crowds = {row: ids for row, ids in enumerate(crowds) if ids}
        self.maps = [file.path.with_suffix("") / a["file_name"] for a in annotated]
        self.annotations = (data.labels, data.segments)
        return data

    def masks(self, row: int) -> Iterator[np.ndarray]:
        ids = read_segments(self.maps[row], tuple(self.sizes[row].tolist()))
        segments = self.data.segments[self.data.first[row] : self.data.first[row + 1]]
        found, told = np.unique(ids), [*segments, *self.crowds.get(row, ())]
        where = f"{self.maps[row]}: image {self.ids[row]}"
        if len(lost := np.setdiff1d(told, found)):
            raise BadImage(f"{where}: no pixel has the id of segment {lost[0]}")
        if len(strange := np.setdiff1d(found, [0, *told])):
            raise BadImage(f"{where}: segment {strange[0]} is not in its segments_info")
        return (ids == segment for segment in segments)


def read_panoptic(file: Coco) -> list[dict]:
    """A panoptic file's annotations by rising image id: row, image_id, file_name of the PNG, segments_info.

    Raises ValueError for two annotations of an image, and for segments that are twice in one, have an unknown
    category or the id 0, which is void; FileNotFoundError for a PNG that is not on disk.
    """
    annotations, categories = file.annotations, {c["id"] for c in file.categories}
    annotations.ids("image_id")
    infos, folder = annotations.column("segments_info", list), file.path.with_suffix("")
    pngs = check_on_disk(file.path, folder, annotations.column("file_name", str))
    found = []
    for k, row in enumerate(file.rows.tolist()):
        segments = Items(file.path, infos[k], f"{annotations.where(k)}: segments_info")
        ids, crowd = segments.ids(), flags(segments, "iscrowd").tolist()
        if wrong := [
            i for i, segment in enumerate(ids) if not (type(segment) is int and 0 < segment < 256**3)
        ]:
            segments.refuse(
                wrong[0], "id must be R + 256 G + 256^2 B of its colour, and not 0, which is void"
            )
        kinds = segments.column("category_id", int, str)
        if unknown := [i for i, kind in enumerate(kinds) if kind not in categories]:
            segments.refuse(unknown[0], f"unknown category id {kinds[unknown[0]]!r}")
        keys = ("id", "category_id", "iscrowd")
        info = [dict(zip(keys, values, strict=True)) for values in zip(ids, kinds, crowd, strict=True)]
        image_id = file.ids[row].item()
        found.append({"row": row, "image_id": image_id, "file_name": pngs[k], "segments_info": info})
    return sorted(found, key=lambda a: a["row"])


def panoptic_categories(file: Coco) -> list[dict]:
    things = dict(zip(file.kinds.ids(), flags(file.kinds, "isthing", default=None).tolist(), strict=True))
    return [{"id": c["id"], "name": c["name"], "isthing": things[c["id"]]} for c in file.categories]


def read_segments(path: str | Path, size: tuple[int, int] = (0, 0)) -> np.ndarray:
    """A panoptic PNG as segment ids, (h, w) int32: R + 256 G + 256^2 B; 0 is void. Raises as read_picture."""
    red, green, blue = read_picture(path, size).numpy().astype(np.int32)
    return red + 256 * green + 256**2 * blue
