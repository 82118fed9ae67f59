"""COCO's `segmentation`s, checked before pycocotools' C code sees them, which believes all that it is told.

Polygons, [[x, y, x, y, ...], ...] or a flat list for one: each part needs three points or more, an even count
of finite numbers, and stays within FAR times its image's longer side, and FARTHEST; other parts are dropped.
Run lengths, {"size": [h, w], "counts": [...] or LEB128-like text}: what is wrong with these is an error.
"""

import json
from itertools import chain

import numpy as np
from pycocotools import mask as rle

from data.coco import Coco, Objects
from files import Items

FAR, FARTHEST = 10, 1e6  # px; pycocotools walks along every edge in steps of a fifth, counted in 32 bits
CHUNK = 4096  # annotations at once: what is good, nearly all, is checked by numpy


def check(annotations: Items, sizes: np.ndarray, only: np.ndarray | None = None) -> tuple[list, list[str]]:
    """Each annotation's outline less its bad parts, None where none is left; what was dropped, by kind.

    sizes: (N, 2) h, w of the annotations' images; only: the places of those to check
    Raises ValueError naming an annotation with wrong run lengths.
    """
    found, bad = [item.get("segmentation") for item in annotations.items], {}
    far = np.minimum(FAR * sizes.max(1, initial=0).astype(np.float64), FARTHEST)
    places = range(len(found)) if only is None else only.tolist()
    for start in range(0, len(places), CHUNK):
        drawn = [k for k in places[start : start + CHUNK] if type(found[k]) is not dict]
        if not _all_good([found[k] for k in drawn], far[drawn]):
            for k in drawn:
                found[k], faults = _parts(annotations, k, found[k], far[k].item())
                for fault in faults:
                    bad.setdefault(fault, []).append(k)
    for k in places:
        if type(found[k]) is dict and (fault := _wrong_runs(found[k], sizes[k].tolist())):
            annotations.refuse(k, f"its run lengths {fault}")
    path = annotations.path
    notes = [
        f"{path}: {len(k)} parts of outlines dropped, {fault}; the first is of {annotations.where(k[0])}"
        for fault, k in bad.items()
    ]
    return found, notes


def _all_good(outlines: list, far: np.ndarray) -> bool:
    """Whether all of these are polygons without a fault. far: (N,)"""
    if set(map(type, outlines)) != {list} or not all(outlines):
        return False
    parts = list(chain.from_iterable(outlines))
    if set(map(type, parts)) != {list}:
        return False
    lengths = np.array(list(map(len, parts)))
    numbers = list(chain.from_iterable(parts))
    if (lengths < 6).any() or (lengths % 2).any() or not set(map(type, numbers)) <= {int, float}:
        return False
    try:
        values = np.abs(np.array(numbers, np.float64))
    except OverflowError:
        return False
    most = np.maximum.reduceat(values, np.cumsum(lengths) - lengths)  # NaN if one is
    return bool((most <= np.repeat(far, list(map(len, outlines)))).all())


def _parts(annotations: Items, k: int, outline, far: float) -> tuple[list | None, list[str]]:
    """An outline's good parts, or None; what is wrong with each of the others."""
    if outline is None:
        return None, []
    if type(outline) is not list:
        annotations.refuse(k, f"segmentation must be polygons or run lengths, got {outline!r:.60}")
    if outline and list not in map(type, outline):
        outline = [outline]  # one polygon
    faults = [_fault(part, far) for part in outline]
    good = [part for part, fault in zip(outline, faults, strict=True) if not fault]
    return good or None, [fault for fault in faults if fault]


def _fault(part, far: float) -> str | None:
    if type(part) is not list or not {int, float}.issuperset(map(type, part)):
        return "not numbers"
    if len(part) % 2 or len(part) < 6:
        return "an odd count of numbers" if len(part) % 2 else "of fewer than three points"
    if not all(-far <= value <= far for value in part):  # nor is NaN
        return f"not finite, or beyond {FAR} times the image"
    return None


def _wrong_runs(outline: dict, size: list[int]) -> str | None:
    """What is wrong with run lengths for an image of size h, w."""
    if outline.get("size") != size:
        return f"are for an image of {outline.get('size')}, it has {size} (h, w)"
    counts, runs = outline.get("counts"), None
    if type(counts) is str:
        runs = decode(counts)
    elif type(counts) is list and {int}.issuperset(map(type, counts)) and max(counts, default=0) < 2**31:
        runs = np.array(counts, np.int64)
    if runs is None:
        return f"must be whole numbers or COCO's compressed text, got {counts!r:.60}"
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        found = f"{runs.tolist()!s:.60}, which sum to {runs.sum()}"
        return f"must be at least 0 and sum to {size[0]} x {size[1]}, got {found}"
    return None


def decode(text: str) -> np.ndarray | None:
    """The runs of COCO's compressed run lengths, int64; None if the text is none of these.

    5 bits in a character, from 48 on, low ones first; bit 6: more follow; the last one's bit 5 is the sign.
    From the third on, a number is the run's difference from the last but one.
    """
    if not text.isascii():
        return None
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0) + 1
    starts = np.append(0, ends[:-1])
    digits = ends - starts
    if digits.max() > 7:  # 35 bits
        return None
    places = np.arange(len(codes)) - np.repeat(starts, digits)
    runs = np.add.reduceat((codes & 31) << 5 * places, starts)
    runs -= np.where(codes[ends - 1] & 16, 1 << 5 * digits, 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


# --- what pycocotools makes of them


def code(outline: list | dict, h: int, w: int) -> dict:
    """pycocotools' run lengths of a checked outline."""
    if isinstance(outline, list):
        return rle.merge(rle.frPyObjects(outline, h, w))
    return rle.frPyObjects(outline, h, w) if isinstance(outline["counts"], list) else outline


def pack(outlines: list) -> tuple[np.ndarray, np.ndarray]:
    """Outlines as JSON in one buffer, cheap to share with the workers: outline k at ends[k]:ends[k + 1]."""
    texts = [json.dumps(outline).encode() for outline in outlines]
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)])


def truth(file: Coco, objects: Objects, categories: list[dict], **columns: list) -> dict:
    """The data set that pycocotools is given to score against: what was checked, annotations numbered from 1.

    columns: more fields of the annotations
    An area that the file does not tell is that of the mask, or else of the box.
    """
    missing, areas = np.flatnonzero(np.isnan(objects.areas)), objects.areas.tolist()
    outlines, _ = check(file.annotations, file.sizes[file.rows], objects.places[missing])
    for k in missing:
        outline, (h, w) = outlines[objects.places[k]], file.sizes[objects.rows[k]].tolist()
        areas[k] = float(rle.area(code(outline, h, w)) if outline else objects.boxes_xywh[k, 2:].prod())
    ids = file.ids.tolist()
    columns |= {
        "id": list(range(1, len(areas) + 1)),
        "image_id": [ids[row] for row in objects.rows],
        "category_id": [categories[label]["id"] for label in objects.labels],
        "bbox": objects.boxes_xywh.tolist(),
        "area": areas,
        "iscrowd": objects.crowd.astype(int).tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    sizes = zip(ids, file.sizes.tolist(), strict=True)
    return {
        "images": [{"id": image_id, "height": h, "width": w} for image_id, (h, w) in sizes],
        "annotations": [dict(zip(columns, row, strict=True)) for row in rows],
        "categories": categories,
    }
