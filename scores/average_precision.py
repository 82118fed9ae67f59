"""COCO's average precision and recall of boxes, masks or keypoints, by pycocotools."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def average_precision(
    truth: dict, results: list[dict], kind: str, image_ids: list, sigmas: list | None = None
) -> dict:
    """{metric: percent, None where nothing of that size is annotated}: COCO's 12 figures, 10 of keypoints.

    truth: a data set (data.outlines.truth), results: both in COCO's format; kind: bbox, segm, keypoints
    sigmas: of the keypoints, where they are not COCO's 17
    Raises ValueError naming images or categories of the results that the annotations do not have.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # they talk
        true, nothing = COCO(), COCO()
        # It writes into them, and goes by their ids: 0 is no match, and one match is that of all its twins
        annotations = [{**a, "id": k} for k, a in enumerate(truth["annotations"], 1)]
        for data, content in (
            (true, {**truth, "annotations": annotations}),
            (nothing, {**truth, "annotations": []}),
        ):
            data.dataset = content
            data.createIndex()
        if stray := sorted({r["image_id"] for r in results} - set(true.imgs), key=repr):
            what = "images are predicted for, but are not in the annotations"
            raise ValueError(f"{len(stray)} {what}: {', '.join(map(str, stray[:5]))}")
        if stray := sorted({r["category_id"] for r in results} - set(true.cats), key=repr):
            raise ValueError(f"the annotations have no category {', '.join(map(str, stray[:5]))}")
        found = true.loadRes([dict(r) for r in results]) if results else nothing  # it adds to them
        judge = COCOeval(true, found, kind)
        judge.params.imgIds = sorted(image_ids)
        if sigmas:
            judge.params.kpt_oks_sigmas = np.array(sigmas)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    if kind == "keypoints":
        names = ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]
    what = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}[kind]
    stats = [float(v) for v in judge.stats[: len(names)]]
    return {f"{what} {k}": 100 * v if v >= 0 else None for k, v in zip(names, stats, strict=True)}
