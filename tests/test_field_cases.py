"""Trouble that people report with annotations and pictures of their own: none of it passes in silence.

Four pictures of 64 x 48 with a box each, spoilt in one place, read as the stages and eval_heads.py do.
"""

import argparse
import copy
import hashlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import tasks
from data import coco, goi, outlines, persons, references, segmentation, validation, vqa
from files import BadImage, open_picture, read_picture
from heads.coco_results import keypoint_results, write_panoptic
from scores.average_precision import average_precision
from scores.panoptic_quality import image_counts

KEYPOINTS = ["nose"] + [
    f"{side}_{part}"
    for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    for side in ("left", "right")
]
SPLIT = "train2017"
KINDS = {"detection": "bbox", "segmentation": "segm", "pose": "keypoints"}


def made() -> dict:
    """c: instances, P: person_keypoints, N: panoptic, T: captions."""
    numbers = (1, 2, 3, 4)
    images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in numbers]
    box = {"category_id": 1, "bbox": [16, 12, 32, 24], "area": 768, "iscrowd": 0}
    box["segmentation"] = [[16, 12, 48, 12, 48, 36, 16, 36]]
    boxes = [{"id": i, "image_id": i, **box} for i in numbers]
    points = {"num_keypoints": 17, "keypoints": [v for k in range(17) for v in (17 + k, 13 + k, 2)]}
    segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 2}]
    things = [{"id": 1, "name": "box", "isthing": 1}, {"id": 2, "name": "blue", "isthing": 0}]
    maps = [{"image_id": i, "file_name": f"{i}.png", "segments_info": segments} for i in numbers]
    texts = [{"id": i, "image_id": i, "caption": f"a red box number {i}"} for i in numbers]
    person = {"id": 1, "name": "person", "keypoints": KEYPOINTS}
    content = {
        "c": {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "box"}]},
        "P": {"images": images, "annotations": [{**b, **points} for b in boxes], "categories": [person]},
        "N": {"images": images, "annotations": maps, "categories": things},
        "T": {"images": images, "annotations": texts},
    }
    return json.loads(json.dumps(content))


@pytest.fixture
def case(tmp_path):
    """case(edit) -> the folder. edit(w) changes w.c, w.P, w.N, w.T, files in w.D (pictures), w.M (PNGs)."""

    def write(edit=lambda w: None) -> Path:
        D, annotations = tmp_path / SPLIT, tmp_path / "annotations"
        M = annotations / f"panoptic_{SPLIT}"
        for folder in (D, M):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        w = SimpleNamespace(D=D, M=M, **made())
        picture, ids = np.full((48, 64, 3), (30, 60, 90), np.uint8), np.full((48, 64, 3), (2, 0, 0), np.uint8)
        picture[12:36, 16:48], ids[12:36, 16:48] = (220, 40, 40), (1, 0, 0)
        for i in (1, 2, 3, 4):
            Image.fromarray(picture).save(D / f"{i}.png")
            Image.fromarray(ids).save(M / f"{i}.png")
        edit(w)
        kinds = {"instances": w.c, "person_keypoints": w.P, "panoptic": w.N, "captions": w.T}
        for kind, content in kinds.items():
            (annotations / f"{kind}_{SPLIT}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def options(folder: Path, **changed) -> argparse.Namespace:
    known = dict(
        coco=folder, split=SPLIT, seed=0, image_scale=0.1, size=None, limit=None, persons=None, captions=None
    )
    known |= dict(min_count=1, data_fraction=1.0, exclude_images=None, skip_bad_images=False)
    return argparse.Namespace(**{**known, **changed})


def train(task: str, folder: Path, **changed) -> list[dict]:
    """The targets of one epoch, by position."""
    stream = tasks.open_stream(task, options(folder, **changed))
    samples = [stream[p, 14] for p in range(len(stream.rows))]
    for sample in samples:
        if isinstance(sample, Exception):
            raise sample
        image, target = sample
        assert image.dtype == torch.uint8 and tuple(image.shape[1:]) == target["size"]
    assert len(stream.fingerprint) == 16
    return [target for _, target in samples]


def items(task: str, folder: Path):
    found = validation.open_items(task, options(folder))
    for i in range(len(found)):
        if isinstance(found[i], Exception):
            raise found[i]
    return found


def average(task: str, folder: Path) -> float | None:
    """AP of the four true boxes, masks or poses given as predictions; each is the middle of its picture."""
    found = items(task, folder)
    ids = found.image_ids
    mask = np.zeros((48, 64), bool)
    mask[12:36, 16:48] = True
    answer = {"bbox": [16, 12, 32, 24]} if task == "detection" else {"segmentation": coded(mask)}
    results = [{"image_id": i, "category_id": found.categories[0]["id"], "score": 0.9, **answer} for i in ids]
    if task == "pose":
        points = found.data.keypoints[0]
        known = {"keypoints": points, "score": 0.9, "area": 768.0}
        results = keypoint_results([{"image_id": i, **known} for i in ids], found.categories)
    sigmas = found.categories[0].get("sigmas")
    return next(iter(average_precision(found.truth, results, KINDS[task], ids, sigmas).values()))


def coded(mask: np.ndarray) -> dict:
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode()}


def refused(task: str, folder: Path, *says: str) -> None:
    """In training and in evaluation, by a line with all of `says`."""
    for read in (train, items):
        with pytest.raises(ValueError) as error:
            read(task, folder)
        text = str(error.value)
        assert all(part in text for part in says) and "\n" not in text, text


def every(w, **changed) -> None:
    for a in w.c["annotations"]:
        for key, value in changed.items():
            a.pop(key) if value is ... else a.update({key: value})


# --- annotations


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda w: None,
        lambda w: [a.update(id=a["id"] - 1) for a in w.c["annotations"]],
        lambda w: every(w, id=7),
        lambda w: every(w, id=...),
        lambda w: every(w, id="one and the same"),
        lambda w: every(w, area=...),
        lambda w: every(w, area=None),
        lambda w: every(w, iscrowd=...),
        lambda w: every(w, iscrowd=None),
        lambda w: every(w, iscrowd=False),
        lambda w: w.c["images"].reverse(),
        lambda w: [x.update({k: 2**62 + x[k]}) for x, k in referring(w)],
        lambda w: [x.update({k: f"img_{x[k]}"}) for x, k in referring(w)],
        lambda w: [x.update({k: -x[k]}) for x, k in referring(w)],
        lambda w: (every(w, category_id="box"), w.c["categories"][0].update(id="box")),
        lambda w: every(w, area=..., segmentation=[16, 12, 48, 12, 48, 36, 16, 36]),
        lambda w: every(w, area=..., segmentation={"size": [48, 64], "counts": runs()}),
    ],
)
def test_ids_areas_and_crowds_mean_what_coco_means(case, task, edit):
    folder = case(edit)
    targets = train(task, folder)
    assert sum(len(t["labels"]) for t in targets) == 4 and len({t["image_id"] for t in targets}) == 4
    assert average(task, folder) == pytest.approx(100)


def referring(w) -> list:
    return [(i, "id") for i in w.c["images"]] + [(a, "image_id") for a in w.c["annotations"]]


def runs() -> list[int]:
    """Of the box, column by column."""
    return [16 * 48 + 12, *[24, 24] * 31, 24, 12 + 16 * 48]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_an_area_that_is_missing_is_that_of_the_outline(case, task):
    """Of half of the box, a triangle, by pycocotools; the box has 768 pixels."""
    triangle = [16, 12, 48, 12, 48, 36]
    expected = float(rle.area(rle.frPyObjects([triangle], 48, 64))[0])
    found = items(task, case(lambda w: every(w, area=..., segmentation=[triangle]))).truth["annotations"]
    assert {a["area"] for a in found} == {expected} and 360 < expected < 420


def test_what_needs_no_mask_takes_the_area_of_the_box(case):
    assert [a["area"] for a in items("detection", case(lambda w: every(w, area=..., segmentation=...))).truth[
        "annotations"
    ]] == [768] * 4  # fmt: skip


def first(w, **changed) -> None:
    for key, value in changed.items():
        w.c["annotations"][1].pop(key) if value is ... else w.c["annotations"][1].update({key: value})


SECOND = "annotations[1] of 4 (id 2)"


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda w: every(w, iscrowd="0"), ("annotations[0] of 4 (id 1)", "iscrowd", "got '0'")),
        (lambda w: every(w, iscrowd=2), ("annotations[0]", "iscrowd must be 0 or 1, got 2")),
        (lambda w: [a.update(image_id=str(a["image_id"])) for a in w.c["annotations"]], ("'1' (known: 1",)),
        (lambda w: first(w, image_id="2"), (SECOND, "unknown image id '2' (known: 1")),
        (lambda w: first(w, image_id=None), (SECOND, "image_id", "None")),
        (lambda w: first(w, image_id=2.0), (SECOND, "image_id", "2.0")),
        (lambda w: first(w, image_id=[2]), (SECOND, "image_id", "[2]")),
        (lambda w: first(w, category_id=9), (SECOND, "unknown category id 9 (known: 1")),
        (lambda w: first(w, category_id="1"), (SECOND, "unknown category id '1' (known: 1")),
        (lambda w: first(w, category_id=...), (SECOND, "no field category_id")),
        (
            lambda w: w.c["images"].append({**w.c["images"][0], "file_name": "2.png"}),
            ("images[4] of 5 (id 1)", "id 1 is there before, at images[0]"),
        ),
        (lambda w: w.c["images"][1].update(id="2"), ("images[1] of 4 (id '2')", "'2' beside 1")),
        (lambda w: w.c["images"][1].update(id=True), ("images[1]", "id must be", "got True")),
        (lambda w: w.c["images"][1].update(id=2**64), ("images[1]", "64 bits")),
        (lambda w: w.c["images"][1].pop("id"), ("images[1] of 4", "no field id")),
        (
            lambda w: w.c["categories"].append({"id": 1, "name": "other"}),
            ("categories[1] of 2 (id 1)", "before"),
        ),
        (lambda w: w.c["categories"][0].pop("name"), ("categories[0] of 1 (id 1)", "no field name")),
        (
            lambda w: w.c["images"][1].update(width=0, height=0),
            ("images[1] of 4 (id 2)", "positive, got 0 x 0"),
        ),
        (lambda w: w.c["images"][1].update(width=-64), ("images[1] of 4 (id 2)", "positive, got -64 x 48")),
        (
            lambda w: w.c["images"][1].update(width="64"),
            ("images[1]", "width must be a whole number, got '64'"),
        ),
        (lambda w: w.c["images"][1].update(height=math.nan), ("images[1]", "height", "got nan")),
        (lambda w: w.c["images"][1].pop("width"), ("images[1] of 4 (id 2)", "no field width")),
        (
            lambda w: w.c["images"][1].update(file_name=None),
            ("images[1]", "file_name must be text, got None"),
        ),
        (lambda w: w.c["images"].insert(0, 5), ("images[0] of 5", "must be an object, got 5")),
        (lambda w: first(w, bbox=...), (SECOND, "no field bbox")),
        (lambda w: first(w, id="12", bbox=...), ("annotations[1] of 4 (id '12')", "no field bbox")),
        (lambda w: w.c["annotations"].__setitem__(1, None), ("annotations[1] of 4", "an object, got None")),
        (
            lambda w: w.c["annotations"][1]["bbox"].append(0.9),
            (SECOND, "bbox must be [x, y, w, h], got [16,"),
        ),
        (lambda w: w.c["annotations"][1]["bbox"].pop(), (SECOND, "bbox must be")),
        (lambda w: first(w, bbox=[16, 12, None, 24]), (SECOND, "bbox must be")),
        (lambda w: first(w, bbox={"x": 16}), (SECOND, "bbox must be a list")),
        (lambda w: first(w, bbox=[16, 12, 10**400, 24]), (SECOND, "bbox holds a number that is too large")),
        (lambda w: first(w, area=10**400), (SECOND, "area holds a number that is too large")),
        (lambda w: first(w, area="768"), (SECOND, "area must be a number, got '768'")),
        (lambda w: first(w, area=-1), (SECOND, "area must be at least 0, got -1")),
        (lambda w: w.c.pop("images"), ("no list called images",)),
        (lambda w: w.c.update(annotations={}), ("no list called annotations",)),
        (lambda w: w.c.update(categories=None), ("no list called categories",)),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name_in_both(case, edit, says):
    folder = case(edit)
    for task in ("detection", "segmentation"):
        refused(task, folder, f"instances_{SPLIT}.json", *says)
    with pytest.raises(ValueError):
        goi.BoxedCoco(folder, SPLIT, (14, 14))


@pytest.mark.parametrize("edit", [lambda w: every(w, iscrowd=1), lambda w: w.c.update(annotations=[])])
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_nothing_to_train_on_is_refused_and_nothing_to_score_is_told(case, task, edit):
    folder = case(edit)
    with pytest.raises(ValueError, match=r"nothing to train on in 4 images \(.*0 boxes"):
        train(task, folder)
    assert average(task, folder) is None
    assert "all scores are -" in items(task, folder).notes[-1]


def test_boxes_that_hold_nothing_are_dropped_in_both(case):
    for box in (
        [math.nan, 12, 32, 24],
        [16, 12, 0, 24],
        [16, 12, -3, 24],
        [500, 12, 32, 24],
        [1, 1, math.inf, 1],
    ):
        folder = case(lambda w, box=box: first(w, bbox=box))
        stream = tasks.open_stream("detection", options(folder))
        assert len(stream.data.labels) == 3 == len(items("detection", folder).truth["annotations"])
        for notes in (stream.notes, items("detection", folder).notes):
            assert "1 unusable annotations dropped" in notes[1] and SECOND in notes[1]


def test_a_byte_order_mark_is_no_part_of_a_file(case):
    folder = case()
    for path in (folder / "annotations").glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    for task in tasks.NAMES:
        assert len(train(task, folder)) == 4 == len(items(task, folder))
    path = folder / "ids.txt"
    path.write_bytes(b"\xef\xbb\xbf1\n2\n")
    assert coco.read_ids(path) == {1, 2}


def test_ids_to_exclude_are_of_the_images_kind(case):
    folder = case(lambda w: [x.update({k: f"img_{x[k]}"}) for x, k in referring(w)])
    path = folder / "ids.txt"
    path.write_text("img_1\nimg_2\n")
    found = train("detection", folder, exclude_images=path)
    assert {t["image_id"] for t in found} == {"img_3", "img_4"}
    path.write_text("1\n2\n")
    with pytest.raises(ValueError, match="has ids like 1, .* like 'img_1'"):
        train("detection", folder, exclude_images=path)


def test_numbers_of_valid_files_are_what_they_were(case):
    """Ranks and resumed runs compare these: they change only if what is trained on does."""
    stream = tasks.open_stream("detection", options(case()))
    arrays = np.arange(1, 5), np.array([[16, 12, 48, 36]] * 4, np.float32), np.zeros(4, np.int64)
    assert stream.fingerprint == hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]
    stream = tasks.open_stream("segmentation", options(case()))
    texts = json.dumps(made()["c"]["annotations"][0]["segmentation"]).encode() * 4
    arrays = arrays[0].tobytes() + arrays[2].tobytes() + texts
    assert stream.fingerprint == hashlib.sha256(arrays).hexdigest()[:16]


def test_a_file_that_two_tasks_share_is_parsed_once(case, monkeypatch):
    folder, read = case(), []
    monkeypatch.setattr(
        coco, "read_json", lambda path: read.append(path.name) or json.loads(path.read_bytes())
    )
    both = tasks.open_streams(["detection", "segmentation", "panoptic"], options(folder))
    assert sorted(read) == [f"instances_{SPLIT}.json", f"panoptic_{SPLIT}.json"]
    for task, stream in both.items():
        assert stream.fingerprint == tasks.open_stream(task, options(folder)).fingerprint


@pytest.mark.parametrize("task", ["detection", "segmentation", "pose"])
def test_scores_of_a_real_file_are_those_of_pycocotools_on_the_file_itself(real_coco, task):
    """Of answers that are off: every fifth is missing, the others are moved, some are of another category."""
    path = coco.annotation_file(real_coco, {"pose": "person_keypoints"}.get(task, "instances"), "val2017")
    content, rng, results = json.loads(path.read_text()), np.random.default_rng(0), []
    of = {image["id"]: image for image in content["images"]}
    for k, a in enumerate(content["annotations"]):
        result = {"image_id": a["image_id"], "category_id": a["category_id"], "score": float(rng.random())}
        if task == "detection":
            result["bbox"] = (np.array(a["bbox"]) * rng.uniform(0.8, 1.2, 4)).tolist()
        elif task == "pose":
            result["keypoints"] = (np.array(a["keypoints"]) + rng.normal(0, 3, 51)).tolist()
        else:
            image = of[a["image_id"]]
            mask = rle.decode(outlines.code(a["segmentation"], image["height"], image["width"]))
            result["segmentation"] = coded(np.roll(mask, rng.integers(-9, 9, 2), (0, 1)))
        results += [result] * (k % 5 > 0)
    found = validation.open_items(task, options(real_coco, split="val2017"))
    ours = average_precision(found.truth, results, KINDS[task], found.image_ids)
    judge = COCOeval(COCO(path), COCO(path).loadRes(results), KINDS[task])
    judge.evaluate(), judge.accumulate(), judge.summarize()
    known = [100 * v if v >= 0 else None for v in judge.stats.tolist()]
    assert list(ours.values()) == known[: len(ours)] and 1 < known[0] < 99


# --- outlines


GOOD = [16, 12, 48, 12, 48, 36, 16, 36]


@pytest.mark.parametrize("value", [[], ..., None, [[]], [[1, 2, 3, 4]]])
def test_objects_without_an_outline_are_dropped_in_both(case, value):
    folder = case(lambda w: first(w, segmentation=value))
    stream, found = tasks.open_stream("segmentation", options(folder)), items("segmentation", folder)
    assert len(stream.data.labels) == 3 == len(found.truth["annotations"])
    for notes in (stream.notes, found.notes):
        assert "1 unusable annotations dropped, without a usable outline" in "; ".join(notes)
        assert SECOND in "; ".join(notes)
    assert len(train("detection", folder)) == 4  # which needs none


@pytest.mark.parametrize(
    "part, why",
    [
        ([3, 3, 3, 9], "fewer than three points"),
        ([3, 3, 3, 9, 5], "odd count"),
        ([], "fewer than three points"),
        ([-164, -221, 2.08e8, 3.5e8, 225, 236, 272, 384], "not finite, or beyond 10 times"),
        ([16, 12, math.nan, 12, 48, 36], "not finite"),
        ([16, 12, math.inf, 12, 48, 36], "not finite"),
        ([16, 12, 10**400, 12, 48, 36], "beyond 10 times"),
        ([16, 12, None, 12, 48, 36], "not numbers"),
        ([16, 12, "30", 12, 48, 36], "not numbers"),
        ([[16, 12], [48, 12], [48, 36]], "not numbers"),
        ("16,12,48,12,48,36", "not numbers"),
    ],
)
def test_bad_parts_are_dropped_not_objects(case, part, why):
    for parts in ([part, GOOD], [GOOD, part]):
        folder = case(lambda w, parts=parts: first(w, segmentation=parts))
        stream, found = tasks.open_stream("segmentation", options(folder)), items("segmentation", folder)
        assert next(stream.masks(1)).sum() == 768 and len(stream.data.labels) == 4
        assert average("segmentation", folder) == pytest.approx(100)
        for notes in (stream.notes, found.notes):
            assert "1 parts of outlines dropped" in notes[1] and why in notes[1] and SECOND in notes[1]
    alone = tasks.open_stream("segmentation", options(case(lambda w: first(w, segmentation=[part]))))
    assert len(alone.data.labels) == 3


def test_a_width_that_no_picture_has_does_not_reach_pycocotools(case):
    """The mask is asked for its area before the picture is seen."""
    far = [16, 12, 1.9e9, 12, 1.9e9, 1.9e9]
    folder = case(
        lambda w: (first(w, segmentation=[far], area=...), w.c["images"][1].update(width=2_000_000_000))
    )
    for task in ("detection", "segmentation"):
        with pytest.raises(BadImage, match="2.png is 64 x 48 pixels, its annotations say 2000000000 x 48"):
            items(task, folder)


def test_a_flat_list_is_one_polygon(case):
    folder = case(lambda w: first(w, segmentation=GOOD))
    assert next(tasks.open_stream("segmentation", options(folder)).masks(1)).sum() == 768
    assert average("segmentation", folder) == pytest.approx(100)
    flat = case(lambda w: first(w, segmentation=[16, 12, None, 12, 48, 36]))
    assert len(tasks.open_stream("segmentation", options(flat)).data.labels) == 3


@pytest.mark.parametrize(
    "value, says",
    [
        ({"size": [48, 64], "counts": [780, 24, 24, 24]}, "sum to 48 x 64, got [780, 24, 24, 24]"),
        ({"size": [48, 64], "counts": [0, 100000]}, "sum to 48 x 64"),
        ({"size": [48, 64], "counts": []}, "sum to 48 x 64"),
        ({"size": [48, 64], "counts": [780, -24, 2316]}, "must be at least 0"),
        ({"size": [48, 64], "counts": [780.0, 24, 2268]}, "whole numbers"),
        ({"size": [48, 64], "counts": [780, None, 2268]}, "whole numbers"),
        ({"size": [48, 64], "counts": [2**64]}, "whole numbers"),
        ({"size": [48, 64], "counts": None}, "got None"),
        ({"size": [48, 64]}, "got None"),
        ({"counts": [780, 24, 2268]}, "for an image of None, it has [48, 64]"),
        ({}, "for an image of None"),
        ({"size": [48, 64], "counts": "b'h8h0`0'"}, "compressed text"),
        ({"size": [48, 64], "counts": "zzzzzz"}, "compressed text"),
        ({"size": [48, 64], "counts": "h8h"}, "compressed text"),
        ({"size": [48, 64], "counts": "h8"}, "sum to 48 x 64"),
        ({"size": [48, 64], "counts": "\u00e9"}, "compressed text"),
        ({"size": [64, 48], "counts": [1036, 24, 2024]}, "for an image of [64, 48], it has [48, 64]"),
        ("16,12,48,12", "polygons or run lengths"),
        (7, "polygons or run lengths"),
    ],
)
def test_wrong_run_lengths_are_refused_by_name(case, value, says):
    refused("segmentation", case(lambda w: first(w, segmentation=value)), SECOND, says)


def test_compressed_run_lengths_are_pycocotools():
    rng = np.random.default_rng(0)
    for k in range(200):
        mask = np.kron(rng.random(rng.integers(1, 20, 2)) < rng.random(), np.ones((1 + k % 9, 1 + k % 7)))
        text = rle.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        flat, changes = mask.flatten("F"), np.flatnonzero(np.diff(mask.flatten("F"))) + 1
        known = np.diff([0] * (1 + int(flat[0])) + [*changes, flat.size])
        np.testing.assert_array_equal(outlines.decode(text), known)


def test_compressed_text_trains_and_scores(case):
    mask = np.zeros((48, 64), bool)
    mask[12:36, 16:48] = True
    folder = case(lambda w: every(w, segmentation=coded(mask), area=...))
    assert next(tasks.open_stream("segmentation", options(folder)).masks(2)).sum() == 768
    assert average("segmentation", folder) == pytest.approx(100)


# --- pictures


def test_grey_of_16_bits_is_scaled(case):
    grey = np.linspace(0, 32767, 48 * 64).reshape(48, 64).astype(np.uint16)
    folder = case(lambda w: Image.fromarray(grey).save(w.D / "3.png"))
    found = read_picture(folder / SPLIT / "3.png")
    np.testing.assert_allclose(found[0].numpy(), grey / 257, atol=0.51)
    assert len(train("detection", folder)) == 4 == len(items("detection", folder))


def test_floats_are_scaled_or_refused(tmp_path):
    values = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_allclose(read_picture(tmp_path / "a.tif")[1].numpy(), 255 * values, atol=0.51)
    for wrong in (values * 255, values - 0.5, values * np.nan):
        Image.fromarray(wrong).save(tmp_path / "b.tif")
        with pytest.raises(BadImage, match="b.tif cannot be decoded .numbers from .*, expected 0 to 1"):
            read_picture(tmp_path / "b.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "c.tif")
    with pytest.raises(BadImage, match="32-bit whole numbers from 70000"):
        read_picture(tmp_path / "c.tif")


def test_every_mode_is_rgb(tmp_path):
    """Opaque pictures as they were; what is transparent lies on white."""
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    plain = Image.fromarray(rgb)
    assert np.array_equal(np.array(open_picture(rgb)), rgb)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"):
        image = plain.convert(mode)
        image.save(tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png"))
        expected = np.array(image.convert("RGB"))
        found = np.array(open_picture(tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")))
        np.testing.assert_array_equal(found, expected, mode)
    half = np.dstack([rgb, np.full((20, 30), 51, np.uint8)])
    half[0, :, 3] = 0
    Image.fromarray(half).save(tmp_path / "a.png")
    found = np.array(open_picture(tmp_path / "a.png")).astype(float)
    np.testing.assert_allclose(found[1:], 0.8 * 255 + 0.2 * rgb[1:], atol=1)
    assert (found[0] == 255).all()
    palette = plain.convert("P")
    palette.save(tmp_path / "p.png", transparency=int(np.array(palette)[0, 0]))
    assert np.array(open_picture(tmp_path / "p.png"))[0, 0].tolist() == [255] * 3
    frames = [Image.new("RGB", (5, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array(open_picture(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


def test_more_pixels_than_pillow_takes_are_a_bad_picture(case, monkeypatch):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 1500
    )  # of the 48 x 64 of all of them: twice as many are refused

    def edit(w):
        for i in (1, 2, 4):
            Image.new("1", (20, 20)).save(w.D / f"{i}.png")
            w.c["images"][i - 1].update(width=20, height=20)

    folder = case(edit)
    for read in (train, items):
        with pytest.raises(BadImage, match="3.png cannot be decoded .*pixels"):
            read("detection", folder)
    found = train("detection", folder, skip_bad_images=True)
    assert sum(t["skipped"] == ["3.png"] for t in found) == 1


def test_whatever_a_decoder_raises_is_a_bad_picture(case, monkeypatch):
    folder = case()
    for error in (KeyError("x"), MemoryError(), RuntimeError("broken"), EOFError(), OverflowError()):

        def fail(self, *mode, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "convert", fail)
            with pytest.raises(BadImage, match="1.png cannot be decoded"):
                read_picture(folder / SPLIT / "1.png")
    (folder / SPLIT / "2.png").write_bytes((folder / SPLIT / "2.png").read_bytes()[:60])
    with pytest.raises(BadImage, match=r"2.png cannot be decoded .*: restore it, or use --skip-bad-images"):
        train("detection", folder)
    with pytest.raises(BadImage) as told:
        read_picture(folder / SPLIT / "2.png")
    assert "--skip-bad-images" not in str(told.value)


@pytest.mark.parametrize("size", [(3000, 4), (4, 3000), (1, 1)])
def test_narrow_and_tiny_pictures_train_and_are_evaluated(case, size):
    w, h = size

    def edit(c):
        for content in (c.c, c.P):
            content["images"][2].update(width=w, height=h)
            content["annotations"][2].update(bbox=[0, 0, w, h], segmentation=[[0, 0, w, 0, w, h, 0, h]])
        c.T["images"][2].update(width=w, height=h)
        Image.new("RGB", size).save(c.D / "3.png")

    folder = case(edit)
    for task in ("detection", "segmentation", "captioning", "pose"):
        for scale in (0.1, 1.0):
            found = train(task, folder, image_scale=scale)
            assert {t["orig_size"] for t in found} == {(48, 64), (h, w)}
        assert len(items(task, folder)) == 4
    assert len([goi.BoxedCoco(folder, SPLIT, (14, 14))[i] for i in range(4)]) == 4
    stream = tasks.open_stream("detection", options(folder, image_scale=1.0))
    for p in range(40):  # whatever is drawn
        assert not isinstance(stream[p, 14], Exception)


def test_exif_is_not_applied_and_is_named_where_sizes_disagree(case):
    def turned(orientation, size):
        def edit(w):
            exif = Image.Exif()
            exif[0x0112] = orientation
            pixels = np.zeros((48, 64, 3), np.uint8)
            pixels[:24] = 200
            Image.fromarray(pixels).save(w.D / "3.jpg", exif=exif)
            w.c["images"][2].update(file_name="3.jpg", width=size[0], height=size[1])

        return edit

    for orientation in (3, 6, 8):  # where the sizes agree: the pixels as they are stored
        folder = case(turned(orientation, (64, 48)))
        assert len(train("detection", folder)) == 4
        assert read_picture(folder / SPLIT / "3.jpg")[0, 0, 0] > 190
    refused("detection", case(turned(6, (48, 64))), "3.jpg is 64 x 48", "say 48 x 64", "EXIF orientation 6")
    for edit in (turned(1, (48, 64)), turned(6, (50, 64))):
        with pytest.raises(BadImage) as error:
            items("detection", case(edit))
        assert "EXIF" not in str(error.value)


@pytest.mark.parametrize(
    "on_disk, named",
    [
        ("sub/1.png", "sub/1.png"),
        ("sub/deep/1.png", "sub//deep/./1.png"),
        ("1.png", "./1.png"),
        ("caf\u00e9.png", "cafe\u0301.png"),
        ("cafe\u0301.png", "caf\u00e9.png"),
        ("cafe\u0301/e\u0301.png", "caf\u00e9/\u00e9.png"),
        ("../elsewhere.png", "../elsewhere.png"),
    ],
)
def test_names_may_hold_folders_and_any_unicode_form(case, on_disk, named):
    def edit(w):
        (w.D / on_disk).parent.mkdir(parents=True, exist_ok=True)
        (w.D / "1.png").rename(w.D / on_disk)
        for content in (w.c, w.P, w.N, w.T):
            content["images"][0].update(file_name=named)

    folder = case(edit)
    for task in tasks.NAMES:
        assert len(train(task, folder)) == 4 == len(items(task, folder))
    assert len(goi.BoxedCoco(folder, SPLIT, (14, 14))) == 4


def test_pictures_that_are_not_there_are_named(case):
    for name in ("gone.png", "sub/1.png", "", "../1.png"):
        folder = case(lambda w, name=name: w.c["images"][2].update(file_name=name))
        for read in (train, items):
            with pytest.raises(FileNotFoundError, match="1 of 4 images not in"):
                read("detection", folder)


# --- panoptic


def test_the_panoptic_png_is_the_one_that_is_named(case):
    def edit(w):
        for a in w.N["annotations"]:
            (w.M / a["file_name"]).rename(w.M / a["file_name"].replace(".png", "_panoptic.png"))
            a["file_name"] = a["file_name"].replace(".png", "_panoptic.png")
            Image.new("RGB", (64, 48), (2, 0, 0)).save(
                w.M / a["file_name"].replace("_panoptic", "")
            )  # another

    folder = case(edit)
    stream = tasks.open_stream("panoptic", options(folder))
    assert [mask.sum() for mask in stream.masks(0)] == [768, 48 * 64 - 768]
    assert len(train("panoptic", folder)) == 4
    found = items("panoptic", folder)
    path = folder / "annotations" / f"panoptic_{SPLIT}" / found.truth[1]["file_name"]
    ids, info = segmentation.read_segments(path), found.truth[1]["segments_info"]
    assert image_counts(ids, info, ids, info, found.categories)[:, 0].tolist() == [1, 1]


def segment(w, **changed) -> None:
    w.N["annotations"][1]["segments_info"][0].update(changed)


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda w: segment(w, id=0), ("segments_info[0] of 2 (id 0)", "not 0, which is void")),
        (lambda w: segment(w, id=-1), ("segments_info[0]", "not 0")),
        (lambda w: segment(w, id=256**3), ("segments_info[0]", "R + 256 G")),
        (lambda w: segment(w, id="1"), ("segments_info[1]", "2 beside '1'")),
        (lambda w: segment(w, id=2), ("segments_info[1]", "id 2 is there before")),
        (lambda w: segment(w, category_id=7), ("segments_info[0]", "unknown category id 7")),
        (lambda w: segment(w, iscrowd="0"), ("segments_info[0]", "iscrowd")),
        (
            lambda w: w.N["annotations"][1].pop("file_name"),
            ("annotations[1] of 4 (image_id 2)", "no field file_name"),
        ),
        (lambda w: w.N["annotations"][1].update(segments_info=None), ("annotations[1]", "segments_info")),
        (lambda w: w.N["annotations"][1].update(image_id=1), ("image_id 1 is there before",)),
        (lambda w: w.N["annotations"][1].update(image_id="2"), ("unknown image id '2' (known: 1",)),
        (lambda w: w.N["categories"][1].pop("isthing"), ("categories[1]", "no field isthing")),
        (lambda w: w.N["categories"].append({"id": 1, "name": "x", "isthing": 0}), ("id 1 is there before",)),
    ],
)
def test_panoptic_ids_have_one_treatment(case, edit, says):
    refused("panoptic", case(edit), f"panoptic_{SPLIT}.json", *says)


def test_panoptic_answers_of_images_with_text_for_ids_are_files(tmp_path):
    for image_id, name in ((7, "000000000007.png"), ("img_7", "img_7.png"), ("a/b c", "a%2Fb%20c.png")):
        answer = {"image_id": image_id, "segments": torch.ones(2, 3).long(), "segments_info": []}
        assert write_panoptic(answer, tmp_path)["file_name"] == name and (tmp_path / name).is_file()


# --- pose


def person(w, **changed) -> None:
    for key, value in changed.items():
        w.P["annotations"][1].pop(key) if value is ... else w.P["annotations"][1].update({key: value})


def five(w, **more) -> None:
    w.P["categories"][0].update(keypoints=KEYPOINTS[:5], **more)
    for a in w.P["annotations"]:
        a.update(keypoints=a["keypoints"][:15], num_keypoints=5)


@pytest.mark.parametrize(
    "edit, says",
    [
        (five, ("'person' has 5 keypoints", "which are of 17", "a list `sigmas` of 5")),
        (lambda w: five(w, sigmas=[0.1] * 4), ("sigmas must be 5 positive numbers",)),
        (lambda w: five(w, sigmas=[0.1] * 4 + [0]), ("sigmas must be 5 positive numbers",)),
        (
            lambda w: [a["bbox"].append(0.9) for a in w.P["annotations"]],
            ("annotations[0] of 4", "bbox must be"),
        ),
        (lambda w: person(w, bbox=[]), (SECOND, "bbox must be [x, y, w, h], got []")),
        (lambda w: person(w, bbox=[16, None, 32, 24]), (SECOND, "bbox must be")),
        (
            lambda w: w.P["annotations"][1]["keypoints"].__setitem__(3, None),
            (SECOND, "keypoints must be numbers"),
        ),
        (
            lambda w: w.P["annotations"][1]["keypoints"].__setitem__(3, math.nan),
            (SECOND, "keypoint", "not finite"),
        ),
        (lambda w: w.P["annotations"][1]["keypoints"].pop(), (SECOND, "50 numbers in keypoints, not 3 x 17")),
        (lambda w: w.P["annotations"][1]["keypoints"].__setitem__(3, 10**400), (SECOND, "too large")),
        (lambda w: person(w, keypoints="none"), (SECOND, "keypoints must be a list")),
        (lambda w: person(w, category_id=9), (SECOND, "unknown category id 9")),
        (lambda w: w.P["categories"][0].pop("keypoints"), ("0 categories have keypoints",)),
        (lambda w: w.P["categories"][0].update(keypoints=[1] * 17), ("keypoints of category 'person'",)),
    ],
)
def test_poses_that_cannot_be_scored_are_refused_before_training(case, edit, says):
    refused("pose", case(edit), f"person_keypoints_{SPLIT}.json", *says)


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: None,
        lambda w: [a.pop("num_keypoints") for a in w.P["annotations"]],
        lambda w: [a.pop("area") for a in w.P["annotations"]],
        lambda w: [a.update(id=0) for a in w.P["annotations"]],
        lambda w: [(a.pop("iscrowd"), a.pop("segmentation"), a.pop("area")) for a in w.P["annotations"]],
        lambda w: five(w, sigmas=[0.1, 0.2, 0.1, 0.05, 0.1]),
        lambda w: w.P["categories"].append({"id": 2, "name": "bat"}),
        lambda w: w.P["categories"].insert(0, {"id": -2, "name": "bat"}),
        lambda w: w.P["annotations"].append({"id": 9, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}),
    ],
)
def test_poses_train_and_score(case, edit):
    folder = case(edit)
    assert len(train("pose", folder)) == 4
    assert average("pose", folder) == pytest.approx(100)


def test_persons_with_a_box_that_is_none_are_dropped_with_a_count(case):
    folder = case(lambda w: person(w, bbox=[math.nan, 12, 32, 24]))
    stream, found = tasks.open_stream("pose", options(folder)), items("pose", folder)
    assert len(stream.ids) == 3 == len(found)
    for notes in (stream.notes, found.notes):
        assert "1 unusable annotations dropped" in notes[1] and SECOND in notes[1]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"image_id": "1"}, "1 images are not in the annotations: '1' (those have ids like 1)"),
        ({"image_id": None}, "results[0] of 1 (image_id None): image_id must be"),
        ({"bbox": [1, 2, 3]}, "results[0] of 1 (image_id 1): bbox must be"),
        ({"score": "high"}, "results[0] of 1 (image_id 1): score must be a number"),
        ({"score": math.nan}, "has no box of a person"),
        ({"bbox": [1, 2, math.nan, 3]}, "has no box of a person"),
    ],
)
def test_detectors_boxes_are_checked(case, change, says):
    folder = case()
    box = {"image_id": 1, "category_id": 1, "bbox": [16, 12, 32, 24], "score": 0.9, **change}
    (folder / "boxes.json").write_text(json.dumps([box]))
    with pytest.raises(ValueError) as error:
        persons.PersonBoxes(folder, SPLIT, boxes=folder / "boxes.json")
    assert says in str(error.value)


# --- captions and questions


@pytest.mark.parametrize("value", [None, 3, ["a", "b"], {"text": "a"}, ...])
def test_captions_that_are_no_text_are_named(case, value):
    def edit(w):
        a = w.T["annotations"][1]
        a.pop("caption") if value is ... else a.update(caption=value)

    folder, says = case(edit), "no field caption" if value is ... else "caption must be text, got"
    refused("captioning", folder, SECOND, says)
    with pytest.raises(ValueError, match=says):
        references.read(folder / "annotations" / f"captions_{SPLIT}.json")


def test_half_a_character_is_replaced_and_counted(case):
    folder = case(lambda w: w.T["annotations"][1].update(caption="a box \ud83d of \U0001f600"))
    stream, found = tasks.open_stream("captioning", options(folder)), items("captioning", folder)
    path = folder / "annotations" / f"captions_{SPLIT}.json"
    _, images, notes = references.read(path)
    for told in (stream.notes, found.notes, notes):
        assert "(a lone surrogate) replaced in 1 " in "; ".join(told)
    assert found.truth[2] == ["a box ? of \U0001f600"] == images[1]["references"]
    json.dumps(found.truth, ensure_ascii=False).encode()


def flickr(folder: Path, **changed) -> Path:
    """As Karpathy's dataset_flickr30k.json: without cocoid, without filepath."""
    image = {"sentids": [0], "split": "train", "filename": "1.png", "imgid": 0}
    image["sentences"] = [{"raw": "A red box.", "tokens": ["a", "red", "box"], "imgid": 0, "sentid": 0}]
    images = [{**copy.deepcopy(image), "filename": f"{i}.png", "imgid": i} for i in (1, 2, 3, 4)]
    images[3]["split"] = "test"
    images[0].update(changed)
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    return folder / "dataset_flickr30k.json"


def test_karpathys_flickr30k_is_read(case):
    folder = case()
    path = flickr(folder)
    found = train("captioning", folder, captions=path)
    assert {t["image_id"] for t in found} == {1, 2, 3}
    name, images, _ = references.read(path)
    assert name == "flickr30k" and images == [
        {"id": 4, "image": "4.png", "references": ["A red box."], "domain": None}
    ]
    with pytest.raises(ValueError, match=r"images\[0\] of 4 \(imgid 1\): no field cocoid"):
        coco.read_ids(path)  # its numbers are not those of COCO's images


@pytest.mark.parametrize(
    "change, says",
    [
        ({"sentences": [{"raw": "a", "tokens": "a"}]}, "tokens must be a list"),
        ({"sentences": [{"raw": "a", "tokens": [None]}]}, "tokens must be words"),
        ({"sentences": None}, "sentences must be a list"),
        ({"split": None}, "split must be text"),
        ({"imgid": 2}, "imgid 2 is there before"),
        ({"filename": 3}, "filename must be text"),
    ],
)
def test_karpathys_fields_are_named(case, change, says):
    folder = case()
    with pytest.raises(ValueError, match=r"dataset_flickr30k.json: images\[[01]\] of 4") as error:
        train("captioning", folder, captions=flickr(folder, **change))
    assert says in str(error.value)


def questions(folder: Path, question: dict, answer=None, annotation=None, wrap=True) -> tuple:
    q = {"question_id": 5, "image_id": 7, "question": "What is it?", **question}
    answers = [{"answer": "a box"} for _ in range(10)]
    answers[3]["answer"] = "a box" if answer is None else answer
    a = {"question_id": 5, "image_id": 7, "answers": answers, **(annotation or {})}
    contents = ({"questions": [q]}, {"annotations": [a]}) if wrap else ([q], [a])
    for name, content in zip(("q.json", "a.json"), contents, strict=True):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    return "vqav2", folder / "q.json", folder / "a.json"


@pytest.mark.parametrize(
    "changed, says",
    [
        (
            dict(question={"image_id": "7"}),
            "questions[0] of 1 (question_id 5): image_id must be a whole number, got '7'",
        ),
        (
            dict(question={"question": None}),
            "questions[0] of 1 (question_id 5): question must be text, got None",
        ),
        (
            dict(question={}, answer=4),
            "annotations[0] of 1 (question_id 5): answers[3] of 10: answer must be text, got 4",
        ),
        (dict(question={}, answer=["a"]), "answers[3] of 10: answer must be text"),
        (dict(question={}, annotation={"answers": None}), "answers must be a list, got None"),
        (dict(question={}, annotation={"image_id": None}), "image_id must be a whole number, got None"),
        (dict(question={}, wrap=False), "q.json is a list, LAVIS's perhaps"),
    ],
)
def test_questions_are_named(tmp_path, changed, says):
    with pytest.raises(ValueError) as error:
        vqa.read(*questions(tmp_path, **changed))
    assert says in str(error.value)


def test_questions_with_a_byte_order_mark_are_read(tmp_path):
    (found,) = vqa.read(*questions(tmp_path, {}))
    assert found.image == "COCO_val2014_000000000007.jpg" and found.answers == ("a box",) * 10


# --- scripts


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda w: w.c["annotations"][1].pop("bbox"), "annotations[1] of 4 (id 2): no field bbox"),
        (lambda w: w.c.update(annotations=[]), "nothing to train on"),
    ],
)
def test_scripts_end_with_one_line(case, run, tmp_path, edit, says):
    fixed = ("--model", "eva_mini", "--weights", "random", "--workers", 0, "--image-scale", 0.1)
    more = ("--coco", case(edit), "--iters", 1, "--warmup", 0, "--out", tmp_path / "o")
    code, _, err = run("stage1_heads", "--task", "detection", *fixed, *more)
    assert code == 2 and says in err and "Traceback" not in err


def test_text_for_ids_goes_through_the_scripts(case, run, tmp_path):
    folder = case(lambda w: [x.update({k: f"img/{x[k]}"}) for x, k in referring(w)])
    fixed = ("--model", "eva_mini", "--weights", "random", "--workers", 0, "--image-scale", 0.1)
    fixed = (*fixed, "--coco", folder, "--out", tmp_path / "o", "--task", "detection")
    code, _, err = run("stage1_heads", *fixed, "--iters", 1, "--warmup", 0)
    assert code == 0, err
    shutil.copytree(folder / SPLIT, folder / "val2017")
    text = (folder / "annotations" / f"instances_{SPLIT}.json").read_text()
    (folder / "annotations" / "instances_val2017.json").write_text(text)
    code, _, err = run("eval_heads", *fixed, "--head", tmp_path / "o")
    assert code == 0, err
    predictions = json.loads((tmp_path / "o" / "predictions_before.json").read_text())
    assert {p["image_id"] for p in predictions} == {f"img/{i}" for i in (1, 2, 3, 4)}
