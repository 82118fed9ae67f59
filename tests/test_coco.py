"""COCO's annotation files: against pycocotools on the real sample, and on broken copies of a world."""

import json
import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from torchvision.ops import box_convert

from data import coco


def test_real_instances_are_pycocotools(real_coco):
    data = coco.read_instances(real_coco, "train2017")
    reference = COCO(real_coco / "annotations" / "instances_train2017.json")
    assert [c["id"] for c in data.categories] == sorted(reference.getCatIds()) and len(data.categories) == 80
    assert data.categories[0]["name"] == "person" and data.categories[79] == {"id": 90, "name": "toothbrush"}
    assert data.ids.tolist() == sorted(reference.getImgIds())
    for i, image_id in enumerate(data.ids.tolist()):
        annotations = reference.loadAnns(reference.getAnnIds(image_id, iscrowd=False))
        mine = slice(data.first[i], data.first[i + 1])
        assert [data.categories[c]["id"] for c in data.labels[mine]] == [
            a["category_id"] for a in annotations
        ]
        boxes = box_convert(torch.from_numpy(data.boxes_xyxy[mine]), "xyxy", "xywh")
        expected = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
        torch.testing.assert_close(boxes, expected, atol=1e-3, rtol=1e-4)
    assert (np.diff(data.first) == 0).any()  # an image without objects is kept
    assert "5 crowd" in data.notes[0]


def spoil(key, value, index=0):
    def change(content):
        content["annotations"][index][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda c: "{ not json", ValueError, "instances_train2017.json is not JSON"),
        (lambda c: json.dumps([1, 2]), ValueError, "not a COCO annotation file"),
        (lambda c: c.pop("annotations") and c, ValueError, "no list called annotations"),
        (spoil("category_id", 77), ValueError, r"annotations\[0\] of 42 \(id 1\): unknown category id 77"),
        (spoil("image_id", 77), ValueError, r"annotations\[0\] of 42 \(id 1\): unknown image id 77"),
        (spoil("bbox", [1, 2]), ValueError, r"annotations\[0\] of 42 \(id 1\): bbox must be .* got \[1, 2\]"),
        (spoil("bbox", [1, 2, None, 3]), ValueError, r"annotations\[0\] of 42 \(id 1\): bbox must be"),
        (
            lambda c: c["annotations"][0].pop("bbox") and c,
            ValueError,
            r"annotations\[0\] of 42 \(id 1\): no field bbox",
        ),
        (
            lambda c: c["images"][0].update(file_name="gone.jpg"),
            FileNotFoundError,
            "1 of 12 images not in .* 'gone.jpg'",
        ),
    ],
)
def test_bad_annotations_are_named(broken, change, error, says):
    folder = broken(change)
    with pytest.raises(error, match=says):
        coco.read_instances(folder, "train2017")


@pytest.mark.parametrize("box", [[math.nan, 1, 2, 3], [1, 1, 0, 3], [1, 1, -4, 3], [5000, 1, 4, 3]])
def test_unusable_boxes_are_dropped_with_a_count(broken, box):
    folder = broken(spoil("bbox", box, index=2))
    data = coco.read_instances(folder, "train2017")
    content = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    assert len(data.labels) == len(content["annotations"]) - 1
    assert "1 unusable annotations dropped" in data.notes[-1]
    assert "the first is annotations[2] of 42 (id 3)" in data.notes[-1]
    assert np.isfinite(data.boxes_xyxy).all()


def test_boxes_are_cut_at_the_image(broken):
    folder = broken(spoil("bbox", [-5, -6, 5000, 26.5]))
    content = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    image = next(i for i in content["images"] if i["id"] == content["annotations"][0]["image_id"])
    boxes = coco.read_instances(folder, "train2017").boxes_xyxy.tolist()
    assert [0, 0, image["width"], 20.5] in boxes


def test_missing_folder_says_what_to_download(tmp_path):
    with pytest.raises(FileNotFoundError, match="instances_train2017.json.*annotations_trainval2017.zip"):
        coco.annotation_file(tmp_path, "instances", "train2017")


def test_images_to_exclude_are_ids_or_karpathys_test_and_val(tmp_path):
    karpathy = {
        "images": [{"cocoid": i, "split": s} for i, s in enumerate(["train", "val", "test", "restval"])]
    }
    for name, text, expected in (
        ("karpathy.json", json.dumps(karpathy), {1, 2}),
        ("ids.json", "[4, 5]", {4, 5}),
        ("ids.txt", "6\n7\n", {6, 7}),
    ):
        (tmp_path / name).write_text(text)
        assert coco.read_ids(tmp_path / name) == expected
    (tmp_path / "bad.json").write_text('{"images": 3}')
    with pytest.raises(ValueError, match="bad.json"):
        coco.read_ids(tmp_path / "bad.json")
