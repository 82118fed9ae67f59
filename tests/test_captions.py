"""Captions: COCO's and Karpathy's files, the vocabulary, and broken copies of both."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from data.captions import Captions, make_vocabulary, tokenize
from files import BadImage
from tests.streams import take


def spoken(stream: Captions, target: dict) -> str:
    return " ".join(stream.vocabulary[t] for t in target["tokens"].tolist())


def test_words():
    assert tokenize("A commercial-style kitchen; 2 men's  CAFÉ, 'stop'.") == [
        "a", "commercial", "style", "kitchen", "2", "men's", "café", "stop",
    ]  # fmt: skip
    assert tokenize(" . ") == []
    assert make_vocabulary([["b", "a"], ["b", "c"], ["a"]], 2) == [
        "<pad>",
        "a",
        "b",
        "<unk>",
        "<start>",
        "<end>",
    ]


def test_real_captions_are_pycocotools(real_coco):
    """Every sample is one of its image's five captions, with words rarer than min_count as <unk>."""
    stream = Captions(real_coco, "train2017", min_count=3)
    reference = COCO(real_coco / "annotations" / "captions_train2017.json")
    said = {i: [tokenize(a["caption"]) for a in reference.imgToAnns[i]] for i in reference.imgs}
    counts = Counter(word for sentences in said.values() for words in sentences for word in words)
    assert set(stream.vocabulary[1:-3]) == {word for word, n in counts.items() if n >= 3}
    assert "50 images, 250 captions" in stream.notes[0]
    drawn = set()
    for position in range(100):
        image, target = stream[position, 14]
        assert image.shape == (3, 252, 252) and image.dtype == torch.uint8
        known = [
            " ".join(["<start>", *(w if counts[w] >= 3 else "<unk>" for w in words), "<end>"])
            for words in said[target["image_id"]]
        ]
        assert spoken(stream, target) in known
        drawn.add(known.index(spoken(stream, target)))
    assert drawn == set(range(5))
    assert {stream[p, 14][1]["image_id"] for p in range(50)} == set(reference.imgs)  # an epoch


def test_a_karpathy_json_gives_its_train_sentences_alone(real_coco, real_data, tmp_path):
    """Real images, 40 train and 10 val in train2017. Its tokens are ours, but for apostrophes at the ends."""
    path = real_data("retrieval/dataset_coco_mini.json")
    images = json.loads(path.read_text())["images"]
    for image, sentence in ((i, s) for i in images for s in i["sentences"]):
        ours, theirs = tokenize(sentence["raw"]), [t.strip("'") for t in sentence["tokens"]]
        assert ours == [t for t in theirs if t], image["filename"]
    stream = Captions(real_coco, "train2017", captions=path, min_count=1)
    train = [i for i in images if i["split"] == "train"]
    assert set(stream.ids.tolist()) == {i["cocoid"] for i in train}
    assert set(stream.vocabulary[1:-3]) == {t for i in train for s in i["sentences"] for t in s["tokens"]}
    image, target = stream[3, 16]
    sentences = next(i["sentences"] for i in train if i["cocoid"] == target["image_id"])
    assert spoken(stream, target)[8:-6] in [" ".join(s["tokens"]) for s in sentences]
    assert image.shape == (3, 256, 256)

    for i in images:  # the names of 2014, of which only the 2017 copies are here; one of them is restval
        i.update(filepath="val2014", filename=f"COCO_val2014_{i['cocoid']:012d}.jpg")
    images[0]["split"] = "restval"
    old = tmp_path / "dataset_coco.json"
    old.write_text(json.dumps({"images": images}))
    again = Captions(real_coco, "train2017", captions=old, min_count=1)
    assert again.names == stream.names and torch.equal(again[3, 16][1]["tokens"], target["tokens"])
    with pytest.raises(
        FileNotFoundError, match=r"none of its 40 train and restval images is in val2014, val2017"
    ):
        Captions(real_coco, "val2017", captions=old, min_count=1)
    images[0]["split"] = "test"
    images[1]["cocoid"] = 1
    old.write_text(json.dumps({"images": images}))
    images[2]["sentences"][0]["tokens"].append("antidisestablishmentarianism")
    images[2]["cocoid"] = 2
    old.write_text(json.dumps({"images": images}))
    less = Captions(real_coco, "train2017", captions=old, min_count=1)
    assert "2 images not in" in less.notes[0]
    assert "antidisestablishmentarianism" in less.vocabulary  # whichever copies of the images are here


def test_the_vocabulary_does_not_depend_on_the_part_trained_on(scenes):
    whole = Captions(scenes, "train2017", min_count=2)
    part = Captions(scenes, "train2017", min_count=2, fraction=0.25, exclude={1, 2, 3})
    assert whole.classes == part.classes and len(part.rows) == 2
    assert whole.fingerprint != part.fingerprint
    assert Captions(scenes, "train2017", min_count=20).fingerprint != whole.fingerprint


def test_samples_depend_on_their_position_alone(scenes):
    """Workers or none, from the start or not; captions of unlike lengths share a batch."""

    def captions() -> Captions:
        return Captions(scenes, "train2017", seed=3, scale=0.3, min_count=1)

    whole, late = take(captions(), 5, batch=4), take(captions(), 2, batch=4, start=3, workers=2)
    for (images, valid, y), (images2, _, y2) in zip(whole[3:], late, strict=True):
        assert torch.equal(images, images2) and valid is None and images.shape == (4, 3, 70, 70)
        assert all(torch.equal(t["tokens"], t2["tokens"]) for t, t2 in zip(y, y2, strict=True))
    first = {t["image_id"]: t["tokens"].tolist() for _, _, y in whole[:3] for t in y}
    assert len(first) == 12


def test_images_without_captions_empty_and_long_ones_are_counted(broken):
    def change(content):
        content["images"].append({**content["images"][0], "id": 99})  # nothing said of it
        of = {i: [a for a in content["annotations"] if a["image_id"] == i] for i in (1, 2, 3)}
        for a in of[1]:
            a["caption"] = " ?! "  # nothing said of it in the end
        of[2][0]["caption"] = ""
        of[3][0]["caption"] = " ".join(["red"] * 60)
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3] + of[3][:1]

    stream = Captions(broken(change, "captions"), "train2017", min_count=1)
    assert "11 images, 50 captions" in stream.notes[0]
    assert re.search(
        r"2 images without captions, 6 empty captions; 1 captions cut at 50 words", stream.notes[0]
    )
    assert not {1, 99} & set(stream.ids.tolist())
    for position in range(11):
        _, target = stream[position, 14]
        assert 3 <= len(target["tokens"]) <= 52
        if target["image_id"] == 3:
            assert spoken(stream, target) == "<start> " + "red " * 50 + "<end>"


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda c: c["annotations"][3].update(image_id=77),
            r"annotations\[3\] of 60 \(id 4\): unknown image id 77",
        ),
        (
            lambda c: c["annotations"][3].update(caption=None),
            r"annotations\[3\] of 60 \(id 4\): caption must be text, got None",
        ),
        (
            lambda c: c["annotations"][3].pop("caption") and c,
            r"annotations\[3\] of 60 \(id 4\): no field caption",
        ),
        (lambda c: c.pop("images"), r"no list called images"),
        (lambda c: c.update(annotations=[]), r"no word occurs 6 times .*--min-count"),
    ],
)
def test_bad_files_are_refused(broken, change, says):
    with pytest.raises(ValueError, match=says):
        Captions(broken(change, "captions"), "train2017")


def test_captions_of_another_split_are_refused(scenes, broken):
    other = json.loads((scenes / "annotations" / "captions_val2017.json").read_text())
    for image in other["images"]:
        image["file_name"] = "9" + image["file_name"][1:]
    folder = broken(lambda content: content.update(other), "captions")
    with pytest.raises(FileNotFoundError, match=r"captions_train2017.json: 4 of 4 images not in .*train2017"):
        Captions(folder, "train2017", min_count=1)


def test_a_picture_of_another_size_is_no_fault_where_sizes_are_unknown(scenes, tmp_path):
    """Karpathy's file has none; COCO's has."""
    folder = tmp_path / "coco"
    shutil.copytree(scenes, folder)
    name = f"{1:012d}.jpg"
    Image.new("RGB", (33, 44)).save(folder / "train2017" / name)
    sentences = [{"tokens": ["a", "dog"]}]
    image = {"cocoid": 1, "split": "train", "filepath": "train2017", "filename": name, "sentences": sentences}
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": [image]}))
    stream = Captions(folder, "train2017", captions=path, min_count=1)
    assert stream[0, 14][1]["orig_size"] == (44, 33)
    with pytest.raises(BadImage, match="33 x 44"):
        take(Captions(folder, "train2017", min_count=1), 1, batch=12)
