"""COCO's persons as crops, one at a time.

A crop shows a region of the image: a box enlarged by 1.25 and to the aspect of 16 x 12 patches. Unbiased
(UDP, arXiv 1911.07524): its first and last pixels lie on the region's edges, so mirrored crops fit exactly.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from data.coco import LISTS, annotation_file, check_on_disk, read_json
from data.stream import Stream

PADDING = 1.25  # ViTPose's
GRID = 16, 12  # patches; ViTPose's. 224 x 168 pixels with patches of 14


@dataclass
class Persons:
    """A person_keypoints_*.json as arrays, the persons in the order of their images' ids.

    ids (n,) and names n of their images, sizes (n, 2) as h, w; boxes_xywh (n, 4) and their scores (n,);
    keypoints (n, K, 3): x, y, v; images: {id: (name, h, w)}, all of them
    """

    ids: np.ndarray
    names: list[str]
    sizes: np.ndarray
    boxes_xywh: np.ndarray
    keypoints: np.ndarray
    scores: np.ndarray
    images: dict[int, tuple[str, int, int]]
    categories: list[dict]
    notes: list[str] = field(default_factory=list)


def read_persons(coco: str | Path, split: str) -> Persons:
    """Persons with a labelled keypoint; crowds, and boxes without area, are left out.

    Raises ValueError for an annotation with an unknown image or other keypoints than its category's;
    FileNotFoundError for an image that is not on disk.
    """
    path = annotation_file(coco, "person_keypoints", split)
    content = read_json(path, LISTS)
    try:
        images = {i["id"]: (i["file_name"], i["height"], i["width"]) for i in content["images"]}
        posing = [c for c in content["categories"] if c.get("keypoints")]
        if len(posing) != 1:
            raise ValueError(f"{path}: {len(posing)} categories have keypoints, expected one, person")
        category = {k: posing[0][k] for k in ("id", "name", "keypoints")}
        category["mirror"] = mirror(category["keypoints"])
        kept = [a for a in content["annotations"] if not a.get("iscrowd", 0) and any(a["keypoints"][2::3])]
        for a in kept:
            if a["image_id"] not in images:
                raise ValueError(f"{path}: annotation {a['id']}: unknown image id {a['image_id']}")
            if len(a["keypoints"]) != 3 * len(category["keypoints"]):
                expected = f"3 x {len(category['keypoints'])} numbers"
                raise ValueError(
                    f"{path}: annotation {a['id']}: {len(a['keypoints'])} keypoints, not {expected}"
                )
        kept = sorted((a for a in kept if min(a["bbox"][2:]) > 0), key=lambda a: a["image_id"])
        persons = Persons(
            ids=np.array([a["image_id"] for a in kept], np.int64),
            names=[images[a["image_id"]][0] for a in kept],
            sizes=np.array([images[a["image_id"]][1:] for a in kept], np.int32).reshape(-1, 2),
            boxes_xywh=np.array([a["bbox"] for a in kept], np.float32).reshape(-1, 4),
            keypoints=np.array([a["keypoints"] for a in kept], np.float32).reshape(
                -1, len(category["keypoints"]), 3
            ),
            scores=np.ones(len(kept)),
            images=dict(sorted(images.items())),
            categories=[category],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO keypoints file: {type(error).__name__}: {error}") from error
    check_on_disk(path, Path(coco) / split, [name for name, *_ in images.values()])
    others = len(content["annotations"]) - len(kept)
    persons.notes.append(f"{path}: {len(kept)} persons with keypoints, {others} annotations without left out")
    return persons


def mirror(names: list[str]) -> list[int]:
    """Which keypoint is in each one's place in a mirror: right_eye where left_eye was."""
    swap = {"left": "right", "right": "left"}
    others = ["_".join(swap.get(part, part) for part in name.split("_")) for name in names]
    return [names.index(other) if other in names else i for i, other in enumerate(others)]


# --- crops


def crop_size(patch: int, scale: float = 1.0) -> tuple[int, int]:
    """(h, w) of a crop in pixels."""
    return tuple(max(2, round(scale * side)) * patch for side in GRID)


def region(box_xywh, aspect: float, padding: float = PADDING) -> np.ndarray:
    """The part of the image that a crop of aspect w / h shows of a box: cx, cy, w, h."""
    x, y, w, h = np.asarray(box_xywh, np.float32)
    sides = np.array([max(w, aspect * h), max(h, w / aspect)], np.float32)
    return np.concatenate([[x + w / 2, y + h / 2], padding * sides]).astype(np.float32)


def warp(image: Tensor, crop_cxcywh: np.ndarray, size: tuple[int, int], turn: float = 0.0) -> Tensor:
    """The region of image (3, H, W) uint8, turned by `turn` radians, as (3, *size) uint8; black outside."""
    (h, w), (cx, cy, cw, ch) = size, crop_cxcywh.tolist()
    v, u = torch.meshgrid(torch.linspace(-0.5, 0.5, h) * ch, torch.linspace(-0.5, 0.5, w) * cw, indexing="ij")
    cos, sin = np.cos(turn), np.sin(turn)
    x, y = cx + cos * u + sin * v, cy - sin * u + cos * v  # (h, w) in pixels of the image
    H, W = image.shape[1:]
    left, top = (int(at.min().floor().clamp(0, side - 1)) for at, side in ((x, W), (y, H)))
    right, bottom = (int(at.max().ceil().clamp(0, side - 1)) + 1 for at, side in ((x, W), (y, H)))
    part = image[:, top:bottom, left:right].float()[None]
    part = F.pad(part, (1, 1, 1, 1))  # so that it fades to black as the whole image would
    at = [2 * (z - a + 1) / (b - a + 1) - 1 for z, a, b in ((x, left, right), (y, top, bottom))]
    crop = F.grid_sample(part, torch.stack(at, -1)[None], align_corners=True)[0]
    return crop.round().to(torch.uint8)


def to_crop(
    points: np.ndarray, crop_cxcywh: np.ndarray, size: tuple[int, int], turn: float = 0.0
) -> np.ndarray:
    """Keypoints (K, 3) in pixels of the image -> in pixels of warp's crop; v is kept."""
    (h, w), (dx, dy) = size, (points[:, :2] - crop_cxcywh[:2]).T
    cos, sin = np.cos(turn), np.sin(turn)
    at = np.stack([cos * dx - sin * dy, sin * dx + cos * dy], 1) / crop_cxcywh[2:] + 0.5
    return np.concatenate([at * (w - 1, h - 1), points[:, 2:]], 1).astype(np.float32)


class Pose(Stream):
    """target: keypoints (K, 3): x and y in pixels of the crop, v > 0 where labelled.

    Augmented as ViTPose: half of the crops are mirrored, 3 in 10 persons with more than 8 keypoints cut to
    their upper or lower half, size times 0.5..1.5, 6 in 10 turned by some 40 degrees.
    """

    task = "pose"

    def __init__(self, coco, split, seed=0, scale=1.0, fraction=1.0, exclude=frozenset(), skip_bad=False):
        data = self.data = read_persons(coco, split)
        self.folder, self.ids, self.names, self.sizes = Path(coco) / split, data.ids, data.names, data.sizes
        self.categories, self.notes = data.categories, data.notes
        self.annotations = (data.boxes_xywh, data.keypoints)
        names = data.categories[0]["keypoints"]
        self.upper = np.array([not any(part in n for part in ("hip", "knee", "ankle")) for n in names])
        self.scale = scale
        self.choose(seed, fraction, exclude, skip_bad)

    def sample(self, image: Tensor, row: int, patch: int) -> tuple[Tensor, dict]:
        size = crop_size(patch, self.scale)
        points, box = self.data.keypoints[row], self.data.boxes_xywh[row]
        crop = self.half_body(points, size[1] / size[0])
        crop = region(box, size[1] / size[0]) if crop is None else crop
        if torch.rand(()) < 0.5:
            last = image.shape[2] - 1
            image, crop[0] = TF.horizontal_flip(image), last - crop[0]
            points = points[self.categories[0]["mirror"]] * (-1, 1, 1) + (last, 0, 0)
        crop[2:] *= float((1 + 0.5 * torch.randn(())).clamp(0.5, 1.5))
        turn = float((40 * torch.randn(())).clamp(-80, 80)) if torch.rand(()) < 0.6 else 0.0
        turn = np.deg2rad(turn)
        return warp(image, crop, size, turn), {
            "keypoints": torch.from_numpy(to_crop(points, crop, size, turn))
        }

    def half_body(self, points: np.ndarray, aspect: float) -> np.ndarray | None:
        """The region of the upper or the lower half of a person with many keypoints, or None."""
        seen = points[:, 2] > 0
        if torch.rand(()) >= 0.3 or seen.sum() <= 8:
            return None
        upper, lower = points[seen & self.upper, :2], points[seen & ~self.upper, :2]
        part = upper if (torch.rand(()) < 0.5 and len(upper) > 2) or len(lower) <= 2 else lower
        if len(part) < 2 or not (part.max(0) > part.min(0)).all():
            return None
        sides = part.max(0) - part.min(0)
        return region(np.concatenate([part.mean(0) - sides / 2, sides]), aspect, padding=1.5)


def person_crop(image: Tensor, box_xywh, patch: int, scale: float = 1.0) -> tuple[Tensor, dict]:
    """The crop that the pose head wants of a person's box in image (3, H, W) uint8, and what it must know."""
    size = crop_size(patch, scale)
    crop = region(box_xywh, size[1] / size[0])
    known = {"orig_size": tuple(image.shape[1:]), "size": size, "score": 1.0}
    return warp(image, crop, size), {**known, "crop_cxcywh": torch.from_numpy(crop)}
