"""Small valid files of every kind that is read, each spoilt in one place, drawn from a seed.

Two outcomes are allowed. The reader gives what a few plain lines here (`naive`) compute from the spoilt file:
nothing is lost but what cannot be used, and nothing else has changed. Or it raises what launch() prints as
one line, which names the file and, where one item is at fault, the item. Training and evaluation agree.
"""

import argparse
import base64
import copy
import json
import math
import re
import signal
from collections.abc import Callable
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import lmdb
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor, nn

import convert
import eval_caption
import eval_heads
import eval_ocr
import files
import lora
import tasks
import training
from data import captions, coco, goi, references, validation, vqa, words, zeroshot
from heads.ocr import OcrHead
from ranks import users_error
from scores.average_precision import average_precision

SPLIT, H, W = "train2017", 48, 64
SECONDS = 30  # for a case, which takes milliseconds: on a busy machine, too
DROP, TWICE = "drop it", "put it there twice"
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    1.5,
    2.0,
    2**31,
    2**63,
    10**400,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
]
ODD += ["", " ", "1", "7", "box", "a\nb", "a\0b", "\ud83d", "e\u0301", "../x", "x" * 3000]
ODD += [[], {}, [None], [[]], [1, 2, 3, 4], {"id": 1}, [{}], [[[[1]]]]]


# --- spoiling


def draw(rng: np.random.Generator, content) -> tuple[tuple, object]:
    """A place in a JSON content, and what to put there: DROP, TWICE (of a list), or a value."""
    place, here = (), content
    while isinstance(here, dict | list) and here and not (place and rng.random() < 0.15):
        keys = list(here) if isinstance(here, dict) else range(len(here))
        key = keys[rng.integers(len(keys))]
        place, parent, here = (*place, key), here, here[key]
    if not place:
        return (), ODD[rng.integers(len(ODD))]
    kind = rng.integers(10)
    others = list(parent.values()) if isinstance(parent, dict) else parent
    match kind:
        case 0:
            return place, DROP
        case 1 if isinstance(parent, list):
            return place, TWICE
        case 2:
            return place, [here]
        case 3:
            return place, str(here)
        case 4:
            return place, others[rng.integers(len(others))]
        case 5 if isinstance(here, int | float):
            return place, here * [-1, 1e6, 1.0, 2][rng.integers(4)]
        case 6 if len(place) > 2 and isinstance(content[place[0]], list):  # another item's
            items = content[place[0]]
            other = items[rng.integers(len(items))]
            return place, other.get(place[2], here) if isinstance(other, dict) else here
    return place, ODD[rng.integers(len(ODD))]


def spoil(content, place: tuple, value):
    content = copy.deepcopy(content)
    if not place:
        return value
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    if value == DROP:
        del parent[place[-1]]
    elif value == TWICE:
        parent.insert(place[-1], copy.deepcopy(parent[place[-1]]))
    else:
        parent[place[-1]] = value
    return content


def spoil_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    at, kind = int(rng.integers(len(data))), rng.integers(5)
    change = [b"", b"\xef\xbb\xbf" + data, bytes([data[at] ^ 1 << int(rng.integers(8))]), b"\xff\xfe", b"\n"][
        kind
    ]
    if kind == 0:
        return data[:at]
    return change if kind == 1 else data[:at] + change + data[at + (kind == 2) :]


# --- judging


class Hang(BaseException):
    pass


@contextmanager
def alarm():
    def late(*_):
        raise Hang(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(function: Callable, *args):
    """What it returns, or its error."""
    with alarm():
        try:
            return function(*args)
        except Exception as error:
            return error


def complaint(found, expected, names: list[str], item: str | None = None) -> str | None:
    """What is wrong with an outcome, if anything.

    names: of the files, one of which an error must name; item: a pattern for the item that it must name
    """
    if not isinstance(found, Exception):
        if isinstance(expected, Exception):
            return f"accepted as {found!r:.600} though {type(expected).__name__}: {expected}"
        return None if found == expected else f"read as {found!r:.800}, expected {expected!r:.800}"
    line = users_error(found)
    if line is None:
        where = found.__traceback__
        while where.tb_next:
            where = where.tb_next
        code = where.tb_frame.f_code
        return f"{type(found).__name__} in {code.co_filename}:{where.tb_lineno}: {found!s:.300}"
    if "\n" in line or not line.isprintable():
        return f"not one line: {line!r}"
    if not any(name in line for name in names):
        return f"no file named: {line}"
    if item and not re.search(item, line):
        return f"no item like {item}: {line}"
    if len(line) > 1000:
        return f"too long a line: {len(line)}"
    return None


class Reader(NamedTuple):
    """read(folder) -> a value; naive(content of the file) -> the same, or an error where it is refused"""

    read: Callable
    naive: Callable


class Format(NamedTuple):
    """A kind of JSON file: where it is below the folder, a valid content, its readers.

    agree: whether all accept, or none does; beside: files that disagree with it may be named in its place
    """

    file: str
    content: object
    readers: dict[str, Reader]
    agree: bool = True
    beside: tuple = ()


def trial(format: Format, folder: Path, place: tuple, value, data: bytes | None = None) -> str | None:
    """Write the spoilt file, read it, and judge. data: in the place of what place and value make"""
    path = folder / format.file
    path.parent.mkdir(exist_ok=True)
    if data is None:
        data = json.dumps(spoil(format.content, place, value)).encode()
    path.write_bytes(data)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        content = error
    item = None
    if len(place) > 1 and isinstance(place[1], int):
        item, field = r"\w+\[\d+\] of \d+|images not in|categor(y '|ies have)", place[2:3]
        if field and field[0] not in (
            "id",
            "image_id",
            "category_id",
            "cocoid",
            "width",
            "height",
            "file_name",
        ):
            item = rf"{place[0]}\[{place[1]}\] of \d+|category '|ies have"
        item += r"|\.png|questions? |no caption|0 images|domain must be"
    elif place and isinstance(place[0], int):
        item = r"\w+\[\d+\] of \d+|questions of"
    if place and place[0] in ("templates", "names"):
        item = None
    outcomes = {}
    for name, reader in format.readers.items():
        found = outcomes[name] = attempt(reader.read, folder)
        expected = content if isinstance(content, Exception) else attempt(reader.naive, content)
        if why := complaint(found, expected, [path.name, ".png", *format.beside], item):
            return f"{name}: {why}"
    refused = {isinstance(found, Exception) for found in outcomes.values()}
    if format.agree and len(refused) > 1 and "nothing to train on" not in str(outcomes):
        return f"one accepts, another refuses: {outcomes!r:.800}"
    return None


def trials(format: Format, folder: Path, seeds: range) -> None:
    """All cases of a format; what is said of each that fails."""
    folder.mkdir(exist_ok=True)
    assert trial(format, folder, (), format.content) is None
    failed = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        if rng.random() < 0.1:
            data = spoil_bytes(rng, json.dumps(format.content).encode())
            if why := trial(format, folder, (), None, data):
                failed.append(f"seed {seed}: bytes: {why}")
        else:
            place, value = draw(rng, format.content)
            if why := trial(format, folder, place, value):
                failed.append(f"seed {seed}: {place} = {value!r:.80}: {why}")
    assert not failed, "\n".join([f"{len(failed)} cases", *failed])


# --- COCO's files


def rectangle(x: int, y: int, w: int, h: int) -> np.ndarray:
    mask = np.zeros((H, W), np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def polygon(x: int, y: int, w: int, h: int) -> list[int]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def runs(mask: np.ndarray) -> dict:
    flat = mask.flatten("F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [H, W], "counts": np.diff([0, *changes, flat.size]).tolist()}  # it begins with a 0


def compressed(mask: np.ndarray) -> dict:
    code = rle.encode(np.asfortranarray(mask))
    return {"size": code["size"], "counts": code["counts"].decode()}


IMAGES = [{"id": i, "file_name": f"{i}.png", "width": W, "height": H} for i in (7, 3, 12)]
BOXES = {5: (7, [2, 3, 20, 30]), 6: (7, [30, 10, 9, 9]), 2: (3, [1, 1, 40, 40]), 9: (12, [16, 12, 32, 24])}
JOINTS = ["nose", "left_eye", "right_eye"]


def instances() -> dict:
    shapes = [
        [polygon(2, 3, 20, 10), polygon(2, 13, 20, 20)],
        polygon(30, 10, 9, 9),
        runs(rectangle(1, 1, 40, 40)),
    ]
    shapes.append(compressed(rectangle(16, 12, 32, 24)))
    annotations = [
        {"id": i, "image_id": image, "category_id": 4 if i > 5 else 1, "bbox": box, "iscrowd": 0}
        | {"segmentation": shape, "area": box[2] * box[3]}
        for (i, (image, box)), shape in zip(BOXES.items(), shapes, strict=True)
    ]
    crowd = {"id": 1, "image_id": 3, "category_id": 1, "bbox": [50, 5, 9, 9], "iscrowd": 1, "area": 81}
    annotations.append({**crowd, "segmentation": runs(rectangle(50, 5, 9, 9))})
    categories = [{"id": 4, "name": "box"}, {"id": 1, "name": "dot"}]
    return {"images": IMAGES, "annotations": annotations, "categories": categories}


def keypoints() -> dict:
    content = instances()
    for k, a in enumerate(content["annotations"]):
        a["category_id"] = 1
        x, y = a["bbox"][:2]
        a |= {"num_keypoints": 3, "keypoints": [x + 1, y + 2, 2, x + 3, y + k, 1, x + 5, y + 4, 2]}
    content["categories"][1] |= {"name": "person", "keypoints": JOINTS, "sigmas": [0.1, 0.2, 0.15]}
    return content


def maps() -> dict[str, np.ndarray]:
    """Panoptic PNGs by name."""
    found = {}
    for k, image in enumerate(IMAGES):
        ids = np.full((H, W), 2, np.int64)
        ids[5:20, 5:25], ids[30:40, 10 + k : 40], ids[:3] = 1, 70_000 + k, 0
        found[image["file_name"]] = ids
    return found


def panoptic() -> dict:
    annotations = []
    for k, image in enumerate(IMAGES):
        segments = [{"id": 1, "category_id": 4}, {"id": 2, "category_id": 1, "iscrowd": 0}]
        segments.append(
            {"id": 70_000 + k, "category_id": 4, "iscrowd": int(k == 1), "area": 9, "bbox": [0, 0, 3, 3]}
        )
        annotations.append(
            {"image_id": image["id"], "file_name": image["file_name"], "segments_info": segments}
        )
    categories = [{"id": 4, "name": "box", "isthing": 1}, {"id": 1, "name": "sky", "isthing": 0}]
    return {"images": IMAGES, "annotations": annotations, "categories": categories}


TEXTS = ["A red box.", "two boxes, two dots", "a dot", "Nothing at all", "e\u0301t\u00e9 in Paris"]


def texts() -> dict:
    ids = [7, 7, 3, 12, 12]
    captions = [
        {"id": k, "image_id": i, "caption": t} for k, (i, t) in enumerate(zip(ids, TEXTS, strict=True))
    ]
    return {"images": IMAGES, "annotations": captions}


def write_world(folder: Path) -> Path:
    """Pictures and PNGs, and every annotation file, valid."""
    pngs = folder / "annotations" / f"panoptic_{SPLIT}"
    pngs.mkdir(parents=True)
    (folder / SPLIT).mkdir()
    for name, ids in maps().items():
        Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1).astype(np.uint8)).save(
            pngs / name
        )
        Image.fromarray(np.full((H, W, 3), 90, np.uint8)).save(folder / SPLIT / name)
    return folder


def options(folder: Path, **changed) -> argparse.Namespace:
    known = dict(
        coco=folder, split=SPLIT, seed=0, image_scale=0.1, size=None, limit=None, persons=None, captions=None
    )
    known |= dict(min_count=1, data_fraction=1.0, exclude_images=None, skip_bad_images=False)
    return argparse.Namespace(**{**known, **changed})


def stream_of(task: str, folder: Path):
    """The training stream, every sample of which was made once."""
    stream = tasks.open_stream(task, options(folder))
    for position in range(len(stream.rows)):
        sample = stream[position, 14]
        if isinstance(sample, Exception):
            raise sample
        assert all(v.isfinite().all() for v in sample[1].values() if isinstance(v, torch.Tensor))
    return stream


def items_of(task: str, folder: Path):
    items = validation.open_items(task, options(folder))
    for i in range(len(items)):
        item = items[i]
        if isinstance(item, Exception):
            raise item
        assert all(v.isfinite().all() for v in item[1].values() if isinstance(v, torch.Tensor))
    return items


def ordered(records) -> list:
    return sorted(records, key=repr)


def corners(box: list, height: int, width: int) -> tuple | None:
    """x, y, x, y within the image, or None if nothing of the box is."""
    x, y, w, h = map(float, box)
    if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
        return None
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    return tuple(map(float, np.float32([x0, y0, x1, y1]))) if x1 > x0 and y1 > y0 else None


def drawn(shape, height: int, width: int) -> bytes | None:
    """The mask of a `segmentation`, or None if there is none."""
    if isinstance(shape, dict):
        counts = shape["counts"] if isinstance(shape["counts"], list) else uncompressed(shape["counts"])
        if shape["size"] != [height, width] or min(counts) < 0 or sum(counts) != height * width:
            raise ValueError("wrong runs")
        flat = np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8)
        return flat.reshape(width, height).T.tobytes()
    parts = [shape] if shape and not any(isinstance(part, list) for part in shape) else shape or []
    far = min(10 * max(height, width), 1e6)
    good = [
        part
        for part in parts
        if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0
        and all(type(v) in (int, float) and abs(v) <= far for v in part)
    ]  # fmt: skip
    return rle.decode(rle.merge(rle.frPyObjects(good, height, width))).tobytes() if good else None


def uncompressed(text: str) -> list[int]:
    """COCO's text as its C code reads it."""
    counts, codes = [], iter(text)
    for first in codes:
        value, shift, code = 0, 0, ord(first) - 48
        while True:
            value |= (code & 31) << shift
            shift += 5
            if not code & 32:
                break
            code = ord(next(codes)) - 48
        value -= (code & 16) << shift - 4 if code & 16 else 0
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def naive_objects(content: dict, masks: bool = False, pose: bool = False) -> dict:
    images = {image["id"]: image for image in content["images"]}
    categories = {c["id"]: c for c in content["categories"]}
    if any(not 0 < image[side] < 2**31 for image in images.values() for side in ("width", "height")):
        raise ValueError("a size that is none")
    wrong = {i for i, image in images.items() if (image["height"], image["width"]) != (H, W)}
    if wrong and not pose:
        raise ValueError("not the picture's size")
    found, crowds = [], 0
    for a in content["annotations"]:
        category = categories[a["category_id"]]
        image = images[a["image_id"]]
        box, shape = corners(a["bbox"], image["height"], image["width"]), None
        if masks:
            shape = drawn(a.get("segmentation"), H, W)
        crowd = a.get("iscrowd") or 0
        if box is None or masks and shape is None or pose and "keypoints" not in category:
            continue
        if pose:
            points = a.get("keypoints") or [0] * 9
            if not crowd and any(v > 0 for v in points[2::3]):
                if a["image_id"] in wrong:
                    raise ValueError("not the picture's size")
                found.append(
                    (a["image_id"], *map(float, np.float32(a["bbox"])), *map(float, np.float32(points)))
                )
        elif not crowd:
            found.append((a["image_id"], whole(category["name"]), *(() if masks else box), shape))
        crowds += crowd
    return {"objects": ordered(found), "crowds": int(crowds)}


def train_objects(task: str, folder: Path) -> dict:
    stream = stream_of(task, folder)
    data, found = stream.data, []
    for row in range(len(data.ids)):
        shapes = stream.masks(row) if task == "segmentation" else None
        for k in range(data.first[row], data.first[row + 1]):
            box = () if shapes else tuple(map(float, data.boxes_xyxy[k]))
            shape = next(shapes).tobytes() if shapes else None
            found.append((data.ids[row].item(), data.categories[data.labels[k]]["name"], *box, shape))
    crowds = int(re.search(r"(\d+) crowd annotations left out", "; ".join(stream.notes))[1])
    return {"objects": ordered(found), "crowds": crowds}


def perfect(items, kind: str, answers: list[dict]) -> None:
    """The truth, given as predictions, has an AP of 100, or none where there is nothing that counts."""
    answers = [{"score": 0.9, **a} for a in answers]
    sigmas = items.categories[0].get("sigmas")
    scores = average_precision(items.truth, answers, kind, items.image_ids, sigmas)
    ap = next(iter(scores.values()))
    counts = any(a["area"] < 1e10 for a in items.truth["annotations"] if not a["iscrowd"])  # COCO's "all"
    assert ap == pytest.approx(100) if counts and answers else ap is None, f"AP {ap}"


def eval_objects(task: str, folder: Path) -> dict:
    items = items_of(task, folder)
    names = {c["id"]: c["name"] for c in items.truth["categories"]}
    found, answers = [], []
    for a in items.truth["annotations"]:
        if not a["iscrowd"]:
            answer = {"bbox": a["bbox"]}
            shape = None
            if task == "segmentation":
                mask = np.frombuffer(drawn(a["segmentation"], H, W), np.uint8).reshape(H, W)
                answer, shape = {"segmentation": compressed(mask)}, mask.tobytes()
            box = () if shape else corners(a["bbox"], H, W)
            found.append((a["image_id"], names[a["category_id"]], *box, shape))
            answers.append({"image_id": a["image_id"], "category_id": a["category_id"], **answer})
    perfect(items, "segm" if task == "segmentation" else "bbox", answers)
    return {"objects": ordered(found), "crowds": sum(a["iscrowd"] for a in items.truth["annotations"])}


def persons(data) -> dict:
    rows = zip(data.ids.tolist(), data.boxes_xywh.tolist(), data.keypoints.tolist(), strict=True)
    return {"objects": ordered((i, *box, *(v for point in points for v in point)) for i, box, points in rows)}


def eval_persons(folder: Path) -> dict:
    items = items_of("pose", folder)
    true = [a for a in items.truth["annotations"] if not a["iscrowd"] and a["num_keypoints"]]
    perfect(items, "keypoints", [{k: a[k] for k in ("image_id", "category_id", "keypoints")} for a in true])
    return persons(items.data)


def naive_persons(content: dict) -> dict:
    return {"objects": naive_objects(content, pose=True)["objects"]}


def naive_segments(content: dict) -> list:
    categories, found, images = {c["id"]: c["name"] for c in content["categories"]}, [], {}
    for image in content["images"]:
        images[image["id"]] = image
    for a in content["annotations"]:
        ids, image = maps()[a["file_name"].removeprefix("./")], images[a["image_id"]]
        if (image["height"], image["width"]) != (H, W):
            raise ValueError("not the picture's size")
        known = [s["id"] for s in a["segments_info"]]
        if sorted(known) != np.unique(ids[ids > 0]).tolist():
            raise ValueError("not the segments of the PNG")
        for s in a["segments_info"]:
            if not s.get("iscrowd"):
                found.append(
                    (a["image_id"], whole(categories[s["category_id"]]), int((ids == s["id"]).sum()))
                )
    return ordered(found)


def train_segments(folder: Path) -> list:
    stream, found = stream_of("panoptic", folder), []
    for row in range(len(stream.data.ids)):
        labels = stream.data.labels[stream.data.first[row] : stream.data.first[row + 1]]
        for label, mask in zip(labels, stream.masks(row), strict=True):
            name = stream.data.categories[label]["name"]
            found.append((stream.data.ids[row].item(), name, int(mask.sum())))
    return ordered(found)


def eval_segments(folder: Path) -> list:
    from data.segmentation import read_segments

    items = items_of("panoptic", folder)
    scorer, found = eval_heads.open_scorer("panoptic", items, SimpleNamespace(out=folder, seed=0)), []
    names = {c["id"]: c["name"] for c in items.categories}
    for image_id, truth in items.truth.items():
        ids = read_segments(items.annotations.with_suffix("") / truth["file_name"])
        own = {"image_id": image_id, "segments_info": [s for s in truth["segments_info"] if not s["iscrowd"]]}
        crowds = [s["id"] for s in truth["segments_info"] if s["iscrowd"]]
        iou, true, false, missed = scorer.count(own, np.where(np.isin(ids, crowds), 0, ids)).sum(0)
        assert iou == true == len(own["segments_info"]) and false == missed == 0
        sizes = {s["id"]: int((ids == s["id"]).sum()) for s in own["segments_info"]}
        found += [(image_id, names[s["category_id"]], sizes[s["id"]]) for s in own["segments_info"]]
    return ordered(found)


def whole(text: str) -> str:
    assert type(text) is str
    return text.encode("utf-8", "replace").decode()


def naive_captions(content: dict) -> list:
    ids = {image["id"]: image for image in content["images"]}
    if any((image["height"], image["width"]) != (H, W) for image in ids.values()):
        raise ValueError("not the picture's size")
    return ordered(
        (a["image_id"], whole(a["caption"])) for a in content["annotations"] if a["image_id"] in ids or 1 / 0
    )


def train_captions(folder: Path) -> list:
    images, sentences, _ = captions.read_captions(folder, SPLIT)
    stream_of("captioning", folder)
    return ordered((images[row]["id"], tuple(tokens)) for row, tokens in sentences)


def eval_captions(folder: Path) -> list:
    return ordered((i, text) for i, told in items_of("captioning", folder).truth.items() for text in told)


def words_of(pairs: list) -> list:
    return ordered((i, tuple(captions.tokenize(text))) for i, text in pairs)


DETECTION, SEGMENTATION, PANOPTIC, POSE, CAPTIONS = (
    Format(
        f"annotations/instances_{SPLIT}.json",
        instances(),
        {
            "train": Reader(lambda folder: train_objects("detection", folder), naive_objects),
            "eval": Reader(lambda folder: eval_objects("detection", folder), naive_objects),
        },
    ),
    Format(
        f"annotations/instances_{SPLIT}.json",
        instances(),
        {
            "train": Reader(
                lambda folder: train_objects("segmentation", folder), lambda c: naive_objects(c, True)
            ),
            "eval": Reader(
                lambda folder: eval_objects("segmentation", folder), lambda c: naive_objects(c, True)
            ),
        },
    ),
    Format(
        f"annotations/panoptic_{SPLIT}.json",
        panoptic(),
        {"train": Reader(train_segments, naive_segments), "eval": Reader(eval_segments, naive_segments)},
    ),
    Format(
        f"annotations/person_keypoints_{SPLIT}.json",
        keypoints(),
        {
            "train": Reader(lambda folder: persons(stream_of("pose", folder).data), naive_persons),
            "eval": Reader(eval_persons, naive_persons),
        },
    ),
    Format(
        f"annotations/captions_{SPLIT}.json",
        texts(),
        {
            "train": Reader(train_captions, lambda content: words_of(naive_captions(content))),
            "eval": Reader(eval_captions, naive_captions),
        },
    ),
)


# --- captions and questions in other formats


def karpathy() -> dict:
    images, sentences = [], iter(TEXTS)
    for k, (split, name) in enumerate(
        (("train", "7.png"), ("restval", "3.png"), ("test", "12.png"), ("val", "x.png"))
    ):
        told = [
            {"raw": t, "tokens": captions.tokenize(t), "sentid": k}
            for t in [next(sentences)] + TEXTS[4:] * (k == 2)
        ]
        image = {
            "cocoid": 40 + k,
            "filepath": SPLIT,
            "filename": name,
            "split": split,
            "imgid": k,
            "sentences": told,
        }
        images.append(image)
    return {"images": images, "dataset": "coco"}


def naive_karpathy(content: dict, splits: tuple, field: str) -> list:
    images = content["images"]
    key = next((key for key in ("cocoid", "imgid") if any(key in image for image in images)), "filename")
    found = []
    for image in images:
        if image["split"] in splits:
            told = [s[field] for s in image["sentences"]]
            place = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            found.append(
                (
                    image[key],
                    whole(place),
                    [whole(t) if field == "raw" else [whole(str(w)) for w in t] for t in told],
                )
            )
    if len({str(i) for i, *_ in found}) < len(found):
        raise ValueError("ids that are there twice")
    return ordered(found)


def naive_training(content: dict) -> list:
    """What is on disk; words of the others count in the vocabulary alone."""
    found = naive_karpathy(content, ("train", "restval"), "tokens")
    there = {f"{SPLIT}/{image['file_name']}" for image in IMAGES}
    kept = []
    for i, place, told in found:
        names = [
            place,
            f"{SPLIT}/{i:012d}.jpg" if isinstance(i, int) else "",
            f"{SPLIT}/{place.split('/')[-1]}",
        ]
        if name := next((name for name in names if name in there), None):
            kept += [(i, name, words) for words in told]
    if not kept and not any(place in there for _, place, _ in found):
        raise ValueError("none on disk")
    return ordered(kept)


def train_karpathy(folder: Path) -> list:
    images, sentences, _ = captions.read_karpathy(folder / "dataset_coco.json", folder, SPLIT)
    return ordered(
        (images[row]["id"], images[row]["name"], tokens) for row, tokens in sentences if row is not None
    )


def read_references(folder: Path) -> list:
    _, images, _ = references.read(folder / "dataset_coco.json")
    return ordered((image["id"], image["image"], image["references"]) for image in images)


def read_items(folder: Path) -> list:
    found, _ = eval_caption.read(folder / "dataset_coco.json")
    return ordered((item.id, item.image, item.references) for item in found)


def naive_items(content) -> list:
    found = naive_karpathy(content, ("test",), "raw")
    if not found or not all(told for *_, told in found):
        raise ValueError("no captions")
    return found


def naive_test_and_val(content) -> list:
    if isinstance(content, list):
        return sorted(content)
    return sorted({image["cocoid"] for image in content["images"] if image["split"] in ("test", "val")})


KARPATHY = Format(
    "dataset_coco.json",
    karpathy(),
    {
        "train": Reader(train_karpathy, naive_training),
        "references": Reader(read_references, lambda content: naive_karpathy(content, ("test",), "raw")),
        "eval_caption": Reader(read_items, naive_items),
        "ids": Reader(lambda folder: sorted(coco.read_ids(folder / "dataset_coco.json")), naive_test_and_val),
    },
    agree=False,
)


def lavis() -> list:
    return [
        {"image": f"val/{name}", "caption": t}
        for name, t in (("7.png", TEXTS[0]), ("3.png", TEXTS[1:3]), ("7.png", "two"))
    ]


def naive_lavis(content: list) -> list:
    found = {}
    for entry in content:
        told = [entry["caption"]] if isinstance(entry["caption"], str) else entry["caption"]
        found.setdefault(whole(entry["image"]), []).extend(map(whole, told))
    return ordered((image, image, told) for image, told in found.items())


LAVIS = Format("dataset_coco.json", lavis(), {"references": Reader(read_references, naive_lavis)})
NOCAPS_CONTENT = {**texts(), "images": [{**image, "domain": "in-domain"} for image in IMAGES]}


def naive_nocaps(content: dict) -> list:
    found = {image["id"]: (image["id"], whole(image["file_name"]), []) for image in content["images"]}
    if any(
        image.get("domain") not in ("in-domain", "near-domain", "out-domain", None)
        for image in content["images"]
    ):
        raise ValueError("domain")
    for a in content["annotations"]:
        found[a["image_id"]][2].append(whole(a["caption"]))
    if not found or not all(told for *_, told in found.values()):
        raise ValueError("no captions")
    return ordered(found.values())


NOCAPS = Format("dataset_coco.json", NOCAPS_CONTENT, {"eval_caption": Reader(read_items, naive_nocaps)})


def questions() -> dict:
    asked = [(3, 7, "What is it?"), (5, 7, "How many?"), (4, 12, "Where is it?")]
    return {
        "questions": [dict(question_id=q, image_id=i, question=t) for q, i, t in asked],
        "data_subtype": "val2014",
    }


def annotations() -> dict:
    rows = [(5, 7, "number"), (3, 7, "other"), (4, 12, "yes/no")]
    answers = [
        [{"answer": f"{'box' if k < n else 'dot'}", "answer_id": k} for k in range(10)] for n in (3, 10, 7)
    ]
    keys = ("question_id", "image_id", "answer_type")
    return {
        "annotations": [
            dict(zip(keys, row, strict=True), answers=a) for row, a in zip(rows, answers, strict=True)
        ]
    }


def naive_questions(asked: dict, answered: dict) -> list:
    found, of = [], {a["question_id"]: a for a in answered["annotations"]}
    if len(of) != len(asked["questions"]) or len(of) != len(answered["annotations"]):
        raise ValueError("not the same")
    for q in asked["questions"]:
        a = of[q["question_id"]]
        if a["image_id"] != q["image_id"] or len(a["answers"]) != 10:
            raise ValueError("not the same")
        image = f"COCO_{asked.get('data_subtype', 'val2014')}_{q['image_id']:012d}.jpg"
        told = tuple(whole(answer["answer"]) for answer in a["answers"])
        found.append(
            (
                q["question_id"],
                image,
                whole(q["question"]),
                told,
                whole("other" if a.get("answer_type") is None else a["answer_type"]),
            )
        )
    return found


def read_questions(folder: Path) -> list:
    for name, content in (("questions.json", questions()), ("annotations.json", annotations())):
        if not (folder / name).is_file():
            (folder / name).write_text(json.dumps(content))
    found = vqa.read("vqav2", folder / "questions.json", folder / "annotations.json")
    return [(q.id, q.image, q.text, q.answers, q.kind) for q in found]


QUESTIONS = Format(
    "questions.json",
    questions(),
    {"vqa": Reader(read_questions, lambda c: naive_questions(c, annotations()))},
    beside=("annotations.json",),
)
ANNOTATIONS = Format(
    "annotations.json",
    annotations(),
    {"vqa": Reader(read_questions, lambda c: naive_questions(questions(), c))},
)


def gqa() -> dict:
    of = {"imageId": "n7", "question": "Is it red?", "answer": "yes", "types": {"structural": "verify"}}
    return {"05": of, "07": {**of, "imageId": "n8", "answer": "box", "types": {"structural": "query"}}}


def naive_gqa(content: dict) -> list:
    found = []
    for key, q in content.items():
        kind = (q.get("types") or {}).get("structural") or "other"
        row = (key, whole(q["imageId"]) + ".jpg", whole(q["question"]), (whole(q["answer"]),), whole(kind))
        found.append(row)
    return found


def read_gqa(folder: Path) -> list:
    return [(q.id, q.image, q.text, q.answers, q.kind) for q in vqa.read("gqa", folder / "gqa.json", None)]


def textvqa() -> dict:
    told = [["box"] * 10, ["dot"] * 4 + ["box"] * 6, ["dot"] * 10]
    rows = [(5, "7a", "What?", told[0]), (3, "7a", "Where?", told[1]), (4, "1f", "Which box?", told[2])]
    keys = ("question_id", "image_id", "question", "answers")
    return {"dataset_type": "val", "data": [dict(zip(keys, row, strict=True)) for row in rows]}


def naive_textvqa(content: dict) -> list:
    found, items = [], content["data"]
    if len({q["question_id"] for q in items}) < len(items) or any(len(q["answers"]) != 10 for q in items):
        raise ValueError("ids or answers")
    for q in items:
        told = tuple(map(whole, q["answers"]))
        found.append(
            (q["question_id"], f"train_images/{whole(q['image_id'])}.jpg", whole(q["question"]), told, "")
        )
    return found


def read_textvqa(folder: Path) -> list:
    found = vqa.read("textvqa", folder / "textvqa.json", None)
    return [(q.id, q.image, q.text, q.answers, q.kind) for q in found]


TEXTVQA = Format("textvqa.json", textvqa(), {"vqa": Reader(read_textvqa, naive_textvqa)})
GQA = Format("gqa.json", gqa(), {"vqa": Reader(read_gqa, naive_gqa)})
ASKED = [vqa.Question(i, "7.jpg", "What?", ("box",) * 10, "other") for i in (3, 5, 4)]
ANSWERS = [{"question_id": i, "answer": "box"} for i in (5, 3, 4)]


def naive_answers(content: list) -> dict:
    rows = [
        (r.get("question_id", r.get("questionId")), whole(r.get("answer", r.get("prediction"))))
        for r in content
    ]
    if sorted(key for key, _ in rows) != [3, 4, 5]:
        raise ValueError("not the questions")
    return dict(rows)


VQA_RESULTS = Format(
    "results.json",
    ANSWERS,
    {"vqa": Reader(lambda f: vqa.read_results(f / "results.json", ASKED), naive_answers)},
)
CAPTION_RESULTS = Format(
    "results.json",
    [{"image_id": i, "caption": t} for i, t in zip((7, 3, 12), TEXTS, strict=False)],
    {
        "eval_caption": Reader(
            lambda folder: eval_caption.read_results(folder / "results.json"),
            lambda content: {r["image_id"]: whole(r["caption"]) for r in content},
        )
    },
)
NAMES = {"names": {"a_b": "one", "02": "two", "c": "three"}, "templates": ["a {}.", "the {}"]}


def read_classes(folder: Path) -> list:
    folder = folder / "classes"
    for name in ("a b", "2", "c"):
        (folder / name).mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name / "1.png")
    found = zeroshot.open_set("shapes", folder)
    images = {
        Path(image).parent.name: found.texts[k] for image, k in zip(found.images, found.target, strict=True)
    }
    return [sorted(images.items()), found.texts, found.templates]


def naive_classes(content: dict) -> list:
    names = {key: value for key, value in content["names"].items() if type(value) is str and value or 1 / 0}
    plain = {str(int(key)) if key.isdecimal() else key.replace("_", " "): name for key, name in names.items()}
    if len(plain) < len(names):
        raise ValueError("two of one name")
    images = [(folder, plain[folder]) for folder in ("2", "a b", "c")]
    if not all(t.count("{}") == 1 == t.count("{") for t in content["templates"]) or not content["templates"]:
        raise ValueError("templates")
    return [images, list(names.values()), content["templates"]]


CLASSES = Format("classes/names.json", NAMES, {"zeroshot": Reader(read_classes, naive_classes)})


@pytest.mark.parametrize(
    "format, seeds",
    [
        pytest.param(DETECTION, range(60), id="detection"),
        pytest.param(SEGMENTATION, range(100, 180), id="segmentation"),
        pytest.param(PANOPTIC, range(200, 260), id="panoptic"),
        pytest.param(POSE, range(300, 360), id="pose"),
        pytest.param(CAPTIONS, range(400, 440), id="captions"),
        pytest.param(KARPATHY, range(500, 560), id="karpathy"),
        pytest.param(LAVIS, range(600, 630), id="lavis"),
        pytest.param(NOCAPS, range(650, 690), id="nocaps"),
        pytest.param(QUESTIONS, range(700, 740), id="questions"),
        pytest.param(ANNOTATIONS, range(750, 790), id="annotations"),
        pytest.param(GQA, range(800, 840), id="gqa"),
        pytest.param(TEXTVQA, range(1000, 1040), id="textvqa"),
        pytest.param(VQA_RESULTS, range(850, 890), id="vqa results"),
        pytest.param(CAPTION_RESULTS, range(900, 930), id="caption results"),
        pytest.param(CLASSES, range(950, 990), id="names"),
    ],
)
def test_annotations_and_texts_are_read_or_refused(tmp_path, format, seeds):
    """COCO's files by training and evaluation alike."""
    trials(format, write_world(tmp_path / "data"), seeds)


# --- what is scored again: eval_heads.py --results


def boxes_found() -> list:
    return [
        {"image_id": image, "category_id": 4 if i > 5 else 1, "bbox": box, "score": 0.9}
        for i, (image, box) in BOXES.items()
    ]


def masks_found() -> list:
    return [
        {**{k: v for k, v in r.items() if k != "bbox"}, "segmentation": compressed(rectangle(*r["bbox"]))}
        for r in boxes_found()
    ]


def poses_found() -> list:
    known = ("image_id", "category_id", "keypoints")
    return [
        {**{k: a[k] for k in known}, "score": 0.9} for a in keypoints()["annotations"] if not a["iscrowd"]
    ]


def segments_found() -> dict:
    return {k: v for k, v in panoptic().items() if k != "images"}


def captions_found() -> list:
    return [{"image_id": image["id"], "caption": text} for image, text in zip(IMAGES, TEXTS, strict=False)]


def again(task: str, kept: dict) -> Callable:
    """Scores of a results file, on the annotations of a world that is read once."""

    def read(folder: Path) -> dict:
        args = options(folder, out=folder)
        if task not in kept:
            kept[task] = validation.open_items(task, args)
        scorer = eval_heads.open_scorer(task, kept[task], args)
        path = folder / "results.json"
        results = scorer.read(path)
        try:
            return scorer.score(results, folder=folder / "annotations" / f"panoptic_{SPLIT}")[0]
        except ValueError as error:  # as report() does
            raise ValueError(f"{path}: {error}") from error

    return read


def true_results(task: str) -> dict:
    known = dict(detection=boxes_found, segmentation=masks_found, pose=poses_found, panoptic=segments_found)
    return {**known, "captioning": captions_found}[task]()


@pytest.mark.parametrize(
    "task, seeds", [(task, range(1000 + 50 * k, 1040 + 50 * k)) for k, task in enumerate(tasks.NAMES)]
)
def test_results_are_scored_or_refused(tmp_path, task, seeds):
    """What is accepted scores as the same list given to pycocotools as it is; others are in 0..100."""
    folder, kept = write_world(tmp_path / "coco"), {}
    for format in (DETECTION, PANOPTIC, POSE, CAPTIONS):
        (folder / format.file).write_text(json.dumps(format.content))
    read, content, failed = again(task, kept), true_results(task), []
    (folder / "results.json").write_text(json.dumps(content))
    full = read(folder)
    assert task == "captioning" or next(iter(full.values())) == pytest.approx(100)
    for seed in seeds:
        place, value = draw(np.random.default_rng(seed), content)
        (folder / "results.json").write_text(json.dumps(spoil(content, place, value)))
        found = attempt(read, folder)
        if isinstance(found, Exception):
            item = r"\[\d+\] of \d+|images?\b|\.png|categor" if len(place) > 1 else None
            why = complaint(found, None, ["results.json", ".png"], item)
        else:
            good = all(score is None or 0 <= score <= 100.001 for score in found.values())
            if kind := dict(detection="bbox", segmentation="segm", pose="keypoints").get(task):
                items, spoilt = kept[task], spoil(content, place, value)
                sigmas = items.categories[0].get("sigmas")
                plain = average_precision(items.truth, spoilt, kind, items.image_ids, sigmas)
                good = good and plain == found
            why = None if good or task == "captioning" else f"scored {found}"
        if why:
            failed.append(f"seed {seed}: {place} = {value!r:.80}: {why}")
    assert not failed, "\n".join([f"{len(failed)} cases", *failed])


# --- words and marked objects


def word(text: str) -> bytes:
    data = BytesIO()
    Image.new("RGB", (9, 4), (len(text) * 9, 0, 0)).save(data, "PNG")
    return data.getvalue()


LABELS = ["Box", "two words", "caf\u00e9", "7-up"]


def read_words(folder: Path) -> list:
    """(label, (red of its picture, or None)) of every word, by both ways in."""
    sets = words.find([str(folder)])
    stream = words.WordStream({"all": sets}, words.CHARSETS[94], (4, 9), seed=0, skip_bad=True)
    found = []
    for item in (words.Words(sets, (4, 9))[i] for i in range(sum(map(len, sets.values())))):
        if isinstance(item, Exception):
            assert "\n" not in str(item) and folder.name in str(item), item
            continue
        found.append((item[1]["label"], int(item[0][0, 0, 0])))
    sample = stream[0, None]
    if isinstance(sample, Exception):
        raise sample
    return found


@pytest.mark.parametrize("seed", range(1300, 1340))
def test_listed_words_are_read_or_refused(tmp_path, seed):
    """What is left of a gt.txt: the words whose line and picture are whole."""
    rng, folder = np.random.default_rng(seed), tmp_path / "words"
    folder.mkdir()
    for k, text in enumerate(LABELS):
        (folder / f"{k}.png").write_bytes(word(text))
    data = "".join(f"{k}.png\t{text}\r\n" for k, text in enumerate(LABELS)).encode()
    data = spoil_bytes(rng, data) if rng.random() < 0.8 else data
    (folder / "gt.txt").write_bytes(data)
    if rng.random() < 0.5:
        (folder / "1.png").write_bytes(word(LABELS[1])[: rng.integers(40)])  # not its end alone
    expected = []
    for line in (
        data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    ):
        if not line.strip():
            continue
        name, tab, label = line.partition("\t")
        if not tab:
            expected = ValueError("no TAB")
            break
        if re.fullmatch(r"[0-3]\.png", name) and (folder / name).read_bytes() == word(LABELS[int(name[0])]):
            expected.append((label, len(LABELS[int(name[0])]) * 9))
    if (
        not expected
        or isinstance(expected, list)
        and all(words.unusable(t, words.CHARSETS[94]) for t, _ in expected)
    ):
        expected = attempt(lambda: 1 / 0)
    assert (why := complaint(attempt(read_words, folder), expected, ["gt.txt", "words", "all:"])) is None, why


PAGE = 4096  # bytes, of an LMDB


def write_lmdb(folder: Path, records: dict[bytes, bytes]) -> None:
    with lmdb.open(str(folder), map_size=1 << 20) as environment, environment.begin(write=True) as batch:
        for key, value in records.items():
            batch.put(key, value)


@pytest.mark.parametrize("seed", range(1400, 1440))
def test_lmdb_words_are_read_or_refused(tmp_path, seed):
    """A record that is missing, doubled or something else, a file cut off, or a page of no kind.

    Other bytes of the file stay: liblmdb follows its pointers unchecked, and keeps no checksum.
    """
    rng, folder = np.random.default_rng(seed), tmp_path / "words"
    records = {b"num-samples": b"4"}
    for k, text in enumerate(LABELS, 1):
        records |= {b"image-%09d" % k: word(text), b"label-%09d" % k: text.encode()}
    key, kind = list(records)[rng.integers(len(records))], rng.integers(7)
    if kind == 0:
        records.pop(key)
    elif kind < 4:
        records[key] = [spoil_bytes(rng, records[key]), b"x", b"-1", b"9" * 30, b"0", b"\xb2"][
            rng.integers(6)
        ]
    write_lmdb(folder, records)
    data = (folder / "data.mdb").read_bytes()
    if kind == 4:
        (folder / "data.mdb").write_bytes(data[: rng.integers(len(data))])
    if kind == 5:
        flags = 2 * PAGE + 10  # all is on the page behind the two of the head
        (folder / "data.mdb").write_bytes(data[:flags] + b"\0\0" + data[flags + 2 :])
    expected, count = [], records.get(b"num-samples", b"").strip()
    if kind in (4, 5) or not (count.isdigit() and 0 < int(count)) or int(count) > 4:
        expected = ValueError("cut off, or no count")
    elif any(b"label-%09d" % k not in records for k in range(1, int(count) + 1)):
        expected = ValueError("a label is missing")
    else:
        for k in range(1, int(count) + 1):
            if records.get(b"image-%09d" % k) in map(word, LABELS):
                expected.append((records[b"label-%09d" % k].decode(errors="replace"), len(LABELS[k - 1]) * 9))
    found = attempt(read_words, folder)
    if kind in (1, 2, 3) and key.startswith(b"image") and not isinstance(found, Exception):
        expected = [row for row in expected if row in found] if len(found) == len(expected) + 1 else expected
        found = [row for row in found if row in expected]  # changed pixels are a picture, too
    assert (why := complaint(found, expected, ["data.mdb", "words", "all:"])) is None, f"{kind} {key}: {why}"


def record(name: str) -> dict:
    return {"input": "which?\nbox\ndot", "image_str": base64.b64encode(word(name)).decode(), "outputs": name}


@pytest.mark.parametrize("seed", range(1500, 1540))
def test_records_of_marked_objects_are_used_or_counted(tmp_path, seed):
    rng, path = np.random.default_rng(seed), tmp_path / "train.jsonl"
    content = [record("box"), record("dot"), record("box")]
    lines = [json.dumps(line).encode() for line in content]
    at = int(rng.integers(3))
    if rng.random() < 0.4:
        lines[at] = spoil_bytes(rng, lines[at])
    else:
        lines[at] = json.dumps(
            spoil(
                content,
                *(
                    ((at,), draw(rng, content)[1])
                    if rng.random() < 0.2
                    else ((at, *draw(rng, content[at])[0]), "x")
                ),
            )[at]
        ).encode()
    path.write_bytes(b"\n".join(lines))
    names = ["box", "dot"]
    expected = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            told = json.loads(line)
            Image.open(BytesIO(base64.b64decode(told["image_str"], validate=True)))
            if whole(told["outputs"]).strip() in names:
                expected.append((number, told["outputs"].strip()))
        except Exception:
            continue

    def read(path: Path) -> list:
        data = goi.Records(path, (4, 4), names)
        for i in range(len(data)):
            item = data[i]
            assert not isinstance(item, Exception) or str(item).startswith(
                f"{path}:{data.where(i)['line']}: "
            )
        return [(data.where(i)["line"], names[label]) for i, label in enumerate(data.labels)]

    assert (why := complaint(attempt(read, path), expected, ["train.jsonl"])) is None, why


# --- LoRA and head files, checkpoints


def spoil_tensors(rng: np.random.Generator, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One is missing, renamed, of another shape or type, or holds what is no number; or one too many."""
    state, name = dict(state), list(state)[rng.integers(len(state))]
    value = state.pop(name)
    match rng.integers(7):
        case 1:
            state[f"{name}x"] = value
        case 2:
            state[name] = value[..., :-1] if value.ndim else value[None]
        case 3:
            state[name] = value.to([torch.int64, torch.bool, torch.complex64][rng.integers(3)])
        case 4:
            state[name] = value.half()
        case 5:
            flat = value.float().flatten()
            flat[rng.integers(len(flat))] = [math.nan, math.inf, -math.inf][rng.integers(3)]
            state[name] = flat.view(value.shape)
        case 6:
            state |= {name: value, "more": value.clone()}
    return state


def plain(data: bytes, kind: str) -> tuple[dict, dict]:
    """The header and {name: array} of a safetensors file, by its documented layout."""
    start = 8 + int.from_bytes(data[:8], "little")
    content = json.loads(data[8:start])
    header, state, last = json.loads(content.pop("__metadata__")[kind]), {}, 0
    types = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "BOOL": "?"}
    for name, told in content.items():
        begin, end = told["data_offsets"]
        values = np.frombuffer(data[start + begin : start + end], types[told["dtype"]])
        state[name], last = values.reshape(told["shape"]), max(last, start + end)
    assert last == len(data)
    return header, state


def contents(state: dict) -> dict:
    return {name: np.asarray(value, np.float32).tobytes() for name, value in state.items()}


class ModelFile(NamedTuple):
    """fits(header) says whether it can be used; readers: path -> what the header said, the tensors used"""

    kind: str
    header: dict
    state: dict[str, Tensor]
    fits: Callable
    told: Callable
    readers: dict[str, Callable]

    def naive(self, data: bytes) -> tuple:
        header, state = plain(data, self.kind)
        assert self.fits(header) and state.keys() == self.state.keys()
        for name, value in state.items():
            assert np.isfinite(value).all() and value.shape == self.state[name].shape
            assert (value.dtype.kind == "f") == self.state[name].is_floating_point()
        return self.told(header), contents(state)

    def trial(self, rng: np.random.Generator, path: Path) -> str | None:
        header, state, where = self.header, self.state, rng.random()
        if where < 0.55:
            header = spoil(header, *draw(rng, header))
        elif where < 0.85:
            state = spoil_tensors(rng, state)
        files.save(state, path, **{self.kind: header})
        if where >= 0.85:
            path.write_bytes(spoil_bytes(rng, path.read_bytes()))
        expected = attempt(self.naive, path.read_bytes())
        outcomes = {name: attempt(read, path) for name, read in self.readers.items()}
        wrong = [
            f"{n}: {why}" for n, found in outcomes.items() if (why := complaint(found, expected, [path.name]))
        ]
        if not isinstance(expected, Exception):
            wrong += [
                f"{n}: refused: {found}" for n, found in outcomes.items() if isinstance(found, Exception)
            ]
        return "; ".join(wrong) or None


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)


def tower() -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": Attention()})])})


def load_lora(path: Path) -> tuple:
    model = tower()
    header = lora.load(model, path)
    layer = next(iter(lora.layers(model).values()))
    assert layer.alpha == header["alpha"] and layer.rank == header["rank"]
    return layer.alpha, contents({k: v.detach() for k, v in lora.parameters(model).items()})


def export_lora(path: Path) -> tuple:
    weights = {"blocks.0.attn.qkv.weight": torch.zeros(24, 8)}
    _, updates, _ = convert.read_lora(str(path), weights, "timm", "weights")
    (layer,) = updates.values()
    return layer.alpha, contents(
        {f"blocks.0.attn.qkv.{part}": getattr(layer, part) for part in ("lora_A", "lora_B")}
    )


def lora_file() -> ModelFile:
    model = lora.attach(tower(), rank=2, alpha=4.0)
    state = {name: torch.randn(p.shape) for name, p in lora.parameters(model).items()}

    def fits(header: dict) -> bool:
        alpha, targets = header["alpha"], header["targets"]
        good = type(header["rank"]) is int and header["rank"] == 2 and type(alpha) in (int, float)
        return (
            good
            and 0 < alpha < 1e9
            and type(targets) is list
            and "qkv" in targets
            and {*map(type, targets)} == {str}
        )

    header = {"rank": 2, "alpha": 4.0, "targets": ["qkv"], "backbone": "eva_mini", "step": 7}
    readers = {"load": load_lora, "convert": export_lora}
    return ModelFile("lora", header, state, fits, lambda header: header["alpha"], readers)


def head_file(task: str) -> ModelFile:
    def config_of(head: nn.Module) -> dict:
        return json.loads(json.dumps(head.config))

    if task == "ocr":
        head = OcrHead(8, 12, "abc", longest=9, width=8, depth=1)
        backbone = SimpleNamespace(dim=8)
        read = lambda path: eval_ocr.load_head(path, backbone)[0]  # noqa: E731
    else:
        persons = [{"id": 1, "name": "person", "keypoints": JOINTS, "mirror": [0, 2, 1]}]
        made = {"vocabulary": ["<pad>", "a", "red", "<unk>", "<start>", "<end>"]}
        head = tasks.find(task).Head(8, **(made if task == "captioning" else {"categories": persons}))
        read = lambda path: tasks.load_head(path, 8)  # noqa: E731
    known = config_of(head)

    def fits(header: dict) -> bool:
        config = header["config"]
        if type(header["task"]) is not str or task != "ocr" and header["task"] != task:
            return False
        if type(config["dim"]) is not int or config["dim"] != 8:
            return False
        if {*config} - {"simple"} != {*known}:
            return False
        if task == "captioning":
            words = config["vocabulary"]
            special = [words[0], *words[-3:]] == ["<pad>", "<unk>", "<start>", "<end>"]
            return type(words) is list and len(words) == 6 and {*map(type, words)} == {str} and special
        if task == "pose":
            (category,) = config["categories"]
            good = type(category["id"]) in (int, str) and type(category["name"]) is str
            good = good and (type(category["id"]) is str or abs(category["id"]) < 2**63)
            mirror = category["mirror"]
            return good and len(category["keypoints"]) == 3 and mirror in ([0, 1, 2], [0, 2, 1], [1, 0, 2])
        sizes = all(type(config[k]) is int and config[k] == known[k] for k in ("tokens", "width", "depth"))
        longest, charset = config["longest"], config["charset"]
        return (
            sizes
            and type(longest) is int
            and 0 < longest <= 11
            and type(charset) is str
            and len(charset) == 3
        )

    def load(path: Path) -> tuple:
        loaded = read(path)
        assert task == "ocr" or not loaded.training
        return config_of(loaded), contents(loaded.state_dict())

    header = {"task": task, "config": known, "step": 3, "backbone": "eva_mini"}
    told = lambda header: {k: header["config"][k] for k in known}  # noqa: E731
    return ModelFile("head", header, head.state_dict(), fits, told, {"load": load})


@pytest.mark.parametrize(
    "make, seeds",
    [
        pytest.param(lora_file, range(1600, 1700), id="lora"),
        pytest.param(lambda: head_file("ocr"), range(1700, 1760), id="ocr"),
        pytest.param(lambda: head_file("captioning"), range(1800, 1825), id="captioning"),
        pytest.param(lambda: head_file("pose"), range(1850, 1875), id="pose"),
    ],
)
def test_model_files_are_loaded_or_refused(tmp_path, make, seeds):
    torch.manual_seed(0)
    file, path = make(), tmp_path / "model.safetensors"
    files.save(file.state, path, **{file.kind: file.header})
    for read in file.readers.values():
        assert read(path) == (file.told(file.header), contents(file.state))
    failed = [
        f"seed {seed}: {why}" for seed in seeds if (why := file.trial(np.random.default_rng(seed), path))
    ]
    assert not failed, "\n".join([f"{len(failed)} cases", *failed])


def test_checkpoints_are_resumed_from_or_refused(tmp_path):
    """Spoilt in one place, or in its bytes; of the optimizer's state, the whole of it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        failed = [f"seed {seed}: {why}" for seed in range(1900, 1960) if (why := resume(seed, tmp_path))]
    finally:
        dist.destroy_process_group()
    assert not failed, "\n".join([f"{len(failed)} cases", *failed])


def resume(seed: int, folder: Path) -> str | None:
    rng, args = np.random.default_rng(seed), argparse.Namespace(lr=0.1, batch=2, weights="random")

    def run() -> training.Checkpoint:
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        optimizer = training.sharded_adamw([{"params": list(network.parameters())}])
        scaler, trained = torch.amp.GradScaler("cpu", enabled=False), dict(network.named_parameters())
        training.minimize(network(torch.ones(2, 3)).sum(), optimizer, scaler)
        return training.Checkpoint(folder, args, trained, optimizer, scaler, {"data": "data"}, set())

    path, saved = folder / "last.pt", run()
    path.unlink(missing_ok=True)
    saved.save(5)
    content = torch.load(path, weights_only=True)
    if rng.random() < 0.8:
        place, value = draw(rng, content)
        place = place[:1] if place[:1] == ("optimizer",) else place
        if isinstance(value, Tensor):  # another's place
            value = value.double()
        spoilt = spoil(content, place, value)
        torch.save(spoilt, path)
    else:
        spoilt = content
        path.write_bytes(spoil_bytes(rng, path.read_bytes()))

    def naive() -> tuple:
        assert type(spoilt["step"]) is int and spoilt["step"] >= 0
        assert (
            spoilt["options"] == content["options"] and spoilt["trained"].keys() == content["trained"].keys()
        )
        assert all(v.shape == content["trained"][k].shape for k, v in spoilt["trained"].items())
        return spoilt["step"], contents(spoilt["trained"])

    def load() -> tuple:
        resumed = run()
        step = resumed.load()
        return step, contents({k: v.detach() for k, v in resumed.trained.items()})

    return complaint(attempt(load), attempt(naive), ["last.pt"])
