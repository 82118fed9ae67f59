"""The training stream and the evaluation images of each in-domain task (Table 1), by task name."""

from pathlib import Path

from data import coco
from data.captions import Captions
from data.coco import CocoStream, Detection, Panoptic, Segmentation, read_ids
from data.pose import PersonBoxes, Pose
from data.validation import Images

STREAMS = {
    "detection": Detection,
    "segmentation": Segmentation,
    "panoptic": Panoptic,
    "captioning": Captions,
    "pose": Pose,
}


def annotation_file(task: str, args) -> Path:
    """Where a task's annotations are. Raises FileNotFoundError, saying where to get them."""
    if task != "captioning" or not args.captions:
        return coco.annotation_file(args.coco, task, args.split)
    if not Path(args.captions).is_file():
        raise FileNotFoundError(f"--captions {args.captions}: no such file")
    return Path(args.captions)


def open_stream(task: str, args) -> CocoStream:
    """A task's stream as the options of both stages describe it."""
    exclude = read_ids(args.exclude_images) if args.exclude_images else set()
    options = dict(scale=args.image_scale, fraction=args.data_fraction, exclude=exclude)
    if task == "captioning":
        options |= dict(captions=args.captions, min_count=args.min_count)
    return STREAMS[task](args.coco, args.split, args.seed, **options, skip_bad=args.skip_bad_images)


def open_items(task: str, args) -> Images | PersonBoxes:
    """A task's images, or persons, as the options of eval_heads.py describe them."""
    if task == "pose":
        return PersonBoxes(args.coco, args.split, args.image_scale, args.limit, args.persons)
    return Images(args.coco, task, args.split, args.image_scale, args.limit)
