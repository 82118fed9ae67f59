"""Detection's augmentation: boxes follow the pixels, sizes are the release's."""

import json

import pytest
import torch
from PIL import Image, ImageDraw
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as TF

import data.detection
from data.detection import Detection, DetectionAugmentation


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_augmented_boxes_follow_the_pixels(broken, scale):
    """Paint every object's box in its own grey; after any flip, crop and resize the boxes must still fit."""
    folder = broken()
    path = folder / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [
        {"id": i["id"], "image_id": i["id"], "category_id": 1, "iscrowd": 0, "bbox": [30, 24, 40, 20]}
        for i in content["images"]
    ]
    path.write_text(json.dumps(content))
    for image in content["images"]:
        picture = Image.new("RGB", (image["width"], image["height"]))
        ImageDraw.Draw(picture).rectangle((30, 24, 69, 43), fill=(255, 255, 255))
        picture.save(folder / "train2017" / image["file_name"], quality=100)
    stream = Detection(folder, "train2017", seed=1, scale=scale)
    for p in range(40):
        image, target = stream[p, 14]
        h, w = target["size"]
        assert image.shape == (3, h, w) and max(h, w) <= round(672 * scale)
        white = (image[0] > 127).nonzero()
        if not len(target["labels"]):
            assert len(white) < 0.02 * h * w
            continue
        box = box_convert(target["boxes_cxcywh"], "cxcywh", "xyxy")[0] * torch.tensor([w, h, w, h])
        found = torch.cat([white.min(0).values.flip(0), white.max(0).values.flip(0) + 1]).float()
        assert (box - found).abs().max() <= 0.02 * max(h, w) + 1.5  # the resized edge is blurred


def test_crops_are_384_to_600_px_where_there_are_as_many(monkeypatch):
    crop, sides = TF.crop, {400: set(), 500: set(), 600: set()}

    def noted(image, top, left, h, w):
        if isinstance(image, tv_tensors.Image):
            sides[image.shape[-1]] |= {h, w}
        return crop(image, top, left, h, w)

    monkeypatch.setattr(data.detection.TF, "crop", noted)
    augment, box = DetectionAugmentation(), [[10.0, 10, 50, 50]]
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.zeros(3, 64, 64, dtype=torch.uint8))
    for _ in range(200):
        augment(image, tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=(64, 64)))
    for side, found in sides.items():
        assert 384 <= min(found) < 384 + (side - 384) / 8 and side - (side - 384) / 8 < max(found) <= side


def test_release_sizes():
    """Short side 480..672 in steps of 32, long side at most 672; before it a crop in half of the images."""
    augment, sizes = DetectionAugmentation(), set()
    torch.manual_seed(0)
    for _ in range(60):
        boxes = tv_tensors.BoundingBoxes([[10.0, 10, 50, 50]], format="XYXY", canvas_size=(480, 640))
        image, boxes = augment(tv_tensors.Image(torch.zeros(3, 480, 640, dtype=torch.uint8)), boxes)
        h, w = image.shape[1:]
        assert max(h, w) <= 672 and boxes.canvas_size == (h, w)
        sizes.add((h, w))
    uncropped = {(480, 640), (504, 672)}
    assert uncropped & sizes and len(sizes - uncropped) > 10
