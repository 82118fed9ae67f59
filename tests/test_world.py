"""The made-up world: every file opens in the readers it is for, and holds what real COCO's files hold."""

import base64
import io
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage

from data.coco import read_ids
from data.detection import Detection
from data.segmentation import PanopticSegmentation, Segmentation
from demo import world

SIZES = dict(train=12, val=28, words=20, size=96, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "world"
    out.mkdir()
    world.write_world(out, **SIZES)
    return out


def files(folder: Path) -> dict[str, bytes]:
    """Everything but LMDBs, whose free pages are not defined."""
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and f.suffix != ".mdb"
    }


def words(folder: Path) -> list[tuple[str, bytes]]:
    with lmdb.open(str(folder), readonly=True, lock=False) as store, store.begin() as txn:
        count = int(txn.get(b"num-samples"))
        pairs = [(txn.get(b"label-%09d" % i), txn.get(b"image-%09d" % i)) for i in range(1, count + 1)]
        assert txn.stat()["entries"] == 2 * count + 1
    return [(label.decode(), data) for label, data in pairs]


def test_the_same_seed_makes_the_same_world(made, tmp_path):
    world.write_world(tmp_path, **SIZES)
    assert files(tmp_path) == files(made)
    assert words(tmp_path / "words" / "train") == words(made / "words" / "train")
    first, other = (words(made / "words" / place) for place in ("train", "test/plain"))
    assert not set(first) & set(other)


def test_a_scene_depends_on_its_seed_and_index_alone(tmp_path, monkeypatch):
    """Not on how many there are, nor on the processes that draw them: 64 are shared among several."""
    world.write(tmp_path / "many", "train2017", 64, 48, seed=3)
    monkeypatch.setattr(world, "each", lambda function, items: [function(i) for i in reversed(items)][::-1])
    world.write(tmp_path / "few", "train2017", 5, 48, seed=3)
    many, few = (files(tmp_path / name / "train2017") for name in ("many", "few"))
    assert len(few) == 5 and few.items() <= many.items()


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_instances_are_sound_coco(made, split):
    api = COCO(made / "coco" / "annotations" / f"instances_{split}.json")
    assert [c["name"] for c in api.loadCats(api.getCatIds())] == list(world.THINGS)
    assert len(api.anns) == len(api.dataset["annotations"])  # ids are unique
    for image in api.dataset["images"]:
        with Image.open(made / "coco" / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) and picture.format == "JPEG"
        masks = []
        for a in api.loadAnns(api.getAnnIds(image["id"])):
            mask, (x, y, w, h) = api.annToMask(a), a["bbox"]
            rows, columns = np.nonzero(mask)
            assert a["area"] == mask.sum() > 0
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x, y, x + w, y + h)
            assert all(len(polygon) >= 6 for polygon in a["segmentation"])
            masks.append(mask)
        assert 0 <= len(masks) <= 8


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_polygons_and_panoptic_map_are_the_same_shapes(made, split):
    """A polygon's edge may round a pixel away; holes, as between rungs, are filled, as COCO's polygons do."""
    annotations = made / "coco" / "annotations"
    api, content = (
        COCO(annotations / f"instances_{split}.json"),
        json.loads((annotations / f"panoptic_{split}.json").read_text()),
    )
    categories = {c["id"]: c for c in content["categories"]}
    assert {c["name"] for c in categories.values() if c["isthing"]} == set(world.THINGS)
    for entry in content["annotations"]:
        with Image.open(annotations / f"panoptic_{split}" / entry["file_name"]) as picture:
            ids = np.asarray(picture, np.int64) @ [1, 256, 65536]
        infos = {s["id"]: s for s in entry["segments_info"]}
        seen, areas = np.unique(ids[ids > 0], return_counts=True)
        assert sorted(infos) == seen.tolist() and len(infos) == len(entry["segments_info"])
        assert [infos[i]["area"] for i in seen.tolist()] == areas.tolist()
        things = [s for s in entry["segments_info"] if categories[s["category_id"]]["isthing"]]
        instances = api.loadAnns(api.getAnnIds(entry["image_id"]))
        for segment, instance in zip(things, instances, strict=True):
            mask, region = api.annToMask(instance).astype(bool), ids == segment["id"]
            assert segment["category_id"] == instance["category_id"]
            assert not (region & ~ndimage.binary_dilation(mask)).any()
            filled = ndimage.binary_fill_holes(region)
            assert (mask & filled).sum() / (mask | filled).sum() > 0.8
            rows, columns = np.nonzero(region)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert segment["bbox"] == box


def test_a_segments_id_is_its_colour():
    """R + 256 G + 65536 B, by hand, where a digit is about to carry."""
    by_hand = {
        0: (0, 0, 0), 255: (255, 0, 0), 256: (0, 1, 0), 65535: (255, 255, 0), 65536: (0, 0, 1),
        256 * 65536 - 1: (255, 255, 255),
    }  # fmt: skip
    assert world.to_colors(np.array([list(by_hand)]))[0].tolist() == [list(c) for c in by_hand.values()]


def test_persons_have_cocos_keypoints(made):
    found = Counter()
    for split in ("train2017", "val2017"):
        api = COCO(made / "coco" / "annotations" / f"person_keypoints_{split}.json")
        (category,) = api.dataset["categories"]
        assert (category["id"], category["name"], len(category["keypoints"])) == (1, "person", 17)
        assert sorted({k for bone in category["skeleton"] for k in bone}) == list(range(1, 18))
        for a in api.dataset["annotations"]:
            x, y, v = np.array(a["keypoints"]).reshape(17, 3).T
            image, mask = api.imgs[a["image_id"]], api.annToMask(a)
            assert a["num_keypoints"] == (v > 0).sum() and set(v) <= {0, 1, 2}
            assert ((x < image["width"]) & (y < image["height"])).all() and not x[v == 0].any()
            grown = (
                mask | np.roll(mask, 1, 0) | np.roll(mask, -1, 0) | np.roll(mask, 1, 1) | np.roll(mask, -1, 1)
            )
            assert grown[y[v == 2], x[v == 2]].mean() > 0.9  # what is seen lies on the person
            found.update(v.tolist())
    assert found[2] > 100 and found[1] and found[0]


def test_left_and_right_are_the_persons_own():
    """A person who faces us has the left shoulder on our right; from behind it is on our left."""
    turned = Counter()
    for i in range(60):
        for thing in world.scene(np.random.default_rng(i), 96).things:
            if thing.name == "person":
                left, right = thing.keypoints[5, 0], thing.keypoints[6, 0]
                assert (left < right) == thing.back
                turned[thing.back] += 1
    assert min(turned.values()) >= 3


def test_captions_tell_the_truth():
    """Where a caption says that one thing is left of, above, ... another, there is such a pair."""
    checks = {
        "to the left of": lambda a, b: a[0] < b[0], "to the right of": lambda a, b: a[0] > b[0],
        "above": lambda a, b: a[1] < b[1], "below": lambda a, b: a[1] > b[1],
    }  # fmt: skip
    told = Counter()
    for i in range(150):
        rng = np.random.default_rng(i)
        scene = world.scene(rng, 96)
        captions = world.sentences(rng, scene)
        assert len(captions) == 5
        for caption in captions:
            text = caption[0].lower() + caption[1:].rstrip(".")
            for phrase, word in re.findall(r"(\w+ sign) that says (\w+)", text):
                assert any(t.name == "sign" and phrase in t.phrase and word == t.word for t in scene.things)
                told["says"] += 1
            text = re.sub(r" that says \w+", "", text)
            for relation, holds in checks.items():
                before, found, after = text.partition(f" {relation} ")
                if found:
                    pairs = [
                        (np.add(a.box[:2], a.box[2:]), np.add(b.box[:2], b.box[2:]))
                        for a in scene.things for b in scene.things
                        if a is not b and before == a.phrase and after.startswith(b.phrase)
                    ]  # fmt: skip
                    assert any(holds(a, b) for a, b in pairs), caption
                    told[relation] += 1
    assert set(told) == {*checks, "says"} and told["says"] > 40


@pytest.mark.parametrize("name", world.THINGS)
def test_the_map_of_ids_is_where_the_thing_is_drawn(name):
    """On a colour that no thing has: what the picture changed is what the map tells, but for edges."""
    for i, sketched in product(range(8), (False, True)):
        rng = np.random.default_rng(i)
        canvas = world.Canvas(np.full((112, 112, 3), (1, 254, 3), np.uint8), sketched)
        texture = world.TEXTURES[i % 4] if name in world.TEXTURED else "plain"
        world.add(rng, canvas, world.Thing(name, "purple", texture), np.array([56.0, 56.0]), 25.0)
        image, ids = canvas.finish()
        drawn = (np.asarray(image) != (1, 254, 3)).any(2)
        assert set(np.unique(ids)) == {0, 1}
        mask = ids == 1
        assert (drawn & mask).sum() / (drawn | mask).sum() > 0.75  # the least for thin parts
        assert not (drawn & ~ndimage.binary_dilation(mask, iterations=2)).any()
        assert not (mask & ~ndimage.binary_dilation(drawn)).any()


@pytest.mark.parametrize("name", world.THINGS)
def test_a_sketch_keeps_its_lines(name, monkeypatch):
    """Dark lines, inner ones too, on pale ground."""
    monkeypatch.setattr(world, "PALE", 0.25)  # so that no colour is as dark as a line
    index = world.THINGS.index(name)
    light = np.asarray(world.thing_picture((5, index), "sketch")[0].convert("L")).astype(int)
    dark = light < 185  # no fill is: black is 192 on a sketch
    assert 0.01 < dark.mean() < 0.2
    inner = ndimage.binary_erosion(ndimage.binary_fill_holes(dark), iterations=3)
    assert dark[inner].any() == (name not in ("circle", "bolt"))


def test_our_readers_take_it(made):
    folder = made / "coco"
    for stream in (Detection, Segmentation, PanopticSegmentation):
        image, target = stream(folder, "val2017", scale=0.15)[0, 14]
        assert len(image) == 3 and len(target["labels"])
    excluded = read_ids(folder / "dataset_coco.json")
    content = json.loads((folder / "dataset_coco.json").read_text())
    assert Counter(i["split"] for i in content["images"]) == {"train": 12, "val": 14, "test": 14}
    assert len(excluded) == 28 and len({i["cocoid"] for i in content["images"]}) == 40
    captions = COCO(folder / "annotations" / "captions_val2017.json")
    for image in content["images"]:
        assert (folder / image["filepath"] / image["filename"]).is_file()
        if image["split"] == "test":
            told = [a["caption"] for a in captions.loadAnns(captions.getAnnIds(image["cocoid"]))]
            assert told == [s["raw"] for s in image["sentences"]]


def test_galleries_share_the_validation_scenes_out(tmp_path, monkeypatch):
    """Every file has as many test pictures, no picture is in two files' tests, and the rest is `val`."""
    monkeypatch.setattr(world, "GALLERY", 6)
    world.write_world(tmp_path, **{**SIZES, "val": 20, "words": 1})
    tests = []
    for path in sorted((tmp_path / "coco").glob("dataset_coco*.json")):
        images = json.loads(path.read_text())["images"]
        assert Counter(i["split"] for i in images) == {"train": 12, "val": 14, "test": 6}
        tests += [i["cocoid"] for i in images if i["split"] == "test"]
    assert len(tests) == len(set(tests)) == 18


def test_words_are_readable_and_of_many_kinds(made):
    letters = set()
    for kind in world.WORD_SETS:
        pairs = words(made / "words" / "test" / kind)
        assert len(pairs) == SIZES["val"]
        for label, data in pairs:
            with Image.open(io.BytesIO(data)) as picture:
                assert picture.width > 20 and np.asarray(picture).std() > 10  # something stands there
            assert label.isascii() and label.isalnum()
            letters |= set(label)
    assert len(letters) > 40
    assert not set(world.SEEN) & set(world.UNSEEN)


def test_class_folders_and_their_names(made):
    for variant in world.VARIANTS:
        folder = made / "shapes" / variant
        content = json.loads((folder / "names.json").read_text())
        assert sorted(content["names"].values()) == sorted(world.THINGS)
        assert all("{}" in template for template in content["templates"])
        assert sorted(content["names"]) == sorted(f.name for f in folder.iterdir() if f.is_dir())
        counts = {len(list((folder / name).glob("*.jpg"))) for name in content["names"]}
        assert counts == {SIZES["val"] // len(world.THINGS)}


def test_grounded_things_are_in_a_red_rectangle(made, monkeypatch):
    lines = (made / "goi" / "val.jsonl").read_text().splitlines()
    assert len(lines) == SIZES["val"]
    kept = []
    monkeypatch.setattr(world, "encode", lambda picture: kept.append(np.asarray(picture)) or b"")
    for index, line in enumerate(lines):
        record = json.loads(line)
        _, *options = record["input"].split("\n")
        assert options == list(world.THINGS) and record["outputs"] in options
        Image.open(io.BytesIO(base64.b64decode(record["image_str"]))).load()
        world.grounded(index, 96, SIZES["seed"] + 31)
        scene = world.scene(np.random.default_rng((SIZES["seed"] + 31, index)), 96)
        rows, columns = np.nonzero((kept[-1] == (255, 0, 0)).all(-1))
        if len(scene.things) < 2:  # there was another try
            continue
        h, w = kept[-1].shape[:2]
        around = [
            (max(0, x0 - 2), max(0, y0 - 2), min(w, x1 + 2) - 1, min(h, y1 + 2) - 1)
            for x0, y0, x1, y1 in (thing.box for thing in scene.things)
        ]
        which = around.index((columns.min(), rows.min(), columns.max(), rows.max()))
        assert scene.things[which].name == record["outputs"]
    assert len({json.loads(line)["outputs"] for line in lines}) > 5


def test_an_existing_folder_is_left_alone_and_bad_places_are_named(tmp_path):
    def run(*options):
        command = [
            sys.executable,
            "demo/world.py",
            *map(str, options),
            "--train",
            "2",
            "--val",
            "2",
            "--words",
            "2",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    code, said = run(mine)
    assert code == 2 and "nothing was changed" in said
    assert [f.name for f in mine.iterdir()] == ["thesis.txt"]
    code, said = run(mine / "thesis.txt" / "world")
    assert code == 2 and "thesis.txt" in said
    code, said = run(tmp_path / "new", "--size", "20")
    assert code == 2 and "--size 48" in said and not (tmp_path / "new").exists()
