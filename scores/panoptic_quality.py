"""Panoptic quality as COCO counts it (arXiv 1801.00868, and the rules of its reference implementation).

    counts = sum(image_counts(...) for every image)    # (C, 4)
    panoptic_quality(counts, categories)               # PQ, SQ and RQ of all, things, stuff

A true and a found segment of one category match if their IoU is above 1/2, so each matches one at most. Void
(id 0 in the truth) is no part of a found segment; one that lies for more than half on void, or on a crowd of
its category, is not counted as false; crowds are not counted as missed.
"""

import numpy as np

COUNTS = ("iou", "true positives", "false positives", "false negatives")


def image_counts(
    truth: np.ndarray,
    true_info: list[dict],
    found: np.ndarray,
    found_info: list[dict],
    categories: list[dict],
) -> np.ndarray:
    """(C, 4) float64: the sum of the matches' IoU, true positives, false positives, false negatives.

    truth, found: (h, w) segment ids; true_info, found_info: their segments_info
    Raises ValueError if the two have other sizes, a map and its segments_info have other ids, or a category
    is unknown.
    """
    if truth.shape != found.shape:
        raise ValueError(f"prediction of {found.shape} for an image of {truth.shape} (h, w)")
    label_of = {c["id"]: label for label, c in enumerate(categories)}
    # Work on runs of pixels along which neither map changes: there are far fewer than pixels
    t, p = truth.ravel(), found.ravel()
    first = np.flatnonzero(np.concatenate([[True], (t[1:] != t[:-1]) | (p[1:] != p[:-1])]))
    lengths = np.diff(np.append(first, t.size))
    t_row, t_label = rows(t[first], true_info, label_of, "truth")  # row 0 is void
    p_row, p_label = rows(p[first], found_info, label_of, "prediction")
    shape = len(t_label), len(p_label)
    common = np.bincount(t_row * shape[1] + p_row, lengths, shape[0] * shape[1]).reshape(shape)  # pixels
    t_area, p_area = common.sum(1), common.sum(0)
    crowd = np.array([False, *(bool(s.get("iscrowd", 0)) for s in true_info)])

    same = t_label[:, None] == p_label
    same[0] = same[:, 0] = False
    union = t_area[:, None] + p_area - common - common[0]
    iou = np.divide(common, union, out=np.zeros(shape), where=union > 0)
    match = same & ~crowd[:, None] & (iou > 0.5)
    ignored = common[0] + (common * (same & crowd[:, None])).sum(0)
    missed = ~match.any(1) & ~crowd
    wrong = ~match.any(0) & (ignored <= 0.5 * p_area)
    missed[0] = wrong[0] = False

    counts = np.zeros((len(categories), 4))
    at, which = match.nonzero()
    np.add.at(counts, (t_label[at], 0), iou[at, which])
    for column, labels in ((1, t_label[at]), (2, p_label[wrong]), (3, t_label[missed])):
        np.add.at(counts, (labels, column), 1)
    return counts


def rows(ids: np.ndarray, info: list[dict], label_of: dict, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Each id's row, 0 for void, k for the k-th of info; and the rows' labels, -1 for void."""
    unknown = [s["category_id"] for s in info if s["category_id"] not in label_of]
    if unknown:
        raise ValueError(f"{what}: unknown category id {unknown[0]}")
    known = np.array([0, *(s["id"] for s in info)])
    order = np.argsort(known, kind="stable")
    place = np.searchsorted(known[order], ids).clip(max=len(known) - 1)
    row = order[place]
    if (known[row] != ids).any():
        raise ValueError(f"{what}: segment {ids[known[row] != ids][0]} is not in its segments_info")
    absent = np.setdiff1d(np.arange(1, len(known)), row)
    if len(absent):
        raise ValueError(f"{what}: no pixel has the id of segment {known[absent[0]]}")
    return row, np.array([-1, *(label_of[s["category_id"]] for s in info)])


def panoptic_quality(counts: np.ndarray, categories: list[dict]) -> dict[str, np.ndarray]:
    """From counts (..., C, 4): "PQ", "SQ", "RQ", and "PQ things", ..., "RQ stuff", each (...), in [0, 1].

    Means over the categories that occur, in the truth or the predictions; 0 where none does.
    """
    iou, tp, fp, fn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)  # (..., C) each
    occurs = tp + fp + fn > 0
    rq = tp / np.where(occurs, tp + (fp + fn) / 2, 1)
    sq = iou / np.where(tp > 0, tp, 1)
    thing = np.array([bool(c.get("isthing", True)) for c in categories])
    answer = {}
    for name, of in (("", thing | ~thing), (" things", thing), (" stuff", ~thing)):
        n = (occurs & of).sum(-1)
        for kind, value in (("PQ", sq * rq), ("SQ", sq), ("RQ", rq)):
            answer[kind + name] = (value * (occurs & of)).sum(-1) / np.maximum(n, 1)
    return answer


def paired_intervals(
    before: np.ndarray, after: np.ndarray, categories: list[dict], seed: int, resamples: int = 1000
) -> dict[str, tuple[float, float]]:
    """{metric: the ends of 95% of after - before}, by a paired bootstrap over the images.

    before, after: (n, C, 4), the counts of the same n images
    """
    n, rng, scores = len(before), np.random.default_rng(seed), []
    draws = rng.multinomial(n, np.full(n, 1 / n), size=resamples) * 1.0  # how often each image is drawn
    for counts in (before, after):
        drawn = (draws @ counts.reshape(n, -1)).reshape(resamples, *counts.shape[1:])
        scores.append(panoptic_quality(drawn, categories))
    ends = {k: np.percentile(scores[1][k] - scores[0][k], (2.5, 97.5)) for k in scores[0]}
    return {k: (float(low), float(high)) for k, (low, high) in ends.items()}
