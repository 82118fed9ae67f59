"""Panoptic quality: cases worked by hand, a literal count over sets of pixels, real annotations."""

import json

import numpy as np
import pytest
from PIL import Image

from data.segmentation import read_segments
from scores import panoptic_quality as pq

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": True},
    {"id": 3, "name": "car", "isthing": True},
    {"id": 9, "name": "sky", "isthing": False},
]


def info(*segments) -> list[dict]:
    """Each (id, category_id) or (id, category_id, iscrowd)."""
    return [dict(zip(("id", "category_id", "iscrowd"), s, strict=False)) for s in segments]


def line(**runs) -> np.ndarray:
    """line(a5=10, b7=20): ten pixels of id 5, then twenty of id 7."""
    return np.concatenate([np.full(n, int(name[1:])) for name, n in runs.items()])[None].astype(np.int32)


PERSON, CAR, SKY = (1, 0, 0), (0, 1, 0), (0, 0, 1)
CASES = {
    # truth, its info, prediction, its info, expected rows for (person, car, sky): iou, tp, fp, fn
    "a match of IoU 6 / 9": (line(a5=9, b0=0, c6=11), [(5, 1), (6, 9)], line(a1=6, b2=14), [(1, 1), (2, 9)],
                             [(6 / 9, 1, 0, 0), (0, 0, 0, 0), (11 / 14, 1, 0, 0)]),
    "IoU of exactly 1/2 is none": (line(a5=10, b6=10), [(5, 1), (6, 9)], line(a1=5, b2=15), [(1, 1), (2, 9)],
                                   [(0, 0, 1, 1), (0, 0, 0, 0), (10 / 15, 1, 0, 0)]),
    "another category never matches": (line(a5=20), [(5, 1)], line(a1=20), [(1, 3)],
                                       [(0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 0, 0)]),
    "void is no part of the union": (line(a5=10, b0=10), [(5, 1)], line(a1=18, b0=2), [(1, 1)],
                                     [(1, 1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)]),
    "mostly on void is not false": (line(a0=11, b5=9), [(5, 9)], line(a1=20), [(1, 1)],
                                    [(0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1)]),
    "half on void is false": (line(a0=10, b5=10), [(5, 9)], line(a1=20), [(1, 1)],
                              [(0, 0, 1, 0), (0, 0, 0, 0), (0, 0, 0, 1)]),
    "a crowd is not missed": (line(a5=20), [(5, 1, 1)], line(a0=20), [], [(0, 0, 0, 0)] * 3),
    "mostly on its crowd is not false": (line(a5=11, b6=9), [(5, 1, 1), (6, 9)], line(a1=20), [(1, 1)],
                                         [(0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1)]),
    "another's crowd is no excuse": (line(a5=11, b6=9), [(5, 3, 1), (6, 9)], line(a1=20), [(1, 1)],
                                     [(0, 0, 1, 0), (0, 0, 0, 0), (0, 0, 0, 1)]),
    "void and crowd add up": (line(a5=6, b0=6, c6=8), [(5, 1, 1), (6, 9)], line(a1=20), [(1, 1)],
                              [(0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1)]),
    "a crowd matches none": (line(a5=20), [(5, 1, 1)], line(a1=10, b2=10), [(1, 1), (2, 3)],
                             [(0, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 0)]),
    "nothing found": (line(a5=10, b6=10), [(5, 1), (6, 3)], line(a0=20), [],
                      [(0, 0, 0, 1), (0, 0, 0, 1), (0, 0, 0, 0)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_counts_by_hand(case):
    truth, true_info, found, found_info, expected = CASES[case]
    counts = pq.image_counts(truth, info(*true_info), found, info(*found_info), CATEGORIES)
    np.testing.assert_allclose(counts, expected, rtol=1e-12)


def test_quality_by_hand():
    """person: 1.5 IoU in 2 matches, 1 false, 1 missed: SQ 3/4, RQ 2/3; car: one missed; no sky at all."""
    counts = np.array([[1.5, 2, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    scores = pq.panoptic_quality(counts, CATEGORIES)
    expected = {"PQ": 1 / 4, "SQ": 3 / 8, "RQ": 1 / 3, "PQ stuff": 0, "SQ stuff": 0, "RQ stuff": 0}
    expected |= {f"{k} things": expected[k] for k in ("PQ", "SQ", "RQ")}
    assert scores == pytest.approx(expected)
    twice = pq.panoptic_quality(np.stack([counts, 2 * counts]), CATEGORIES)
    assert twice["PQ"] == pytest.approx([1 / 4, 1 / 4])


def literal_counts(truth, true_info, found, found_info) -> np.ndarray:
    """The definition, over sets of pixels."""
    row = {c["id"]: i for i, c in enumerate(CATEGORIES)}
    counts, pixels = np.zeros((3, 4)), lambda ids, i: set(np.flatnonzero(ids == i).tolist())
    void, matched = pixels(truth, 0), set()
    for t in true_info:
        if t["iscrowd"]:
            continue
        a, hit = pixels(truth, t["id"]), False
        for p in found_info:
            b = pixels(found, p["id"])
            iou = len(a & b) / len(a | (b - void))
            if p["category_id"] == t["category_id"] and iou > 0.5:
                hit, _ = True, matched.add(p["id"])
                counts[row[t["category_id"]], :2] += iou, 1
        counts[row[t["category_id"]], 3] += not hit
    for p in found_info:
        b, excuse = pixels(found, p["id"]), set(void)
        for t in true_info:
            if t["iscrowd"] and t["category_id"] == p["category_id"]:
                excuse |= pixels(truth, t["id"])
        if p["id"] not in matched and len(b & excuse) <= len(b) / 2:
            counts[row[p["category_id"]], 2] += 1
    return counts


def random_segments(rng, size: int) -> tuple[np.ndarray, list[dict]]:
    ids = np.zeros((size, size), np.int32)
    for _ in range(9):
        y, x, h, w = rng.integers(1, size, 4)
        ids[y : y + h, x : x + w] = rng.choice([0, 7, 300, 70000, 2**24 - 1, 12])
    known = [int(i) for i in np.unique(ids) if i]
    return ids, [
        {"id": i, "category_id": int(rng.choice([1, 3, 9])), "iscrowd": int(rng.random() < 0.2)}
        for i in known
    ]


def test_counts_are_the_definition():
    rng, total = np.random.default_rng(0), 0
    for _ in range(60):
        truth, true_info = random_segments(rng, 12)
        found, found_info = random_segments(rng, 12)
        copied = rng.random(truth.shape) < 0.7  # so that some match
        found_info += [{**s, "id": s["id"] + 1} for s in true_info]
        found = np.where(copied & (truth > 0), truth + 1, found)
        found_info = [s for s in found_info if (found == s["id"]).any()]
        if len({s["id"] for s in found_info}) < len(found_info):
            continue
        ours = pq.image_counts(truth, true_info, found, found_info, CATEGORIES)
        np.testing.assert_allclose(ours, literal_counts(truth, true_info, found, found_info), rtol=1e-12)
        total += ours.sum(0)
    assert (total > 20).all(), total  # every kind of outcome was there


def test_real_truth_against_itself_is_1(real_coco):
    content = json.loads((real_coco / "annotations" / "panoptic_val2017.json").read_text())
    counts, crowds = 0, 0
    for a in content["annotations"]:
        ids = read_segments(real_coco / "annotations" / "panoptic_val2017" / a["file_name"])
        things = [s for s in a["segments_info"] if not s["iscrowd"]]
        crowds += len(a["segments_info"]) - len(things)
        found = np.where(np.isin(ids, [s["id"] for s in things]), ids, 0)
        assert all((ids == s["id"]).sum() == s["area"] for s in a["segments_info"])
        counts += pq.image_counts(ids, a["segments_info"], found, things, content["categories"])
    assert crowds > 0 and counts[:, 1].sum() == 50 - crowds
    assert all(v == 1.0 for v in pq.panoptic_quality(counts, content["categories"]).values())


def test_ids_of_a_png(tmp_path):
    Image.fromarray(np.array([[[1, 2, 3], [255, 0, 0]]], np.uint8)).save(tmp_path / "a.png")
    assert read_segments(tmp_path / "a.png").tolist() == [[1 + 2 * 256 + 3 * 65536, 255]]


@pytest.mark.parametrize(
    "found, found_info, says",
    [
        (line(a1=19), [(1, 1)], "prediction of .* for an image of"),
        (line(a1=20), [(1, 2)], "prediction: unknown category id 2"),
        (line(a1=10, b4=10), [(1, 1)], "prediction: segment 4 is not in its segments_info"),
        (line(a1=20), [(1, 1), (2, 1)], "prediction: no pixel has the id of segment 2"),
    ],
)
def test_bad_predictions_are_named(found, found_info, says):
    with pytest.raises(ValueError, match=says):
        pq.image_counts(line(a5=20), info((5, 1)), found, info(*found_info), CATEGORIES)
