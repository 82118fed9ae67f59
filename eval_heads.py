"""In-domain evaluation: what a task head T_n* scores on COCO val, on M as it was and on M with dW*.

    torchrun --nproc_per_node 8 eval_heads.py --task detection --compare out/visft/lora_005000.safetensors
    python eval_heads.py --task captioning --head out/captioning/captioning.safetensors --lora none

detection: box AP; segmentation: mask AP; panoptic: PQ, SQ, RQ; pose: keypoint AP; captioning: CIDEr and
BLEU-4 of decoded captions. Writes OUT/result.json and OUT/predictions_{before,after}.json in COCO's format.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import evaluation
import files
import tasks
from backbone import add_backbone_options, backbone_settings, check_backbone_options, open_backbone
from data.coco import annotation_file
from ranks import check_finite, gather, launch, refuse_unused, start, to_device


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--task", choices=tasks.NAMES, required=True, help="whose head (Table 1)")
    add("--head", default="out", help="a head file, or a folder with [TASK/]TASK.safetensors")
    add("--coco", default="coco", help="folder that holds annotations/ and val2017/")
    add("--split", default="val2017", help="which of its images and annotations")
    tasks.add_size_options(p, ", as the head was trained")  # --image-scale, --size
    add("--persons", metavar="FILE", help="pose: a detector's boxes, COCO results (default: the true boxes)")
    add_backbone_options(p)  # --model, --weights, --no-cls, --imagenet-norm
    again = "score these predictions instead of asking a head: [before] after"
    add("--results", nargs="+", metavar="FILE", help=again)
    evaluation.add_options(p, out=None, batch=1)  # --lora or --compare, --out, --limit, --batch, ...
    args = p.parse_args()
    args.out = args.out or f"out/eval_{args.task}"
    if args.results:
        names = "head model weights lora compare limit persons no_cls imagenet_norm image_scale size"
        refuse_unused(args, p, names, "with --results: no head is asked")
    variants = evaluation.check_options(args)
    tasks.check_size(args)
    if args.persons and args.task != "pose":
        raise ValueError(f"--persons is for --task pose, not {args.task}")
    if args.persons and not Path(args.persons).is_file():
        raise FileNotFoundError(f"--persons {args.persons}: no such file")
    if args.results:
        variants = ["before", "after"][-len(args.results) :]
        if missing := [f for f in args.results if not Path(f).is_file()] or args.results[2:]:
            raise FileNotFoundError(f"--results {missing[0]}: no such file, or more than two")
    else:
        check_backbone_options(args)
        head_file = tasks.find_head([args.head], args.task, backbone_settings(args) | {"size": args.size})
    annotation_file(args.coco, tasks.find(args.task).kind, args.split)

    # --- setup
    ranks = start(args, p)

    # --- data
    from data.validation import open_items  # torchvision: a second that --help need not wait

    items = open_items(args.task, args)
    ranks.say(*items.notes)
    scorer = open_scorer(args.task, items, args)
    if args.results:
        return report([scorer.read(path) for path in args.results], [], variants, scorer, items, args)

    # --- model
    backbone = open_backbone(args, ranks)
    set_M = evaluation.attach(backbone.vit, args)
    head = tasks.load_head(head_file, backbone.dim).to(ranks.device)
    if items.categories:
        tasks.check_classes(head, items.categories, head_file)
    items.patch = backbone.patch
    collate = partial(items.collate, patch=backbone.patch, mean=backbone.mean, std=backbone.std)
    loader = evaluation.loader(items, args, ranks, collate)

    # --- loop
    answers = {}
    for variant in variants:
        set_M(variant)  # M(x), or M(x; dW*)
        mine = {}
        for batch in tqdm(loader, desc=variant, disable=ranks.rank > 0, dynamic_ncols=True):
            images, valid, y = to_device(batch, ranks.device)
            with torch.no_grad(), ranks.autocast():
                f = backbone(images, valid)
            check_finite(f.grid, y, ranks)
            for t, answer in zip(y, head.predict(f, y), strict=True):
                mine[t["item"]] = scorer.keep(answer, variant)
        everyones = gather(mine, everywhere=False)  # masks: half a GB
        if ranks.rank == 0:
            assert len(everyones) == len(items), f"{len(everyones)} of {len(items)} items were answered"
        answers[variant] = list(everyones.values())

    # --- save
    if ranks.rank == 0:
        predictions = [scorer.predictions(answers[variant]) for variant in variants]
        # Before they are scored: a failed scoring loses nothing
        for variant, content in zip(variants, predictions, strict=True):
            files.write(Path(args.out) / f"predictions_{variant}.json", json.dumps(content))
        kept = [answers[variant] for variant in variants]
        report(predictions, kept, variants, scorer, items, args, [str(head_file), args.weights, args.lora])


def report(predictions: list, kept: list, variants: list[str], scorer, items, args, used=()) -> None:
    """Scores, the table and OUT/result.json. kept: for each variant what the ranks gathered, if they did."""
    if dist.get_rank() > 0:
        return
    scores, per_image = {}, {}
    for k, variant in enumerate(variants):
        told = dict(kept=kept[k]) if kept else dict(folder=Path(args.results[k]).with_suffix(""))
        try:
            scores[variant], per_image[variant] = scorer.score(predictions[k], **told)
        except ValueError as error:
            raise ValueError(f"{args.results[k]}: {error}" if args.results else str(error)) from error
    intervals = scorer.intervals(**per_image) if len(variants) == 2 else {}
    n = len(items.image_ids)
    rows = [score_row(args.split, m, scores, intervals.get(m), n) for m in scores[variants[0]]]
    print(evaluation.table(list(rows[0]), [list(r.values()) for r in rows]), *scorer.notes, sep="\n")
    result = {"task": args.task, "rows": rows, "notes": [*items.notes, *scorer.notes]}
    evaluation.write_result(args, result, [*used, *(args.results or ()), str(items.annotations)])


def score_row(split: str, metric: str, scores: dict, interval: tuple | None, n: int) -> dict:
    """A line of the result, in percent points; None where there is no score: no such object, no --compare."""
    before, after = (scores.get(variant, {}).get(metric) for variant in ("before", "after"))
    difference = None if before is None or after is None else after - before
    low, high = interval or (None, None)
    known = dict(before=before, after=after, difference=difference, low=low, high=high, n=n)
    return dict(set=split, metric=metric, **known)


# --- scoring
#
# keep(answer of head.predict, variant) -> what the ranks gather
# predictions([kept]) -> the same in COCO's format; read(path) -> the same from a file, checked
# score(predictions, kept or the folder of PNGs) -> {metric: percent}, what each image contributes
# intervals(before, after), of the latter -> {metric: (low, high) of the difference in percent points}


def open_scorer(task: str, items, args):
    """Imports what scores this task, and nothing of the others."""
    from heads import coco_results

    match task:
        case "detection":
            return AveragePrecision("bbox", coco_results.box_results, items)
        case "segmentation":
            return AveragePrecision("segm", coco_results.mask_results, items)
        case "panoptic":
            from data.segmentation import read_segments
            from scores import panoptic_quality

            return PanopticQuality(read_segments, coco_results.write_panoptic, panoptic_quality, items, args)
        case "captioning":
            from scores.captions import caption_scores

            return CaptionScores(caption_scores, items, args)
        case "pose":
            return KeypointAveragePrecision("keypoints", coco_results.keypoint_results, items)


class AveragePrecision:
    """COCO's AP and AR of boxes, masks or keypoints."""

    notes = ("AP by pycocotools",)

    def __init__(self, kind: str, to_results, items):
        self.kind, self.to_results, self.items, self.categories = kind, to_results, items, items.categories

    def keep(self, answer: dict, variant: str) -> list[dict]:
        return self.to_results([answer], self.categories)

    def predictions(self, kept: list) -> list[dict]:
        return [result for results in kept for result in results]

    def read(self, path: str) -> list[dict]:
        from data.validation import read_results

        return read_results(path, self.kind, self.items.truth)

    def score(self, predictions: list[dict], kept=None, folder=None) -> tuple[dict, None]:
        from scores.average_precision import average_precision

        ids, sigmas = self.items.image_ids, self.categories[0].get("sigmas") if self.categories else None
        return average_precision(self.items.truth, predictions, self.kind, ids, sigmas), None

    def intervals(self, before: None, after: None) -> dict:
        return {}  # AP is no sum or mean over images


class KeypointAveragePrecision(AveragePrecision):
    """The same; which persons are the same one is seen only when all of an image are there."""

    def keep(self, answer: dict, variant: str) -> dict:
        return answer

    def predictions(self, kept: list) -> list[dict]:
        return self.to_results(kept, self.categories)


class PanopticQuality:
    """PQ, SQ and RQ; each image is counted, and written to OUT as a PNG, as soon as it is predicted.

    read_segments, write_panoptic: PNGs in and out; quality: the module that counts and scores
    """

    notes = ("PQ: our own count by COCO's rules; intervals: 95%, paired bootstrap over images",)

    def __init__(self, read_segments, write_panoptic, quality, items, args):
        self.read_segments, self.write_panoptic, self.quality = read_segments, write_panoptic, quality
        self.truth, self.image_ids, self.categories = items.truth, items.image_ids, items.categories
        self.pngs, self.out, self.seed = items.annotations.with_suffix(""), Path(args.out), args.seed

    def keep(self, answer: dict, variant: str) -> tuple[dict, np.ndarray]:
        counts = self.count(answer, answer["segments"].cpu().numpy())
        folder = self.out / f"predictions_{variant}"
        folder.mkdir(parents=True, exist_ok=True)
        return self.write_panoptic(answer, folder), counts

    def count(self, predicted: dict, segments: np.ndarray) -> np.ndarray:
        if predicted["image_id"] not in self.truth:
            what = "1 images are predicted for, but are not in the annotations"
            raise ValueError(f"{what}: {predicted['image_id']}")
        truth = self.truth[predicted["image_id"]]
        png, infos = self.pngs / truth["file_name"], (truth["segments_info"], predicted["segments_info"])
        try:
            true = self.read_segments(png)
            return self.quality.image_counts(true, infos[0], segments, infos[1], self.categories)
        except ValueError as error:
            raise ValueError(f"{png}: {error}") from error

    def predictions(self, kept: list) -> dict:
        return {"annotations": [annotation for annotation, _ in kept], "categories": self.categories}

    def read(self, path: str) -> dict:
        from data.validation import read_panoptic_results

        return {"annotations": read_panoptic_results(path, self.image_ids)}

    def score(self, predictions: dict, kept=None, folder: Path | None = None) -> tuple[dict, np.ndarray]:
        annotations = predictions["annotations"]
        if missing := set(self.image_ids) - {a["image_id"] for a in annotations}:
            raise ValueError(f"{len(missing)} images have no prediction: {min(missing)}")
        if kept is None:
            kept = [(a, self.count(a, self.read_segments(folder / a["file_name"]))) for a in annotations]
        counts = [counts for _, counts in kept]  # n of (C, 4)
        scores = self.quality.panoptic_quality(sum(counts), self.categories)
        return {k: 100 * float(v) for k, v in scores.items()}, np.stack(counts)

    def intervals(self, before: np.ndarray, after: np.ndarray) -> dict:
        ends = self.quality.paired_intervals(before, after, self.categories, self.seed)
        return {metric: (100 * low, 100 * high) for metric, (low, high) in ends.items()}


class CaptionScores:
    """CIDEr and BLEU-4 of the captions that the head decodes."""

    def __init__(self, caption_scores, items, args):
        self.caption_scores = caption_scores
        self.references = {i: items.truth[i] for i in items.image_ids}
        self.notes, self.seed = [], args.seed

    def keep(self, answer: dict, variant: str) -> dict:
        return {"image_id": answer["image_id"], "caption": answer["caption"]}

    def predictions(self, kept: list) -> list[dict]:
        return kept

    def read(self, path: str) -> list[dict]:
        rows = files.Items(path, files.read_json(path), "results")
        pairs = zip(rows.ids("image_id"), rows.column("caption", str), strict=True)
        return [{"image_id": image_id, "caption": caption} for image_id, caption in pairs]

    def score(self, predictions: list[dict], kept=None, folder=None) -> tuple[dict, list[float]]:
        scores = self.caption_scores(self.references, {p["image_id"]: p["caption"] for p in predictions})
        self.notes, per_image = scores.pop("notes"), scores.pop("per_image")
        names = {"cider": "CIDEr", "bleu4": "BLEU-4"}  # not without Java
        return {names.get(k, k): 100 * v for k, v in scores.items()}, list(per_image.values())

    def intervals(self, before: list[float], after: list[float]) -> dict:
        ends = evaluation.paired(before, after, self.seed)
        return {name: (100 * ends["low"], 100 * ends["high"]) for name in ("CIDEr", "cider_simple_tok")}


if __name__ == "__main__":
    launch(main)
