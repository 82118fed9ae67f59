"""Grounded object identification data: M3IT's lines as they are and as they break, boxes drawn into COCO."""

import base64
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from data import goi
from files import BadImage

SIZE = (28, 42)


def picture(colour, size=(40, 30)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def record(name: str, colour=(9, 9, 9), options=("person", "dog"), **changed) -> str:
    line = {
        "input": "\n".join(["The options are:", *options]),
        "image_str": base64.b64encode(picture(colour)).decode(),
        "outputs": name,
    } | changed
    return json.dumps({k: v for k, v in line.items() if v is not None})


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_records_are_read_by_offset_in_any_order(tmp_path):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    names = ["person", "toothbrush", " dog "]
    lines = [record(n, c) for n, c in zip(names, colours, strict=True)]
    data = goi.Records(write(tmp_path / "t.jsonl", [lines[0], "", *lines[1:]]), SIZE)
    assert data.names == goi.COCO_NAMES and len(data) == 3
    assert [data.names[label] for label in data.labels] == ["person", "toothbrush", "dog"]
    for i in (2, 0, 1):
        pixels, y = data[i]
        assert pixels.shape == (3, *SIZE) and tuple(pixels[:, 5, 7].tolist()) == colours[i]
        assert y == {"image_id": i, "size": SIZE}
    assert [data.where(i)["line"] for i in range(3)] == [1, 3, 4]
    assert len(goi.Records(tmp_path / "t.jsonl", SIZE, limit=2)) == 2


def test_the_80_are_cocos_in_the_order_of_their_ids(real_coco):
    content = json.loads((real_coco / "annotations" / "instances_val2017.json").read_text())
    assert goi.COCO_NAMES == [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]


def test_bad_lines_are_counted_by_number_and_refused_when_strict(tmp_path):
    good = record("dog")
    no_picture = base64.b64encode(b"no picture").decode()
    lines = [
        good,
        good[:-9],  # 2: cut off
        "[1]",  # 3
        record("dog", image_str=None),  # 4
        record("dog", image_str="%%%"),  # 5: not base64
        record("dog", image_str=no_picture),  # 6
        record(None),  # 7
        record("unicorn"),  # 8
        good,
        record("gnome"),  # 10
    ]
    path = write(tmp_path / "t.jsonl", lines)
    data = goi.Records(path, SIZE)
    assert data.lines[:, 2].tolist() == [1, 9]
    assert data.notes == [
        f"{path}: 2 records of 80 classes; left out: 2 class outside the 80 (line 8, 10); "
        "1 not JSON (line 2); 2 whose image_str is no picture (line 5, 6); 1 without image_str (line 4); "
        "2 without outputs (line 3, 7)"
    ]
    with pytest.raises(ValueError, match="--strict: .*1 not JSON .line 2."):
        goi.Records(path, SIZE, strict=True)
    with pytest.raises(ValueError, match="0 records of 80 classes.*nothing to use"):
        goi.Records(write(tmp_path / "u.jsonl", [*lines[1:7], record("dog", image_str=None)]), SIZE)


def test_other_names_are_a_label_space_of_their_own_and_val_must_keep_to_it(tmp_path):
    shapes = [record(n, options=("star", "cross")) for n in ("star", "circle", "star")]
    train = goi.Records(write(tmp_path / "train.jsonl", shapes), SIZE)
    assert train.names == ["circle", "cross", "star"] and train.labels.tolist() == [2, 0, 2]
    val = write(tmp_path / "val.jsonl", [record("cross"), record("dog")])
    val = goi.Records(val, SIZE, train.names)
    assert val.labels.tolist() == [1] and "1 class outside the 3 (line 2)" in val.notes[0]


def test_a_picture_that_breaks_off_is_named_by_its_line(tmp_path):
    file = BytesIO()
    Image.effect_noise((90, 70), 60).convert("RGB").save(file, "JPEG")
    cut = base64.b64encode(file.getvalue()[:900]).decode()
    data = goi.Records(write(tmp_path / "t.jsonl", [record("dog"), record("dog", image_str=cut)]), SIZE)
    error = data[1]
    assert isinstance(error, BadImage) and f"{data.path}:2: image_str cannot be decoded" in str(error)


def test_fingerprint_is_of_the_lines_in_use(tmp_path):
    lines = [record("dog"), record("person", (1, 2, 3))]
    whole = goi.Records(write(tmp_path / "a.jsonl", lines), SIZE)
    assert goi.Records(write(tmp_path / "b.jsonl", lines), SIZE).fingerprint == whole.fingerprint
    others = [[lines[0], record("person", (1, 2, 4))], lines[:1], lines[::-1]]
    prints = {goi.Records(write(tmp_path / "c.jsonl", other), SIZE).fingerprint for other in others}
    prints.add(goi.Records(tmp_path / "a.jsonl", SIZE, limit=1).fingerprint)
    assert len(prints) == 4 and whole.fingerprint not in prints


def test_boxes_are_drawn_around_real_instances(real_coco):
    """Of the 50 real images 49 have an object; every box is one that pycocotools knows, and is red."""
    data = goi.BoxedCoco(real_coco, "train2017", (448, 448))
    api = COCO(real_coco / "annotations" / "instances_train2017.json")
    assert len(data) == 49 and "not M3IT: 49 boxes" in data.notes[-1] and "1 images without" in data.notes[-1]
    for i in range(len(data)):
        where = data.where(i)
        image = next(im for im in api.imgs.values() if im["file_name"] == where["file_name"])
        boxes = [
            np.array([a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]])
            for a in api.imgToAnns[image["id"]]
            if not a["iscrowd"] and api.cats[a["category_id"]]["name"] == data.names[data.labels[i]]
        ]
        assert min(np.abs(box - where["box_xyxy"]).max() for box in boxes) <= 0.51
    i = int(
        np.argmax([np.subtract(b[2:], b[:2]).min() for b in (data.where(k)["box_xyxy"] for k in range(49))])
    )
    where = data.where(i)
    with Image.open(real_coco / "train2017" / where["file_name"]) as original:
        w, h = original.size
        plain = np.asarray(original.convert("RGB").resize((448, 448), Image.BICUBIC)).astype(int)
    boxed = data[i][0].permute(1, 2, 0).numpy().astype(int)
    x0, y0, x1, y1 = where["box_xyxy"]
    row, middle = round((y0 + 1.5) * 448 / h), round((x0 + x1) / 2 * 448 / w)
    assert boxed[min(row, 447), middle, 0] > 180 and boxed[min(row, 447), middle, 1:].max() < 90
    inside = (slice(round((y0 + 8) * 448 / h), round((y1 - 8) * 448 / h)), middle)
    assert np.array_equal(boxed[inside], plain[inside])  # nothing else is touched


def test_the_object_of_an_image_depends_on_seed_and_image_alone(real_coco):
    a, b = (goi.BoxedCoco(real_coco, "val2017", SIZE, seed=seed) for seed in (0, 1))
    again = goi.BoxedCoco(real_coco, "val2017", SIZE, seed=0, limit=5)
    assert [again.where(i) for i in range(5)] == [a.where(i) for i in range(5)]
    assert (a.chosen != b.chosen).any() and a.fingerprint != b.fingerprint != again.fingerprint
