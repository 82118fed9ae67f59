"""The persons to evaluate pose on: COCO's true boxes, or those of a detector."""

import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.coco import annotation_file
from data.pose import Persons, person_crop, read_persons
from data.stream import collate
from files import BadImage, read_picture


class PersonBoxes(Dataset):
    """items[i] -> crop (3, h, w) uint8, target: every person once, upright and as large as its box.

    target: item i, image_id, orig_size, size, crop_cxcywh (4,) in pixels of the image, score of the box
    boxes: COCO results of a person detector; None: the true boxes of persons with keypoints
    """

    def __init__(self, coco, split, scale=1.0, limit=None, boxes=None):
        data = read_persons(coco, split)
        self.annotations, self.categories = annotation_file(coco, "person_keypoints", split), data.categories
        if boxes:
            data = read_boxes(boxes, data)
        self.image_ids = list(data.images)[:limit]
        self.rows = np.flatnonzero(np.isin(data.ids, self.image_ids))
        if not boxes and not len(self.rows):
            raise ValueError(f"{self.annotations}: no person with keypoints in {len(self.image_ids)} images")
        self.data, self.folder, self.scale, self.patch = data, Path(coco) / split, scale, 1
        self.notes = [*data.notes, f"boxes of the persons: {boxes or 'the true ones'}"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        row = self.rows[i]
        try:
            image = read_picture(self.folder / self.data.names[row], tuple(self.data.sizes[row].tolist()))
        except BadImage as error:
            return error
        crop, target = person_crop(image, self.data.boxes_xywh[row], self.patch, self.scale)
        known = {"item": i, "image_id": int(self.data.ids[row]), "score": float(self.data.scores[row])}
        return crop, {**target, **known}

    @staticmethod
    def collate(samples: list, patch: int, mean, std):
        """As data.coco's; behind the B crops come the same B mirrored, for the flip test."""
        batch = collate(samples, patch, mean, std)
        if isinstance(batch, Exception):
            return batch
        images, valid, y = batch
        return torch.cat([images, images.flip(3)]), valid, y  # (2 B, 3, h, w)


def read_boxes(path: str | Path, persons: Persons) -> Persons:
    """The persons that a detector found in the same images (COCO's results format), in the place of the true.

    Raises ValueError if there is none, or one is of an image that the annotations do not have.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        found = [b for b in content if b["category_id"] == persons.categories[0]["id"]]
        boxes = np.array([b["bbox"] for b in found], np.float32).reshape(-1, 4)
        scores = np.array([b["score"] for b in found], np.float64)
        ids = np.array([b["image_id"] for b in found], np.int64)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO results file of boxes: {error}") from error
    unknown = [int(i) for i in ids if int(i) not in persons.images]
    if unknown:
        raise ValueError(f"{path}: {len(set(unknown))} images are not in the annotations: {unknown[0]}")
    good = np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1) & (scores > 0)
    if not good.any():
        raise ValueError(
            f"{path} has no box of a person ({len(content)} entries): without it, true boxes serve"
        )
    order = np.flatnonzero(good)[np.argsort(ids[good], kind="stable")]
    images = [persons.images[int(i)] for i in ids[order]]
    return Persons(
        ids=ids[order],
        names=[name for name, *_ in images],
        sizes=np.array([size for _, *size in images], np.int32).reshape(-1, 2),
        boxes_xywh=boxes[order],
        keypoints=np.zeros((len(order), 0, 3), np.float32),
        scores=scores[order],
        images=persons.images,
        categories=persons.categories,
        notes=[f"{path}: {len(order)} boxes of {len(set(ids[order].tolist()))} images"],
    )
