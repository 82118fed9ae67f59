"""Detection: boxes and classes, with DETR's augmentation as the authors' release has it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from data.coco import read, read_instances
from data.stream import Stream, randint


class ShortestSize(v2.RandomShortestSize):
    """The same, with at least a pixel left of the short side."""

    def make_params(self, flat_inputs: list) -> dict:
        return {"size": tuple(max(1, side) for side in super().make_params(flat_inputs)["size"])}


class DetectionAugmentation:
    """The release's, which is DETR's with the long side at most 672 px.

    Flip half of the images; crop half of them, each side 384..600 px where the image has as much; resize the
    short side to 480..672. `scale` multiplies all these sizes.
    """

    def __init__(self, scale: float = 1.0):
        def px(*sizes: int) -> list[int]:
            return [max(1, round(scale * size)) for size in sizes]

        self.flip = v2.RandomHorizontalFlip(0.5)
        # No longer than that: a picture of 3000 x 4 would take 1 GB
        self.resize_before_crop = ShortestSize(px(400, 500, 600), max_size=px(20_000)[0])
        self.crop_least, self.crop_most = px(384, 600)
        self.resize = ShortestSize(px(480, 512, 544, 576, 608, 640, 672), max_size=px(672)[0])

    def __call__(self, image: tv_tensors.Image, boxes: tv_tensors.BoundingBoxes):
        image, boxes = self.flip(image, boxes)
        if torch.rand(()) < 0.5:
            image, boxes = self.resize_before_crop(image, boxes)
            sides = image.shape[1:]
            h, w = (randint(min(self.crop_least, side), min(self.crop_most, side)) for side in sides)
            top, left = randint(0, sides[0] - h), randint(0, sides[1] - w)
            image, boxes = (TF.crop(x, top, left, h, w) for x in (image, boxes))
        return self.resize(image, boxes)


class Detection(Stream):
    """target: labels (n,) in 0..C-1 and boxes_cxcywh (n, 4) in [0, 1] of size."""

    task = "detection"

    def __init__(
        self, coco, split, seed=0, scale=1.0, fraction=1.0, exclude=frozenset(), skip_bad=False, read=read,
        size=None,
    ):  # fmt: skip
        data = self.data = read_instances(coco, split, read=read)
        self.folder, self.ids, self.names, self.sizes = Path(coco) / split, data.ids, data.names, data.sizes
        self.categories, self.notes = data.categories, data.notes
        self.annotations = (data.boxes_xyxy, data.labels)
        self.augment = v2.Resize((size, size)) if size else DetectionAugmentation(scale)
        self.choose(seed, fraction, exclude, skip_bad, np.diff(data.first))

    def sample(self, image: Tensor, row: int, patch: int) -> tuple[Tensor, dict]:
        mine = slice(self.data.first[row], self.data.first[row + 1])
        boxes = self.data.boxes_xyxy[mine]
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[1:]))
        image, boxes = self.augment(tv_tensors.Image(image), boxes)
        h, w = image.shape[1:]
        boxes = boxes.as_subclass(Tensor)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)  # the crop may have left some objects out
        boxes_cxcywh = box_convert(boxes[inside], "xyxy", "cxcywh") / torch.tensor([w, h, w, h])
        return image.as_subclass(Tensor), {
            "labels": torch.from_numpy(self.data.labels[mine])[inside],
            "boxes_cxcywh": boxes_cxcywh,
        }
