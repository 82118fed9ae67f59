"""The training stream and the evaluation images of each in-domain task (Table 1), by task name."""

from data.coco import CocoStream, Detection, Panoptic, Segmentation, read_ids
from data.pose import PersonBoxes, Pose
from data.validation import Images

STREAMS = {"detection": Detection, "segmentation": Segmentation, "panoptic": Panoptic, "pose": Pose}


def open_stream(task: str, args) -> CocoStream:
    """A task's stream as the options of both stages describe it."""
    exclude = read_ids(args.exclude_images) if args.exclude_images else set()
    sizes = dict(scale=args.image_scale, fraction=args.data_fraction)
    return STREAMS[task](
        args.coco, args.split, args.seed, **sizes, exclude=exclude, skip_bad=args.skip_bad_images
    )


def open_items(task: str, args) -> Images | PersonBoxes:
    """A task's images, or persons, as the options of eval_heads.py describe them."""
    if task == "pose":
        return PersonBoxes(args.coco, args.split, args.image_scale, args.limit, args.persons)
    return Images(args.coco, task, args.split, args.image_scale, args.limit)
