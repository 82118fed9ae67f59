"""COCO reading and streams: against pycocotools on the real sample, and on broken copies of a world."""

import itertools
import json
import math
import shutil
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from torchvision.ops import box_convert

from data import coco
from data.streams import STREAMS

BACKBONE = SimpleNamespace(patch=14, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def ranks(rank=0, world=1):
    return SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))


def take(stream, count, batch=1, rank=0, world=1, **options):
    return list(itertools.islice(coco.batches(stream, batch, BACKBONE, ranks(rank, world), **options), count))


def same(a, b) -> bool:
    (images, valid, y), (images2, valid2, y2) = a, b
    assert (valid is None) == (valid2 is None)
    boxes = all(torch.equal(t["boxes_cxcywh"], t2["boxes_cxcywh"]) for t, t2 in zip(y, y2, strict=True))
    ids = [t["image_id"] for t in y] == [t["image_id"] for t in y2]
    return torch.equal(images, images2) and boxes and ids and (valid is None or torch.equal(valid, valid2))


@pytest.fixture
def broken(scenes, tmp_path):
    """broken(change) -> a copy of the made-up world whose instances JSON went through change(content)."""

    def copy(change=lambda content: None):
        folder = tmp_path / "coco"
        shutil.copytree(scenes, folder)
        path = folder / "annotations" / "instances_train2017.json"
        content = json.loads(path.read_text())
        content = change(content) or content
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return copy


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


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_augmented_boxes_follow_the_pixels(broken, scale):
    """Paint every object's box in its own grey; after any flip, crop and resize the boxes must still fit."""
    from PIL import Image, ImageDraw

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
    stream = coco.Detection(folder, "train2017", seed=1, scale=scale)
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


def test_release_sizes():
    """Short side 480..672 in steps of 32, long side at most 672; before it a crop in half of the images."""
    from torchvision import tv_tensors

    augment, sizes = coco.DetectionAugmentation(), set()
    torch.manual_seed(0)
    for _ in range(60):
        boxes = tv_tensors.BoundingBoxes([[10.0, 10, 50, 50]], format="XYXY", canvas_size=(480, 640))
        image, boxes = augment(tv_tensors.Image(torch.zeros(3, 480, 640, dtype=torch.uint8)), boxes)
        h, w = image.shape[1:]
        assert max(h, w) <= 672 and boxes.canvas_size == (h, w)
        sizes.add((h, w))
    uncropped = {(480, 640), (504, 672)}
    assert uncropped & sizes and len(sizes - uncropped) > 10


def test_a_sample_depends_on_its_position_alone(scenes):
    stream = coco.Detection(scenes, "train2017", seed=5, scale=0.2)
    plain = take(stream, 30)
    assert all(map(same, plain, take(stream, 30, workers=2)))
    assert all(map(same, plain[7:], take(stream, 23, start=7)))
    state = torch.get_rng_state()
    stream[3, 14]
    assert torch.equal(torch.get_rng_state(), state)
    for rank in range(2):  # two ranks read what one process reads, in turn
        assert all(map(same, plain[rank::2], take(stream, 15, rank=rank, world=2)))
    assert [y["image_id"] for *_, (y,) in plain[:12]] != [y["image_id"] for *_, (y,) in plain[12:24]]
    for epoch in (plain[:12], plain[12:24]):  # every image once an epoch
        assert sorted(y["image_id"] for *_, (y,) in epoch) == list(range(1, 13))
    other = coco.Detection(scenes, "train2017", seed=6, scale=0.2)
    assert not all(map(same, plain, take(other, 30)))


def test_batches_are_padded_and_say_so(scenes):
    stream = coco.Detection(scenes, "train2017", scale=0.2)
    for (images, valid, y), singles in zip(take(stream, 4, batch=3), range(4), strict=True):
        assert images.shape[2] % 14 == 0 and images.shape[3] % 14 == 0
        for i, target in enumerate(y):
            h, w = target["size"]
            ((alone, _, _),) = take(stream, 1, start=3 * singles + i)
            assert torch.equal(images[i, :, :h, :w], alone[0, :, :h, :w])
            assert valid[i].sum() == h * w and valid[i, :h, :w].all()
            assert not images[i][:, ~valid[i]].any()
    assert take(stream, 1, batch=1)[0][1] is None  # nothing to mask


def test_fraction_and_exclusion(scenes, tmp_path):
    ids = lambda **options: coco.Detection(scenes, "train2017", **options)  # noqa: E731
    half, all_of_it = ids(fraction=0.5), ids()
    assert len(half.rows) == 6 and set(half.rows) < set(all_of_it.rows)
    assert set(ids(fraction=0.25).rows) < set(half.rows)  # Table 10's parts are nested
    assert half.fingerprint != all_of_it.fingerprint
    left = ids(exclude={1, 2, 999})
    assert left.ids[left.rows].tolist() == list(range(3, 13)) and "2 images excluded" in left.notes[-1]
    with pytest.raises(ValueError, match="no image left"):
        ids(exclude=set(range(13)))
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
        (spoil("category_id", 77), ValueError, "annotation 1: unknown category id 77"),
        (spoil("image_id", 77), ValueError, "annotation 1: unknown image id 77"),
        (spoil("bbox", [1, 2]), ValueError, r"annotation 1: bbox must be .* got \[1, 2\]"),
        (spoil("bbox", [1, 2, None, 3]), ValueError, "annotation 1: bbox must be"),
        (lambda c: c["annotations"][0].pop("bbox") and c, ValueError, "not a COCO instances file"),
        (
            lambda c: c["images"][0].update(file_name="gone.jpg"),
            FileNotFoundError,
            "1 of 12 images not in .* gone.jpg",
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
    assert "1 unusable annotations dropped" in data.notes[-1] and "first 3 of image" in data.notes[-1]
    assert np.isfinite(data.boxes_xyxy).all()


def test_missing_folder_says_what_to_download(tmp_path):
    with pytest.raises(FileNotFoundError, match="instances_train2017.json.*annotations_trainval2017.zip"):
        coco.annotation_file(tmp_path, "detection", "train2017")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "not a picture", "another size"])
def test_bad_images_are_named_or_passed_over(broken, damage, workers):
    folder = broken()
    path = folder / "train2017" / f"{3:012d}.jpg"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-900])
    elif damage == "not a picture":
        path.write_text("hello")
    else:
        shutil.copy(folder / "train2017" / f"{4:012d}.jpg", path)
    with pytest.raises(coco.BadImage, match="000000000003.jpg"):
        take(coco.Detection(folder, "train2017", scale=0.2), 12, workers=workers)
    got = take(coco.Detection(folder, "train2017", scale=0.2, skip_bad=True), 12, workers=workers)
    ids = [t["image_id"] for *_, y in got for t in y]
    skipped = [name for *_, y in got for t in y for name in t["skipped"]]
    assert 3 not in ids and len(ids) == 12 and skipped == ["000000000003.jpg"]


def test_jitter_moves_masks_as_it_moves_pixels():
    """A picture that is its own mask: the two ways through the jitter must agree, but for the edge."""
    torch.manual_seed(0)
    source = np.zeros((90, 130), np.uint8)
    source[20:70, 35:80] = 255
    sizes = set()
    for _ in range(40):
        jitter = coco.Jitter.draw(90, 130, 112)
        image = jitter.image(torch.from_numpy(source).expand(3, -1, -1))
        mask = jitter.map(source)
        assert image.shape[1:] == mask.shape and max(mask.shape) <= 112
        sizes.add(mask.shape)
        edge = 2 * (mask.shape[0] + mask.shape[1]) + 8  # one pixel around the rectangle
        assert ((image[0].numpy() > 127) != (mask > 127)).sum() <= edge
    assert len(sizes) > 10 and max(sizes) == (112, 112)


def test_real_masks_are_pycocotools(real_coco):
    stream = coco.Segmentation(real_coco, "train2017")
    reference = COCO(real_coco / "annotations" / "instances_train2017.json")
    for row, image_id in enumerate(stream.ids.tolist()):
        annotations = reference.loadAnns(reference.getAnnIds(image_id, iscrowd=False))
        masks = list(stream.masks(row))
        assert len(masks) == len(annotations)
        assert all(np.array_equal(m, reference.annToMask(a)) for m, a in zip(masks, annotations, strict=True))


def test_real_panoptic_segments_have_the_stated_areas(real_coco):
    stream = coco.Panoptic(real_coco, "val2017")
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
    stream = STREAMS[name](real_coco, split, scale=0.1)
    plain, loaded = take(stream, 5, batch=2), take(stream, 5, batch=2, workers=2)
    for (images, _, y), (images2, _, y2) in zip(plain, loaded, strict=True):
        assert torch.equal(images, images2)
        for a, b in zip(y, y2, strict=True):
            assert torch.equal(a["masks"], b["masks"]) and torch.equal(a["labels"], b["labels"])
            assert a["masks"].dtype == torch.bool and a["masks"].shape == (len(a["labels"]), *a["size"])
            assert a["padded_size"] == images.shape[2:] and a["masks"].flatten(1).any(1).all()


def test_sixty_masks_stay_below_100_MB():
    stream = object.__new__(coco.Segmentation)
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
    kept = coco.Segmentation(folder, "train2017")
    assert len(kept.data.labels) == len(coco.Detection(folder, "train2017").data.labels) - 2
    assert "2 unusable annotations dropped" in kept.notes[-1] and "first 1 of image 1" in kept.notes[-1]
    path = folder / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][2]["segmentation"] = {"size": [3, 4], "counts": [0, 12]}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"annotation 3 of image .* its RLE is for \[3, 4\]"):
        coco.Segmentation(folder, "train2017")


def test_a_panoptic_png_without_its_segments_is_named(real_coco, tmp_path):
    shutil.copytree(real_coco / "val2017", tmp_path / "val2017")
    shutil.copytree(real_coco / "annotations", tmp_path / "annotations")
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"][0]["id"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(coco.BadImage, match="142238.*no pixel has the id of segment"):
        take(coco.Panoptic(tmp_path, "val2017"), 2)
    next((tmp_path / "annotations" / "panoptic_val2017").glob("*.png")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 images not in"):
        coco.Panoptic(tmp_path, "val2017")
