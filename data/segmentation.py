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

from data.coco import SQUARE, Instances, annotation_file, read_instances, read_panoptic
from data.stream import Stream, randint
from files import BadImage, read_picture


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
        rows, columns = (
            ((np.arange(min(side, s)) + c + 0.5) * full / s).astype(np.int64).clip(max=full - 1)
            for s, c, full in zip(size, corner, (height, width), strict=True)
        )
        flip = bool(torch.rand(()) < 0.5)
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

    def __init__(self, coco, split, seed=0, scale=1.0, fraction=1.0, exclude=frozenset(), skip_bad=False):
        data = self.data = self.read(coco, split)
        self.folder, self.ids, self.names, self.sizes = Path(coco) / split, data.ids, data.names, data.sizes
        self.categories, self.notes = data.categories, data.notes
        self.scale = scale
        self.choose(seed, fraction, exclude, skip_bad)

    def read(self, coco, split) -> Instances:
        data = read_instances(coco, split, masks=True)
        self.annotations = (data.labels, data.outlines)
        return data

    def sample(self, image: Tensor, row: int, patch: int) -> tuple[Tensor, dict]:
        side = max(1, round(self.scale * SQUARE) // patch) * patch  # 1022 = 73 patches of 14
        jitter = Jitter.draw(*image.shape[1:], side)
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
            outline = json.loads(bytes(self.data.outlines[self.data.ends[k] : self.data.ends[k + 1]]))
            codes = rle.frPyObjects(outline, h, w) if isinstance(outline, list) else outline
            if isinstance(codes, dict) and isinstance(codes["counts"], list):
                codes = rle.frPyObjects(codes, h, w)
            yield rle.decode(rle.merge(codes) if isinstance(codes, list) else codes)


class PanopticSegmentation(Segmentation):
    """The same of things and stuff together: every segment of the panoptic PNG is a target."""

    task = "panoptic"

    def read(self, coco, split) -> Instances:
        data = read_panoptic(coco, split)
        self.annotations, self.maps = (
            (data.labels, data.segments),
            annotation_file(coco, "panoptic", split).with_suffix(""),
        )
        return data

    def masks(self, row: int) -> Iterator[np.ndarray]:
        path = (self.maps / self.names[row]).with_suffix(".png")
        red, green, blue = read_picture(path, tuple(self.sizes[row].tolist())).numpy().astype(np.int64)
        ids = red + 256 * green + 256**2 * blue
        segments = self.data.segments[self.data.first[row] : self.data.first[row + 1]]
        lost = segments[~np.isin(segments, ids)]
        if len(lost):
            raise BadImage(f"{path}: image {self.ids[row]}: no pixel has the id of segment {lost[0]}")
        return (ids == segment for segment in segments)
