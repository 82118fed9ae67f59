"""The training stream of each in-domain task (Table 1), by task name."""

from data.coco import CocoStream, Detection, Panoptic, Segmentation, read_ids

STREAMS = {"detection": Detection, "segmentation": Segmentation, "panoptic": Panoptic}


def open_stream(task: str, args) -> CocoStream:
    """A task's stream as the options of both stages describe it."""
    exclude = read_ids(args.exclude_images) if args.exclude_images else set()
    sizes = dict(scale=args.image_scale, fraction=args.data_fraction)
    return STREAMS[task](
        args.coco, args.split, args.seed, **sizes, exclude=exclude, skip_bad=args.skip_bad_images
    )
