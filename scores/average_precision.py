"""COCO's average precision and recall of boxes, masks or keypoints, by pycocotools."""

import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def average_precision(annotations, results: list[dict], kind: str, image_ids: list) -> dict:
    """{metric: percent, None where nothing of that size is annotated}: COCO's 12 figures, 10 of keypoints.

    annotations: a COCO file; results: in COCO's format; kind: bbox, segm, keypoints
    Raises ValueError naming images or categories of the results that the annotations do not have.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # they talk
        truth = COCO(str(annotations))
        if stray := sorted({r["image_id"] for r in results} - set(truth.imgs)):
            what = "images are predicted for, but are not in the annotations"
            raise ValueError(f"{len(stray)} {what}: {', '.join(map(str, stray[:5]))}")
        if stray := sorted({r["category_id"] for r in results} - set(truth.cats)):
            raise ValueError(f"{annotations} has no category {', '.join(map(str, stray[:5]))}")
        nothing = COCO()
        nothing.dataset = {**truth.dataset, "annotations": []}
        nothing.createIndex()
        found = truth.loadRes([dict(r) for r in results]) if results else nothing  # it adds to them
        judge = COCOeval(truth, found, kind)
        judge.params.imgIds = sorted(image_ids)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    if kind == "keypoints":
        names = ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]
    what = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}[kind]
    stats = [float(v) for v in judge.stats[: len(names)]]
    return {f"{what} {k}": 100 * v if v >= 0 else None for k, v in zip(names, stats, strict=True)}
