"""COCO 2017 as training streams: `for images, valid, y in batches(dataset, ...)`.

    coco/annotations/instances_train2017.json, panoptic_train2017.json
    coco/train2017/000000000009.jpg
    coco/annotations/panoptic_train2017/000000000009.png

The sample at position p of a task's stream, augmentation included, depends on (seed, task, p) alone: not on
workers, ranks, batches or restarts. So a resumed run goes on by its position, and two processes
read what one would read.
"""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

ANNOTATIONS = {  # which file has those of a task
    "detection": "instances",
    "segmentation": "instances",
    "panoptic": "panoptic",
    "captioning": "captions",
    "pose": "person_keypoints",
}


class BadImage(ValueError):
    """A file that is not the picture its annotations describe."""


@dataclass
class Instances:
    """An instances_*.json, or a panoptic_*.json, as arrays: cheap to share with the workers.

    ids (n,), names n file names, sizes (n, 2) as h, w; boxes_xyxy (N, 4) in pixels and labels (N,) in 0..C-1
    of all images, those of image i at first[i]:first[i + 1]; notes: what was left out and why, for the user;
    outlines: their `segmentation`s as JSON in one buffer, that of annotation k at ends[k]:ends[k + 1];
    segments (N,): panoptic segment ids
    """

    ids: np.ndarray
    names: list[str]
    sizes: np.ndarray
    boxes_xyxy: np.ndarray
    labels: np.ndarray
    first: np.ndarray
    categories: list[dict]
    notes: list[str] = field(default_factory=list)
    outlines: np.ndarray | None = None
    ends: np.ndarray | None = None
    segments: np.ndarray | None = None


def annotation_file(coco: str | Path, task: str, split: str) -> Path:
    """Where COCO's layout has a task's annotations. Raises FileNotFoundError, saying where to get them."""
    path = Path(coco) / "annotations" / f"{ANNOTATIONS[task]}_{split}.json"
    archive = f"{'panoptic_' * (task == 'panoptic')}annotations_trainval2017.zip"
    if not path.is_file():
        raise FileNotFoundError(
            f"--coco {coco}: no {path}; unpack {split}.zip and {archive} of "
            "https://cocodataset.org/#download there"
        )
    return path


def read_json(path: Path, needed: tuple[str, ...]) -> dict:
    """A COCO file's top level. Raises ValueError if it is not JSON or lacks one of the needed lists."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; download it again") from error
    lacks = [k for k in needed if not (isinstance(content, dict) and isinstance(content.get(k), list))]
    if lacks:
        raise ValueError(f"{path} is not a COCO annotation file: no list called {', '.join(lacks)}")
    return content


def read_instances(coco: str | Path, split: str, masks: bool = False) -> Instances:
    """Boxes, classes and, if asked for, masks: crowds left out, unusable annotations left out with a count.

    Raises ValueError for an annotation with an unknown image or category, or a mask of another image's size;
    FileNotFoundError for an image that is not on disk.
    """
    path = annotation_file(coco, "detection", split)
    content = read_json(path, ("images", "annotations", "categories"))
    try:
        categories = sorted(content["categories"], key=lambda c: c["id"])
        categories = [{"id": c["id"], "name": c["name"]} for c in categories]
        label_of = {c["id"]: label for label, c in enumerate(categories)}  # COCO's 1..90 with gaps -> 0..79
        images = sorted(content["images"], key=lambda image: image["id"])
        row_of = {image["id"]: row for row, image in enumerate(images)}
        kept = [a for a in content["annotations"] if not a.get("iscrowd", 0)]
        for a in kept:
            if a["category_id"] not in label_of:
                raise ValueError(f"{path}: annotation {a['id']}: unknown category id {a['category_id']}")
            if a["image_id"] not in row_of:
                raise ValueError(f"{path}: annotation {a['id']}: unknown image id {a['image_id']}")
            box = a["bbox"]
            if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
                raise ValueError(f"{path}: annotation {a['id']}: bbox must be [x, y, w, h], got {box}")
        sizes = np.array([(image["height"], image["width"]) for image in images], np.int32).reshape(-1, 2)
        row = np.array([row_of[a["image_id"]] for a in kept], np.int64)
        xywh = np.array([a["bbox"] for a in kept], np.float64).reshape(-1, 4)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO instances file: {type(error).__name__}: {error}") from error
    check_on_disk(path, Path(coco) / split, [image["file_name"] for image in images])

    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    limit = sizes[row][:, [1, 0, 1, 0]] if len(row) else boxes
    usable = np.isfinite(xywh).all(1) & (xywh[:, 2:] > 0).all(1)
    boxes = np.clip(np.nan_to_num(boxes), 0, limit)
    usable &= (boxes[:, 2:] > boxes[:, :2]).all(1)  # a box beside its image has no area in it
    if masks:
        usable &= [has_mask(a, tuple(sizes[i].tolist()), path) for a, i in zip(kept, row, strict=True)]
    order = np.argsort(row[usable], kind="stable")
    labels = np.array([label_of[a["category_id"]] for a in kept], np.int64)
    data = Instances(
        ids=np.array([image["id"] for image in images], np.int64),
        names=[image["file_name"] for image in images],
        sizes=sizes,
        boxes_xyxy=boxes[usable][order].astype(np.float32),
        labels=labels[usable][order],
        first=np.searchsorted(row[usable][order], np.arange(len(images) + 1)),
        categories=categories,
    )
    if masks:
        outlines = [json.dumps(a["segmentation"]).encode() for a, u in zip(kept, usable, strict=True) if u]
        outlines = [outlines[i] for i in order]
        data.outlines = np.frombuffer(b"".join(outlines), np.uint8)
        data.ends = np.cumsum([0, *map(len, outlines)])
    crowds = len(content["annotations"]) - len(kept)
    data.notes.append(
        f"{path}: {len(images)} images, {usable.sum()} boxes, {crowds} crowd annotations left out"
    )
    if not usable.all():
        first = kept[int(np.argmin(usable))]
        data.notes.append(
            f"{path}: {(~usable).sum()} unusable annotations dropped (NaN, no area, no mask), "
            f"the first {first['id']} of image {first['image_id']}"
        )
    return data


def check_on_disk(path: Path, folder: Path, names: list[str]) -> None:
    """Raises FileNotFoundError if files that the annotations in `path` speak of are not in the folder."""
    found = set(os.listdir(folder)) if folder.is_dir() else set()
    absent = [name for name in names if name not in found]
    if absent:
        raise FileNotFoundError(f"{path}: {len(absent)} of {len(names)} images not in {folder}: {absent[0]}")


def has_mask(annotation: dict, size: tuple[int, int], path: Path) -> bool:
    """Whether it has polygons of three points or more, or an RLE. Raises ValueError for a wrong RLE size."""
    outline = annotation.get("segmentation")
    if isinstance(outline, dict):
        if tuple(outline["size"]) != size:
            where = f"{path}: annotation {annotation['id']} of image {annotation['image_id']}"
            raise ValueError(f"{where}: its RLE is for {outline['size']}, the image is {list(size)} (h, w)")
        return True
    return bool(outline) and all(len(polygon) >= 6 for polygon in outline)


def read_panoptic(coco: str | Path, split: str) -> Instances:
    """The segments of panoptic_*.json, things and stuff: crowds left out. Raises as read_instances does."""
    path = annotation_file(coco, "panoptic", split)
    content = read_json(path, ("images", "annotations", "categories"))
    try:
        categories = sorted(content["categories"], key=lambda c: c["id"])
        categories = [{"id": c["id"], "name": c["name"], "isthing": bool(c["isthing"])} for c in categories]
        label_of = {c["id"]: label for label, c in enumerate(categories)}
        images = {image["id"]: image for image in content["images"]}
        annotations = sorted(content["annotations"], key=lambda a: a["image_id"])
        pictures = [images[a["image_id"]] for a in annotations]
        kept = [[s for s in a["segments_info"] if not s.get("iscrowd", 0)] for a in annotations]
        for a, segments in zip(annotations, kept, strict=True):
            for s in segments:
                if s["category_id"] not in label_of:
                    where = f"{path}: image {a['image_id']}: segment {s['id']}"
                    raise ValueError(f"{where}: unknown category id {s['category_id']}")
        data = Instances(
            ids=np.array([image["id"] for image in pictures], np.int64),
            names=[image["file_name"] for image in pictures],
            sizes=np.array([(image["height"], image["width"]) for image in pictures], np.int32).reshape(
                -1, 2
            ),
            boxes_xyxy=np.zeros((0, 4), np.float32),
            labels=np.array([label_of[s["category_id"]] for segments in kept for s in segments], np.int64),
            first=np.cumsum([0, *map(len, kept)]),
            categories=categories,
            segments=np.array([s["id"] for segments in kept for s in segments], np.int64),
        )
        maps = [a["file_name"] for a in annotations]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO panoptic file: {type(error).__name__}: {error}") from error
    check_on_disk(path, Path(coco) / split, data.names)
    check_on_disk(path, path.with_suffix(""), maps)
    crowds = sum(len(a["segments_info"]) for a in annotations) - len(data.labels)
    data.notes.append(f"{path}: {len(maps)} images, {len(data.labels)} segments, {crowds} crowds left out")
    return data


def read_ids(path: str | Path) -> set[int]:
    """COCO image ids: a JSON list, lines, or the test and val images of a Karpathy dataset_coco.json."""
    text = Path(path).read_text()
    try:
        if Path(path).suffix != ".json":
            return {int(line) for line in text.split()}
        content = json.loads(text)
        if isinstance(content, dict):
            return {int(image["cocoid"]) for image in content["images"] if image["split"] in ("test", "val")}
        return {int(i) for i in content}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: neither image ids nor a Karpathy dataset_coco.json ({error})") from error


def decode(path: Path, size: tuple[int, int]) -> Tensor:
    """(3, h, w) uint8 RGB. Raises BadImage for a file that is truncated, unreadable or not of that size.

    size: h, w; or 0, 0 where the annotations do not tell
    """
    try:
        with Image.open(path) as image:
            pixels = TF.pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImage(f"{path} cannot be decoded ({error}): restore it, or use --skip-bad-images") from error
    if any(size) and tuple(pixels.shape[1:]) != size:
        found, annotated = (f"{w} x {h}" for h, w in (pixels.shape[1:], size))
        raise BadImage(f"{path} is {found} pixels, its annotations say {annotated}")
    return pixels


class DetectionAugmentation:
    """The release's, which is DETR's with the long side at most 672 px.

    Flip half of the images; crop half of them, each side 384..600 px where the image has as much; resize the
    short side to 480..672. `scale` multiplies all these sizes.
    """

    def __init__(self, scale: float = 1.0):
        def px(*sizes: int) -> list[int]:
            return [max(1, round(scale * size)) for size in sizes]

        self.flip = v2.RandomHorizontalFlip(0.5)
        self.resize_before_crop = v2.RandomShortestSize(px(400, 500, 600))
        self.crop_least, self.crop_most = px(384, 600)
        self.resize = v2.RandomShortestSize(px(480, 512, 544, 576, 608, 640, 672), max_size=px(672)[0])

    def __call__(self, image: tv_tensors.Image, boxes: tv_tensors.BoundingBoxes):
        image, boxes = self.flip(image, boxes)
        if torch.rand(()) < 0.5:
            image, boxes = self.resize_before_crop(image, boxes)
            sides = image.shape[1:]
            h, w = (_randint(min(self.crop_least, side), min(self.crop_most, side)) for side in sides)
            top, left = _randint(0, sides[0] - h), _randint(0, sides[1] - w)
            image, boxes = (TF.crop(x, top, left, h, w) for x in (image, boxes))
        return self.resize(image, boxes)


def _randint(least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, ()))


class CocoStream(Dataset):
    """stream[p, patch] -> image (3, h, w) uint8, target: position p of an endless stream of one task.

    A subclass reads the annotations and turns one image into a sample. It sets: folder, ids (n,), names,
    sizes (n, 2), categories, notes (what the user should know), annotations (arrays, for the fingerprint).
    With skip_bad a bad image is passed over for the next one and named in target["skipped"]; else the stream
    returns its error.
    """

    task: str

    def choose(self, seed: int, fraction: float, exclude: set[int], skip_bad: bool) -> None:
        """Fix which images are used: a seeded part of those not excluded. Raises ValueError if none is."""
        rows = np.flatnonzero(~np.isin(self.ids, list(exclude)))
        if len(rows) < len(self.ids):
            self.notes.append(f"{len(self.ids) - len(rows)} images excluded, {len(rows)} left")
        chosen = np.random.default_rng(seed).permutation(len(rows))[: round(fraction * len(rows))]  # Table 10
        self.rows = rows[np.sort(chosen)]
        if not len(self.rows):
            raise ValueError(f"{self.folder}: no image left (fraction {fraction}, {len(exclude)} excluded)")
        self.seed, self.skip_bad, self.epoch = seed, skip_bad, -1

    @property
    def classes(self) -> list:
        """What the labels stand for, of which a head is built."""
        return self.categories

    @property
    def fingerprint(self) -> str:
        """Identifies the images and the annotations, wherever they lie."""
        arrays = (self.ids[self.rows], *self.annotations)
        return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]

    def row(self, position: int) -> int:
        """Every epoch is a permutation of its own."""
        epoch, i = divmod(position, len(self.rows))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return int(self.order[i])

    def __getitem__(self, index: tuple[int, int]):
        position, patch = index
        key = hashlib.sha256(f"{self.seed} {self.task} {position}".encode()).digest()
        skipped = []
        while True:
            row = self.row(position + len(skipped))
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(int.from_bytes(key[:7], "little"))
                    pixels = decode(self.folder / self.names[row], tuple(self.sizes[row].tolist()))
                    image, target = self.sample(tv_tensors.Image(pixels), row, patch)
                break
            except BadImage as error:
                skipped.append(self.names[row])
                if not self.skip_bad or len(skipped) == len(self.rows):
                    return error
        known = {"image_id": int(self.ids[row]), "orig_size": tuple(pixels.shape[1:]), "skipped": skipped}
        return image.as_subclass(Tensor), {**known, "size": tuple(image.shape[1:]), **target}


class Detection(CocoStream):
    """target: labels (n,) in 0..C-1 and boxes_cxcywh (n, 4) in [0, 1] of size."""

    task = "detection"

    def __init__(self, coco, split, seed=0, scale=1.0, fraction=1.0, exclude=frozenset(), skip_bad=False):
        data = self.data = read_instances(coco, split)
        self.folder, self.ids, self.names, self.sizes = Path(coco) / split, data.ids, data.names, data.sizes
        self.categories, self.notes, self.annotations = (
            data.categories,
            data.notes,
            (data.boxes_xyxy, data.labels),
        )
        self.augment = DetectionAugmentation(scale)
        self.choose(seed, fraction, exclude, skip_bad)

    def sample(self, image: tv_tensors.Image, row: int, patch: int) -> tuple[tv_tensors.Image, dict]:
        mine = slice(self.data.first[row], self.data.first[row + 1])
        boxes = self.data.boxes_xyxy[mine]
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[1:]))
        image, boxes = self.augment(image, boxes)
        h, w = image.shape[1:]
        boxes = boxes.as_subclass(Tensor)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)  # the crop may have left some objects out
        boxes_cxcywh = box_convert(boxes[inside], "xyxy", "cxcywh") / torch.tensor([w, h, w, h])
        return image, {
            "labels": torch.from_numpy(self.data.labels[mine])[inside],
            "boxes_cxcywh": boxes_cxcywh,
        }


@dataclass
class Jitter:
    """Large-scale jitter, as Mask2Former: flip half of the images, resize to 0.1..2 times what fits a
    square, crop to the square. Padding to the full square is left out: it would be masked everywhere.

    rows, columns: for each pixel of the result, the source pixel that lies under its centre
    """

    rows: np.ndarray
    columns: np.ndarray
    size: tuple[int, int]  # of the whole image after the resize
    corner: tuple[int, int]  # top, left of the crop
    flip: bool

    @classmethod
    def draw(cls, height: int, width: int, side: int) -> "Jitter":
        scale = float(torch.empty(()).uniform_(0.1, 2.0)) * side / max(height, width)
        size = tuple(max(1, round(scale * s)) for s in (height, width))
        corner = tuple(_randint(0, max(0, s - side)) for s in size)
        rows, columns = (
            ((np.arange(min(side, s)) + c + 0.5) * full / s).astype(np.int64).clip(max=full - 1)
            for s, c, full in zip(size, corner, (height, width), strict=True)
        )
        flip = bool(torch.rand(()) < 0.5)
        return cls(rows, width - 1 - columns if flip else columns, size, corner, flip)

    def image(self, image: Tensor) -> Tensor:
        image = TF.horizontal_flip(image) if self.flip else image
        image = TF.resize(image, list(self.size), antialias=True)
        return TF.crop(image, *self.corner, len(self.rows), len(self.columns))

    def map(self, mask: np.ndarray) -> np.ndarray:
        """The same of a mask or a map of ids, (height, width), by nearest neighbour."""
        return mask[self.rows[:, None], self.columns]


class Segmentation(CocoStream):
    """target: labels (n,) in 0..C-1 and masks (n, h, w) bool."""

    task = "segmentation"
    side = 1024  # the release's square, which it cuts to 1022 = 73 patches of 14

    def __init__(self, coco, split, seed=0, scale=1.0, fraction=1.0, exclude=frozenset(), skip_bad=False):
        data = self.data = self.read(coco, split)
        self.folder, self.ids, self.names, self.sizes = Path(coco) / split, data.ids, data.names, data.sizes
        self.categories, self.notes = data.categories, data.notes
        self.scale = scale
        self.choose(seed, fraction, exclude, skip_bad)

    def read(self, coco, split) -> Instances:
        data = read_instances(coco, split, masks=True)
        self.annotations = (data.labels, data.outlines)
        return data

    def sample(self, image: tv_tensors.Image, row: int, patch: int) -> tuple[Tensor, dict]:
        side = max(1, round(self.scale * self.side) // patch) * patch
        jitter = Jitter.draw(*image.shape[1:], side)
        labels = self.data.labels[self.data.first[row] : self.data.first[row + 1]]
        masks = np.zeros((len(labels), len(jitter.rows), len(jitter.columns)), bool)
        inside = np.zeros(len(labels), bool)
        for i, source in enumerate(self.masks(row)):  # one at a time, and in place: they are large
            mask = masks[inside.sum()]
            mask[:] = jitter.map(source)
            inside[i] = mask.any()  # else the crop has left the object out
        target = {
            "labels": torch.from_numpy(labels[inside]),
            "masks": torch.from_numpy(masks[: inside.sum()]),
        }
        return jitter.image(image.as_subclass(Tensor)), target

    def masks(self, row: int) -> Iterator[np.ndarray]:
        """The masks of an image's annotations, (h, w) uint8."""
        h, w = self.sizes[row].tolist()
        for k in range(self.data.first[row], self.data.first[row + 1]):
            outline = json.loads(bytes(self.data.outlines[self.data.ends[k] : self.data.ends[k + 1]]))
            codes = rle.frPyObjects(outline, h, w) if isinstance(outline, list) else outline
            if isinstance(codes, dict) and isinstance(codes["counts"], list):
                codes = rle.frPyObjects(codes, h, w)
            yield rle.decode(rle.merge(codes) if isinstance(codes, list) else codes)


class Panoptic(Segmentation):
    """The same of things and stuff together: every segment of the panoptic PNG is a target."""

    task = "panoptic"

    def read(self, coco, split) -> Instances:
        data = read_panoptic(coco, split)
        self.annotations, self.maps = (
            (data.labels, data.segments),
            annotation_file(coco, "panoptic", split).with_suffix(""),
        )
        return data

    def masks(self, row: int) -> Iterator[np.ndarray]:
        path = (self.maps / self.names[row]).with_suffix(".png")
        red, green, blue = decode(path, tuple(self.sizes[row].tolist())).numpy().astype(np.int64)
        ids = red + 256 * green + 256**2 * blue
        segments = self.data.segments[self.data.first[row] : self.data.first[row + 1]]
        lost = segments[~np.isin(segments, ids)]
        if len(lost):
            raise BadImage(f"{path}: image {self.ids[row]}: no pixel has the id of segment {lost[0]}")
        return (ids == segment for segment in segments)


def collate(samples: list, patch: int, mean, std):
    """Samples of any size -> images (B, 3, h, w) normalized and padded to multiples of the patch, valid, y.

    valid: (B, h, w) bool, True on image; None when all have one size: then no whole patch is padding
    The first bad image, if any, is handed on as the error it is.
    """
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    sizes = [target["size"] for _, target in samples]
    h, w = (-(-max(side) // patch) * patch for side in zip(*sizes, strict=True))
    images = torch.zeros(len(samples), 3, h, w)  # zero is the mean colour
    valid = torch.zeros(len(samples), h, w, dtype=torch.bool)
    for i, (image, target) in enumerate(samples):
        image = TF.normalize(TF.to_dtype(image, scale=True), mean, std)
        images[i, :, : image.shape[1], : image.shape[2]] = image
        valid[i, : image.shape[1], : image.shape[2]] = True
        target["padded_size"] = (h, w)
    return images, None if len(set(sizes)) == 1 else valid, [target for _, target in samples]


def batches(stream: CocoStream, batch: int, backbone, ranks, start: int = 0, workers: int = 0) -> Iterator:
    """images, valid, y of this rank's part of the stream, from its batch `start` on, without end.

    The workers start at once and keep two batches each ahead, however long a task waits for its turn.
    backbone: for its patch, mean, std; ranks: for rank, world, device. Raises BadImage where one turns up.
    """

    def positions():
        first = (start * ranks.world + ranks.rank) * batch
        while True:
            yield [(position, backbone.patch) for position in range(first, first + batch)]
            first += ranks.world * batch

    def checked(loader):
        for item in loader:
            if isinstance(item, Exception):
                raise item
            yield item

    loader = DataLoader(
        stream,
        batch_sampler=positions(),
        collate_fn=partial(collate, patch=backbone.patch, mean=backbone.mean, std=backbone.std),
        num_workers=workers,
        pin_memory=ranks.device.type == "cuda",
        worker_init_fn=_ignore_interrupt,
    )
    return checked(iter(loader))


def _ignore_interrupt(_) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
