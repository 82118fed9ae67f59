"""COCO's images to evaluate on: each once, in the order of their ids, not augmented."""

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from data import coco

ALSO = {"panoptic": ("isthing",)}  # what a category has beside id and name


class Images(Dataset):
    """items[i] -> image (3, h, w) uint8, target: item i, image_id, orig_size, size.

    Images without annotations are evaluated in detection and segmentation (whatever is found there is wrong);
    they have no truth in panoptic segmentation and captioning, and are left out with a note.
    Raises ValueError, FileNotFoundError as data.coco's readers.
    """

    collate = staticmethod(coco.collate)

    def __init__(self, folder, task, split, scale=1.0, limit=None):
        path = self.annotations = coco.annotation_file(folder, task, split)
        needed = ("images", "annotations") + ("categories",) * (task != "captioning")
        content = coco.read_json(path, needed)
        try:
            images = sorted(content["images"], key=lambda image: image["id"])
            annotated = {a["image_id"] for a in content["annotations"]}
            keys = ("id", "name", *ALSO.get(task, ()))
            categories = sorted(content.get("categories", []), key=lambda c: c["id"])
            self.categories = [{k: c[k] for k in keys} for c in categories]
            for c in self.categories:
                c.update({k: bool(c[k]) for k in ALSO.get(task, ())})
            left = [i for i in images if i["id"] in annotated or task in ("detection", "segmentation")]
            self.images = [(i["id"], i["file_name"], (i["height"], i["width"])) for i in left][:limit]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not COCO's: {type(error).__name__}: {error}") from error
        self.folder, self.task, self.scale, self.patch = Path(folder) / split, task, scale, 1
        if not self.images:
            raise ValueError(f"{path}: none of its {len(images)} images is annotated: nothing to evaluate")
        self.image_ids = [image_id for image_id, *_ in self.images]
        coco.check_on_disk(path, self.folder, [name for _, name, _ in self.images])
        self.notes = [f"{path}: {len(images)} images, {len(images) - len(left)} without annotation left out"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        image_id, name, size = self.images[i]
        try:
            image = coco.decode(self.folder / name, size)
        except coco.BadImage as error:
            return error
        resized, target = prepare(image, self.task, self.patch, self.scale)
        return resized, {"item": i, "image_id": image_id, **target}


def prepare(image: Tensor, task: str, patch: int, scale: float = 1.0) -> tuple[Tensor, dict]:
    """image (3, H, W) uint8 at the size at which a task is evaluated, and its target: orig_size, size.

    scale: as --image-scale of the stages
    """
    h, w = orig_size = tuple(image.shape[1:])
    if task == "captioning":  # squashed to a square of whole patches, as for training
        size = (max(1, round(scale * 256 / patch)) * patch,) * 2
    else:
        # The release's sizes in pixels. Detection: short side 800 but the long one at most 672, so always 672
        long = max(1, round(scale * 672))
        if task != "detection":  # fitted into the square of training, 1022
            long = max(1, round(scale * coco.Segmentation.side) // patch) * patch
        size = tuple(max(1, round(long * side / max(h, w))) for side in (h, w))
    resized = TF.resize(image, list(size), antialias=True)
    return resized, {"orig_size": orig_size, "size": size}
