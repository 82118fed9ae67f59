"""COCO's persons as crops, one at a time.

A crop shows a region of the image: a box enlarged by 1.25 and to the aspect of 16 x 12 patches. Unbiased
(UDP, arXiv 1911.07524): its first and last pixels lie on the region's edges, so mirrored crops fit exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from data.coco import Coco, Objects, annotation_file, check_on_disk, read, read_objects
from data.stream import Stream
from files import shown

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
    images: dict[int | str, tuple[str, int, int]]
    categories: list[dict]
    notes: list[str] = field(default_factory=list)


def read_persons(coco: str | Path, split: str, read: Callable = read) -> Persons:
    """Persons with a labelled keypoint; crowds, and boxes without area, are left out.

    Raises ValueError naming an annotation that is not as it should be; FileNotFoundError for an image that is
    not on disk.
    """
    file = read(annotation_file(coco, "person_keypoints", split))
    names = check_on_disk(file.path, Path(coco) / split, file.names)
    category, objects, keypoints = posed(file)
    kept = np.flatnonzero(~objects.crowd & (keypoints[..., 2] > 0).any(1))
    kept = kept[np.argsort(objects.rows[kept], kind="stable")]
    rows, others = objects.rows[kept], len(objects.rows) - len(kept)
    return Persons(
        ids=file.ids[rows],
        names=[names[row] for row in rows],
        sizes=file.sizes[rows],
        boxes_xywh=objects.boxes_xywh[kept].astype(np.float32),
        keypoints=keypoints[kept].astype(np.float32),
        scores=np.ones(len(kept)),
        images={
            i: (n, *size) for i, n, size in zip(file.ids.tolist(), names, file.sizes.tolist(), strict=True)
        },
        categories=[category],
        notes=[
            f"{file.path}: {len(kept)} persons with keypoints, {others} annotations without left out",
            *objects.notes,
        ],
    )


def posed(file: Coco) -> tuple[dict, Objects, np.ndarray]:
    """The category with keypoints, its objects, their keypoints (N, K, 3); 0, 0, 0 where none is labelled.

    Raises ValueError if there is no such category or another, and naming what has other keypoints than it.
    """
    posing = [c for c in file.categories if c.get("keypoints")]
    if len(posing) != 1:
        raise ValueError(f"{file.path}: {len(posing)} categories have keypoints, expected one, person")
    names = next(filter(None, file.kinds.column("keypoints", list, default=[])))
    if not {str}.issuperset(map(type, names)) or len(set(names)) < len(names):
        raise ValueError(f"{file.path}: keypoints of category {posing[0]['name']!r} must be unlike names")
    category = {"id": posing[0]["id"], "name": posing[0]["name"], "keypoints": names, "mirror": mirror(names)}
    if "sigmas" in posing[0]:
        category["sigmas"] = posing[0]["sigmas"]
        check_sigmas(f"{file.path}: category {shown(category['name'])}", category["sigmas"], len(names))
    elif len(names) != 17:
        raise ValueError(
            f"{file.path}: category {category['name']!r} has {len(names)} keypoints, and poses are scored by "
            f"COCO's sigmas, which are of 17: add a list `sigmas` of {len(names)} to the category"
        )
    objects, numbers = read_objects(file), 3 * len(names)
    objects = objects.part(np.flatnonzero(objects.labels == file.label_of()[category["id"]]))
    objects.labels[:] = 0
    values = file.annotations.column("keypoints", list, default=[0] * numbers)
    values = [values[k] for k in objects.places]
    for k, value in zip(objects.places.tolist(), values, strict=True):
        if len(value) != numbers:
            file.annotations.refuse(k, f"{len(value)} numbers in keypoints, not 3 x {len(names)}")
        if not {int, float}.issuperset(map(type, value)):
            file.annotations.refuse(k, "keypoints must be numbers")
    keypoints = file.annotations.floats("keypoints", values, objects.places).reshape(-1, len(names), 3)
    if (wrong := ~np.isfinite(keypoints).all((1, 2))).any():
        file.annotations.refuse(int(objects.places[wrong][0]), "a keypoint that is not finite")
    return category, objects, keypoints


def check_sigmas(where: str, sigmas, count: int) -> None:
    if not (
        type(sigmas) is list
        and len(sigmas) == count
        and all(type(sigma) in (int, float) and 0 < sigma < np.inf for sigma in sigmas)
    ):
        raise ValueError(
            f"{where}: sigmas must be {count} positive numbers, one of each keypoint, got {shown(sigmas)}"
        )


def mirror(names: list[str]) -> list[int]:
    """Which keypoint is in each one's place in a mirror: right_eye where left_eye was."""
    swap = {"left": "right", "right": "left"}
    others = ["_".join(swap.get(part, part) for part in name.split("_")) for name in names]
    return [names.index(other) if other in names else i for i, other in enumerate(others)]


# --- crops


def crop_size(patch: int, scale: float = 1.0, square: int | None = None) -> tuple[int, int]:
    """(h, w) of a crop in pixels."""
    return (square, square) if square else tuple(max(2, round(scale * side)) * patch for side in GRID)


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

    def __init__(
        self, coco, split, seed=0, scale=1.0, fraction=1.0, exclude=frozenset(), skip_bad=False, read=read,
        size=None,
    ):  # fmt: skip
        data = self.data = read_persons(coco, split, read)
        self.folder, self.ids, self.names, self.sizes = Path(coco) / split, data.ids, data.names, data.sizes
        self.categories, self.notes = data.categories, data.notes
        self.annotations = (data.boxes_xywh, data.keypoints)
        names = data.categories[0]["keypoints"]
        self.upper = np.array([not any(part in n for part in ("hip", "knee", "ankle")) for n in names])
        self.scale, self.size = scale, size
        self.choose(seed, fraction, exclude, skip_bad)

    def sample(self, image: Tensor, row: int, patch: int) -> tuple[Tensor, dict]:
        size = crop_size(patch, self.scale, self.size)
        points, box = self.data.keypoints[row], self.data.boxes_xywh[row]
        if self.size:
            crop = region(box, 1.0)
            return warp(image, crop, size), {"keypoints": torch.from_numpy(to_crop(points, crop, size))}
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


def person_crop(image: Tensor, box_xywh, patch: int, scale: float = 1.0, square=None) -> tuple[Tensor, dict]:
    """The crop that the pose head wants of a person's box in image (3, H, W) uint8, and what it must know."""
    size = crop_size(patch, scale, square)
    crop = region(box_xywh, size[1] / size[0])
    known = {"orig_size": tuple(image.shape[1:]), "size": size, "score": 1.0}
    return warp(image, crop, size), {**known, "crop_cxcywh": torch.from_numpy(crop)}
