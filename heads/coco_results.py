"""What the heads' `predict` returned, in COCO's results formats."""

from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from pycocotools.cocoeval import Params
from torchvision.ops import box_convert

MOST_OKS = 0.9  # of two persons of an image; ViTPose's


def box_results(predictions: list[dict], categories: list[dict]) -> list[dict]:
    """What predict returned, in COCO's results format: one dict for each box, as x, y, w, h."""
    results = []
    for p in predictions:
        boxes, labels, scores = box_convert(p["boxes_xyxy"], "xyxy", "xywh"), p["labels"], p["scores"]
        for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True):
            ids = {"image_id": p["image_id"], "category_id": categories[label]["id"]}
            results.append({**ids, "bbox": box, "score": score})
    return results


def mask_results(predictions: list[dict], categories: list[dict]) -> list[dict]:
    """What predict returned, in COCO's results format: one dict for each instance."""
    results = []
    for p in predictions:
        masks = np.asfortranarray(p["masks"].permute(1, 2, 0).cpu().numpy(), dtype=np.uint8)  # (h, w, n)
        labels, scores = p["labels"].tolist(), p["scores"].tolist()
        for code, label, score in zip(rle.encode(masks), labels, scores, strict=True):
            code["counts"] = code["counts"].decode()
            ids = {"image_id": p["image_id"], "category_id": categories[label]["id"]}
            results.append({**ids, "segmentation": code, "score": score})
    return results


def write_panoptic(prediction: dict, folder: str | Path) -> dict:
    """One answer of predict_panoptic in COCO's format: writes FOLDER/ID.png, returns its annotation."""
    ids = prediction["segments"].cpu().numpy()
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1)  # id = R + 256 G + 256^2 B
    image_id = prediction["image_id"]
    name = f"{image_id:012d}" if isinstance(image_id, int) else quote(image_id, safe="")
    file_name = f"{name}.png"
    Image.fromarray(colours.astype(np.uint8)).save(Path(folder) / file_name)
    header = {"image_id": image_id, "file_name": file_name}
    return {**header, "segments_info": prediction["segments_info"]}


def keypoint_results(predictions: list[dict], categories: list[dict]) -> list[dict]:
    """What predict returned, in COCO's results format: persons that repeat a better one are left out."""
    by_image = {}
    for p in predictions:
        by_image.setdefault(p["image_id"], []).append(p)
    return [
        {
            "image_id": p["image_id"],
            "category_id": categories[0]["id"],
            "keypoints": np.asarray(p["keypoints"], np.float64).flatten().tolist(),
            "score": p["score"],
        }
        for persons in by_image.values()
        for p in oks_nms(persons, categories[0].get("sigmas"))
    ]


def oks_nms(persons: list[dict], sigmas: list | None = None, most: float = MOST_OKS) -> list[dict]:
    """The persons of an image, best first, less those whose OKS with a better one is above `most`.

    sigmas: of the keypoints, where they are not COCO's 17
    """
    persons = sorted(persons, key=lambda p: -p["score"])
    at = np.stack([np.asarray(p["keypoints"], np.float64)[:, :2] for p in persons])  # (n, K, 2)
    areas = np.array([p["area"] for p in persons])
    variances = (2 * np.array(sigmas or Params(iouType="keypoints").kpt_oks_sigmas)) ** 2  # (K,)
    kept, left = [], np.arange(len(persons))
    while len(left):
        best, left = left[0], left[1:]
        kept.append(persons[best])
        squares = ((at[left] - at[best]) ** 2).sum(-1)  # (n, K)
        scale = (areas[left] + areas[best])[:, None] / 2 * variances * 2
        left = left[np.exp(-squares / scale).mean(1) <= most]
    return kept
