"""Masks and panoptic segments: against pycocotools on the real sample, their jitter, and broken copies."""

import json
import shutil
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

import tasks
from data.detection import Detection
from data.segmentation import Jitter, PanopticSegmentation, Segmentation
from files import BadImage
from tests.streams import take


def test_jitter_moves_masks_as_it_moves_pixels():
    """A picture that is its own mask: the two ways through the jitter must agree, but for the edge."""
    torch.manual_seed(0)
    source = np.zeros((90, 130), np.uint8)
    source[20:70, 35:80] = 255
    sizes = set()
    for _ in range(40):
        jitter = Jitter.draw(90, 130, 112)
        image = jitter.image(torch.from_numpy(source).expand(3, -1, -1))
        mask = jitter.map(source)
        assert image.shape[1:] == mask.shape and max(mask.shape) <= 112
        sizes.add(mask.shape)
        edge = 2 * (mask.shape[0] + mask.shape[1]) + 8  # one pixel around the rectangle
        assert ((image[0].numpy() > 127) != (mask > 127)).sum() <= edge
    assert len(sizes) > 10 and max(sizes) == (112, 112)


def test_jitter_is_from_a_tenth_to_twice():
    torch.manual_seed(0)
    scales = np.array([max(Jitter.draw(300, 400, 400).size) / 400 for _ in range(400)])
    assert 0.099 < scales.min() < 0.15 and 1.95 < scales.max() < 2.001
    assert scales.mean() == pytest.approx(1.05, abs=0.08)  # uniform; three standard errors


def test_real_masks_are_pycocotools(real_coco):
    stream = Segmentation(real_coco, "train2017")
    reference = COCO(real_coco / "annotations" / "instances_train2017.json")
    for row, image_id in enumerate(stream.ids.tolist()):
        annotations = reference.loadAnns(reference.getAnnIds(image_id, iscrowd=False))
        masks = list(stream.masks(row))
        assert len(masks) == len(annotations)
        assert all(np.array_equal(m, reference.annToMask(a)) for m, a in zip(masks, annotations, strict=True))


def test_real_panoptic_segments_have_the_stated_areas(real_coco):
    stream = PanopticSegmentation(real_coco, "val2017")
    content = json.loads((real_coco / "annotations" / "panoptic_val2017.json").read_text())
    assert len(stream.categories) == 133 and sum(c["isthing"] for c in stream.categories) == 80
    for annotation in content["annotations"]:
        row = stream.ids.tolist().index(annotation["image_id"])
        segments = [s for s in annotation["segments_info"] if not s["iscrowd"]]
        assert [m.sum() for m in stream.masks(row)] == [s["area"] for s in segments]
        mine = slice(stream.data.first[row], stream.data.first[row + 1])
        labels = [stream.categories[c]["id"] for c in stream.data.labels[mine]]
        assert labels == [s["category_id"] for s in segments]


@pytest.mark.parametrize("name", ["segmentation", "panoptic"])
def test_a_mask_sample_depends_on_its_position_alone(real_coco, name):
    split = {"segmentation": "train2017", "panoptic": "val2017"}[name]
    stream = tasks.find(name).Stream(real_coco, split, scale=0.1)
    plain, loaded = take(stream, 5, batch=2), take(stream, 5, batch=2, workers=2)
    for (images, _, y), (images2, _, y2) in zip(plain, loaded, strict=True):
        assert torch.equal(images, images2)
        for a, b in zip(y, y2, strict=True):
            assert torch.equal(a["masks"], b["masks"]) and torch.equal(a["labels"], b["labels"])
            assert a["masks"].dtype == torch.bool and a["masks"].shape == (len(a["labels"]), *a["size"])
            assert a["padded_size"] == images.shape[2:] and a["masks"].flatten(1).any(1).all()


def test_sixty_masks_stay_below_100_MB():
    stream = object.__new__(Segmentation)
    stream.scale, stream.sizes = 1.0, np.array([[640, 640]])
    stream.data = SimpleNamespace(first=[0, 60], labels=np.zeros(60, np.int64))
    stream.masks = lambda row: (np.ones((640, 640), np.uint8) for _ in range(60))
    torch.manual_seed(1)
    tracemalloc.start()
    _, target = stream.sample(torch.zeros(3, 640, 640, dtype=torch.uint8), 0, 14)
    peak = tracemalloc.get_traced_memory()[1]  # numpy's; the picture itself is a 12 MB tensor at most
    tracemalloc.stop()
    assert target["masks"].nbytes <= 60 * 1022 * 1022 and peak < 88e6


def test_unusable_masks_are_dropped_or_refused(broken):
    def change(content):
        content["annotations"][0]["segmentation"] = [[1, 1, 5, 5]]
        del content["annotations"][1]["segmentation"]

    folder = broken(change)
    kept = Segmentation(folder, "train2017")
    assert len(kept.data.labels) == len(Detection(folder, "train2017").data.labels) - 2
    assert "2 unusable annotations dropped" in kept.notes[-1]
    assert "the first is annotations[0] of 42 (id 1)" in kept.notes[-1]
    path = folder / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][2]["segmentation"] = {"size": [3, 4], "counts": [0, 12]}
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"annotations\[2\] of 42 \(id 3\): its run lengths are for an image of \[3, 4\]"
    ):
        Segmentation(folder, "train2017")


def test_a_panoptic_png_without_its_segments_is_named(real_coco, tmp_path):
    shutil.copytree(real_coco / "val2017", tmp_path / "val2017")
    shutil.copytree(real_coco / "annotations", tmp_path / "annotations")
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"][0]["id"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(BadImage, match="142238.*no pixel has the id of segment"):
        take(PanopticSegmentation(tmp_path, "val2017"), 2)
    next((tmp_path / "annotations" / "panoptic_val2017").glob("*.png")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 images not in"):
        PanopticSegmentation(tmp_path, "val2017")
