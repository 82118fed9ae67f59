"""The persons to evaluate pose on: COCO's true boxes, or those of a detector."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.coco import annotation_file, boxes, read
from data.outlines import truth
from data.pose import Persons, person_crop, posed, read_persons
from data.stream import collate
from files import BadImage, Items, expecting, read_json, read_picture


class PersonBoxes(Dataset):
    """items[i] -> crop (3, h, w) uint8, target: every person once, upright and as large as its box.

    target: item i, image_id, orig_size, size, crop_cxcywh (4,) in pixels of the image, score of the box
    boxes: COCO results of a person detector; None: the true boxes of persons with keypoints
    truth: what pycocotools is to score against
    """

    def __init__(self, coco, split, scale=1.0, limit=None, boxes=None, size=None):
        self.annotations = annotation_file(coco, "person_keypoints", split)
        file = read(self.annotations)
        data = read_persons(coco, split, read=lambda _: file)
        self.categories = data.categories
        category, objects, keypoints = posed(file)
        counts = (keypoints[..., 2] > 0).sum(1).tolist()
        points = [points.ravel().tolist() for points in keypoints]
        self.truth = truth(file, objects, [category], keypoints=points, num_keypoints=counts)
        if boxes:
            data = read_boxes(boxes, data)
        self.image_ids = list(data.images)[:limit]
        self.rows = np.flatnonzero(np.isin(data.ids, self.image_ids))
        if not boxes and not len(self.rows):
            why = f"{self.annotations}: no person with keypoints in {len(self.image_ids)} images"
            raise ValueError("; ".join([why, *data.notes[1:]]))
        self.data, self.folder, self.scale, self.size = data, Path(coco) / split, scale, size
        self.patch = 1
        self.notes = [*data.notes, f"boxes of the persons: {boxes or 'the true ones'}"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        row = self.rows[i]
        try:
            image = read_picture(self.folder / self.data.names[row], tuple(self.data.sizes[row].tolist()))
        except BadImage as error:
            return error
        crop, target = person_crop(image, self.data.boxes_xywh[row], self.patch, self.scale, self.size)
        known = {"item": i, "image_id": self.data.ids[row].item(), "score": float(self.data.scores[row])}
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
    results, ids, xywh, scores = read_results(path)
    kinds = results.column("category_id", int, str)
    mine = np.array([kind == persons.categories[0]["id"] for kind in kinds], bool)
    known = list(persons.images)
    if unknown := sorted({repr(i) for i in ids} - set(map(repr, known))):
        example = f" (those have ids like {known[0]!r})" if known else ""
        raise ValueError(f"{path}: {len(unknown)} images are not in the annotations: {unknown[0]}{example}")
    good = mine & np.isfinite(xywh).all(1) & (xywh[:, 2:] > 0).all(1) & (scores > 0)
    if not good.any():
        raise ValueError(f"{path} has no box of a person ({len(ids)} entries): without it, true boxes serve")
    row_of = {image_id: row for row, image_id in enumerate(known)}  # by rising id
    rows = np.array([row_of[i] for i in ids])
    order = np.flatnonzero(good)[np.argsort(rows[good], kind="stable")]
    images = [persons.images[ids[k]] for k in order]
    return Persons(
        ids=np.array([ids[k] for k in order]),
        names=[name for name, *_ in images],
        sizes=np.array([size for _, *size in images], np.int32).reshape(-1, 2),
        boxes_xywh=xywh[order].astype(np.float32),
        keypoints=np.zeros((len(order), 0, 3), np.float32),
        scores=scores[order],
        images=persons.images,
        categories=persons.categories,
        notes=[f"{path}: {len(order)} boxes of {len({ids[k] for k in order})} images"],
    )


def read_results(path: str | Path) -> tuple[Items, list, np.ndarray, np.ndarray]:
    """Boxes in COCO's results format: the entries, their image ids, boxes (n, 4) x, y, w, h, scores (n,)."""
    with expecting(path, "a COCO results file of boxes"):
        results = Items(path, read_json(path), "results")
        ids = results.column("image_id", int, str)
        return results, ids, boxes(results), results.floats("score", results.column("score", int, float))
