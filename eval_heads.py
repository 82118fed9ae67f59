"""In-domain evaluation: what a task head T_n* scores on COCO val, on M as it was and on M with dW*.

    torchrun --nproc_per_node 8 eval_heads.py --task detection --compare out/visft/lora_005000.safetensors
    python eval_heads.py --task captioning --head out/captioning/captioning.safetensors --lora none

detection: box AP; segmentation: mask AP; panoptic: PQ, SQ, RQ; pose: keypoint AP; captioning: CIDEr and
BLEU-4 of decoded captions. Writes OUT/result.json and OUT/predictions_{before,after}.json in COCO's format.
"""

import argparse
import contextlib
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import backbone as vit
import caption_scores
import common
import evaluation
import heads
import panoptic_quality
from data import coco
from data.streams import open_items
from heads import by_task, detr, mask2former, pose


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--task", choices=by_task.HEADS, required=True, help="whose head (Table 1)")
    add("--head", default="out", help="a head file, or a folder with [TASK/]TASK.safetensors")
    add("--coco", default="coco", help="folder that holds annotations/ and val2017/")
    add("--split", default="val2017", help="which of its images and annotations")
    add("--image-scale", type=float, default=1.0, help="times the release's sizes, as the head was trained")
    add("--persons", metavar="FILE", help="pose: a detector's boxes, COCO results (default: the true boxes)")
    add("--fast-eval", action="store_true", help="AP by faster-coco-eval, not by pycocotools")
    evaluation.add_backbone_options(p)
    evaluation.add_options(p, out=None, batch=1)
    args = p.parse_args()
    args.out = args.out or f"out/eval_{args.task}"
    variants = evaluation.check_options(args)
    if not 0 < args.image_scale <= 2:
        raise ValueError(f"--image-scale must be in (0, 2], got {args.image_scale}")
    if args.persons and args.task != "pose":
        raise ValueError(f"--persons is for --task pose, not {args.task}")
    if args.persons and not Path(args.persons).is_file():
        raise FileNotFoundError(f"--persons {args.persons}: no such file")
    head_file = heads.find([args.head], args.task, common.features_of(args))
    coco.annotation_file(args.coco, args.task, args.split)

    # --- setup
    ranks = common.start(args)
    say = partial(print, flush=True) if ranks.rank == 0 else lambda *_, **__: None

    # --- data
    items = open_items(args.task, args)
    say(*items.notes, sep="\n")

    # --- model
    backbone = vit.load(args.model, args.weights, ranks.dtype, ranks.device, args.seed, not args.no_cls)
    if args.imagenet_norm:
        backbone.mean, backbone.std = vit.IMAGENET_NORM
    become = evaluation.attach(backbone.vit, args)
    head = by_task.load(head_file, backbone.dim).to(ranks.device)
    scorer = SCORERS[args.task](items, head, args)
    if items.categories:
        by_task.check_classes(head, items.categories, head_file)
    items.patch = backbone.patch
    collate = partial(items.collate, patch=backbone.patch, mean=backbone.mean, std=backbone.std)
    loader = evaluation.loader(items, args, ranks, collate)

    # --- loop
    found = {}
    for variant in variants:
        become(variant)
        mine = {}
        for batch in tqdm(loader, desc=variant, disable=ranks.rank > 0, dynamic_ncols=True):
            if isinstance(batch, Exception):
                raise batch
            images, valid, y = common.to_device(batch, ranks.device)
            with torch.no_grad(), ranks.autocast():
                f = backbone(images, valid)
            for t, answer in zip(y, head.predict(f, y), strict=True):
                mine[t["item"]] = scorer.keep(answer, variant)
        answers = evaluation.gather(mine)
        assert len(answers) == len(items), f"{len(answers)} of {len(items)} items were answered"
        found[variant] = list(answers.values())

    # --- save
    if ranks.rank == 0:
        out, scores, per_image = Path(args.out), {}, {}
        for variant in variants:
            predictions, scores[variant], per_image[variant] = scorer.score(found[variant])
            evaluation.write(out / f"predictions_{variant}.json", json.dumps(predictions))
        intervals = scorer.intervals(**per_image) if args.compare else {}
        n = len(items.image_ids)
        rows = [row(args.split, metric, scores, intervals.get(metric), n) for metric in scores[variants[0]]]
        say(evaluation.table(list(rows[0]), [list(r.values()) for r in rows]), *scorer.notes, sep="\n")
        result = {"task": args.task, "rows": rows, "notes": [*items.notes, *scorer.notes]}
        evaluation.write_result(
            args, result, [str(head_file), args.weights, args.lora, str(items.annotations)]
        )


def row(split: str, metric: str, scores: dict, interval: tuple | None, n: int) -> dict:
    """A line of the result, in percent points; None where there is no score: no such object, no --compare."""
    before, after = (scores.get(variant, {}).get(metric) for variant in ("before", "after"))
    both = before is not None and after is not None
    low, high = interval or (None, None)
    difference = after - before if both else None
    return dict(
        set=split, metric=metric, before=before, after=after, difference=difference, low=low, high=high, n=n
    )


# --- scoring
#
# keep(answer of head.predict, variant) -> what the ranks gather
# score([kept]) -> COCO results, {metric: percent}, what each image contributes
# intervals(before, after), of the latter -> {metric: (low, high) of the difference in percent points}


class AveragePrecision:
    """COCO's AP and AR of boxes, masks or keypoints."""

    def __init__(self, kind: str, to_coco_results, items, head, args):
        self.kind, self.to_coco_results, self.items, self.args = kind, to_coco_results, items, args
        self.categories = head.config["categories"]
        self.notes = [f"AP by {'faster-coco-eval' if args.fast_eval else 'pycocotools'}"]

    def keep(self, answer: dict, variant: str) -> list[dict]:
        return self.to_coco_results([answer], self.categories)

    def score(self, kept: list) -> tuple[list[dict], dict, None]:
        results = [r for results in kept for r in results]
        ids, fast = self.items.image_ids, self.args.fast_eval
        return results, average_precision(self.items.annotations, results, self.kind, ids, fast), None

    def intervals(self, before: None, after: None) -> dict:
        return {}  # AP is no sum or mean over images


class KeypointAveragePrecision(AveragePrecision):
    """The same; which persons are the same one is seen only when all of an image are there."""

    def keep(self, answer: dict, variant: str) -> dict:
        return answer

    def score(self, kept: list) -> tuple[list[dict], dict, None]:
        return super().score([self.to_coco_results(kept, self.categories)])


def average_precision(
    annotations, results: list[dict], kind: str, image_ids: list, fast: bool = False
) -> dict:
    """{metric: percent, None where nothing of that size is annotated}: COCO's 12 figures, 10 of keypoints.

    annotations: a COCO file; results: in COCO's format; kind: bbox, segm, keypoints
    Raises ValueError naming images or categories of the results that the annotations do not have.
    """
    if fast:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # they talk
        truth = COCO(str(annotations))
        evaluation.check_images((), {r["image_id"] for r in results} - set(truth.imgs))
        if unknown := {r["category_id"] for r in results} - set(truth.cats):
            raise ValueError(f"{annotations} has no category {', '.join(map(str, sorted(unknown)))}")
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


class PanopticQuality:
    """PQ, SQ and RQ; each image is counted, and written to OUT as a PNG, as soon as it is predicted."""

    notes = ("PQ: our own count by COCO's rules; intervals: 95%, paired bootstrap over images",)

    def __init__(self, items, head, args):
        content = coco.read_json(items.annotations, ("annotations",))
        self.truth = {a["image_id"]: a for a in content["annotations"]}
        self.image_ids, self.pngs, self.out = (
            items.image_ids,
            items.annotations.with_suffix(""),
            Path(args.out),
        )
        self.categories, self.seed = head.config["categories"], args.seed

    def keep(self, answer: dict, variant: str) -> tuple[dict, np.ndarray]:
        evaluation.check_images((), {answer["image_id"]} - set(self.truth))
        truth = self.truth[answer["image_id"]]
        segments = panoptic_quality.read_segments(self.pngs / truth["file_name"])
        found = answer["segments"].cpu().numpy()
        infos = truth["segments_info"], answer["segments_info"]
        try:
            counts = panoptic_quality.image_counts(segments, infos[0], found, infos[1], self.categories)
        except ValueError as error:
            raise ValueError(f"{self.pngs / truth['file_name']}: {error}") from error
        folder = self.out / f"predictions_{variant}"
        folder.mkdir(parents=True, exist_ok=True)
        return mask2former.write_panoptic(answer, folder), counts

    def score(self, kept: list) -> tuple[dict, dict, np.ndarray]:
        evaluation.check_images(self.image_ids, {annotation["image_id"] for annotation, _ in kept})
        annotations, counts = zip(*kept, strict=True)
        scores = panoptic_quality.panoptic_quality(sum(counts), self.categories)
        predictions = {"annotations": list(annotations), "categories": self.categories}
        return predictions, {k: 100 * float(v) for k, v in scores.items()}, np.stack(counts)

    def intervals(self, before: np.ndarray, after: np.ndarray) -> dict:
        n, rng, scores = len(before), np.random.default_rng(self.seed), []
        draws = rng.multinomial(n, np.full(n, 1 / n), size=1000) * 1.0  # how often each image is drawn
        for counts in (before, after):  # (n, C, 4)
            drawn = (draws @ counts.reshape(n, -1)).reshape(len(draws), *counts.shape[1:])
            scores.append(panoptic_quality.panoptic_quality(drawn, self.categories))
        ends = {k: np.percentile(scores[1][k] - scores[0][k], (2.5, 97.5)) for k in scores[0]}
        return {k: (100 * float(low), 100 * float(high)) for k, (low, high) in ends.items()}


class CaptionScores:
    """CIDEr and BLEU-4 of the captions that the head decodes."""

    def __init__(self, items, head, args):
        content = coco.read_json(items.annotations, ("annotations",))
        self.references = {i: [] for i in items.image_ids}
        for a in content["annotations"]:
            if a["image_id"] in self.references:
                self.references[a["image_id"]].append(a["caption"])
        self.notes, self.seed = [], args.seed

    def keep(self, answer: dict, variant: str) -> dict:
        return {"image_id": answer["image_id"], "caption": answer["caption"]}

    def score(self, kept: list) -> tuple[list[dict], dict, list[float]]:
        candidates = {k["image_id"]: k["caption"] for k in kept}
        scores = caption_scores.caption_scores(self.references, candidates)
        self.notes, per_image = scores.pop("notes"), scores.pop("per_image")
        names = {"cider": "CIDEr", "bleu4": "BLEU-4"}  # not without Java
        return kept, {names.get(k, k): 100 * v for k, v in scores.items()}, list(per_image.values())

    def intervals(self, before: list[float], after: list[float]) -> dict:
        ends = evaluation.paired(before, after, self.seed)
        return {name: (100 * ends["low"], 100 * ends["high"]) for name in ("CIDEr", "cider_simple_tok")}


SCORERS = {  # by task
    "detection": partial(AveragePrecision, "bbox", detr.to_coco_results),
    "segmentation": partial(AveragePrecision, "segm", mask2former.to_coco_results),
    "panoptic": PanopticQuality,
    "captioning": CaptionScores,
    "pose": partial(KeypointAveragePrecision, "keypoints", pose.to_coco_results),
}


if __name__ == "__main__":
    common.launch(main)
