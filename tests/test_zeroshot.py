"""Zero-shot data: labels by folder name, the sets' own formats, caption files."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, ImageFolder, cifar
from torchvision.transforms import PILToTensor

from data import zeroshot
from data.pictures import Pictures
from tests.conftest import SHARED

WNIDS_A = ["n01498041", "n01531178", "n01534433", "n01558993"]  # stingray, goldfinch, junco, robin


def picture(path: Path, seed: int = 0, size=(12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def imagenet_a(tmp_path) -> Path:
    """Four of ImageNet-A's folders, with 1, 2, 3 and 4 images."""
    for k, wnid in enumerate(WNIDS_A):
        for i in range(k + 1):
            picture(tmp_path / "imagenet-a" / wnid / f"{i}.png", 10 * k + i)
    return tmp_path / "imagenet-a"


def named(E: zeroshot.Benchmark) -> dict[str, str]:
    """{image file: the class name it is labelled with}"""
    return {image: E.texts[i] for image, i in zip(E.images, E.target.tolist(), strict=True)}


def test_built_in_lists_are_the_published_ones():
    counts = {"eurosat": (10, 3), "cifar-10": (10, 18), "cifar-100": (100, 18)}
    counts |= {"gtsrb": (43, 3), "caltech-101": (102, 34)}
    counts |= {f"imagenet-{part}": (200, 80) for part in "ar"}
    counts |= {f"imagenet-{part}": (1000, 80) for part in ("1k", "sketch")}
    for name in zeroshot.KNOWN:
        names, templates = zeroshot.class_list(name, Path())
        assert (len(names), len(templates)) == counts[name], name
        assert list(names) == sorted(names), name  # the order in which ImageFolder and the data sets count
        assert all(t.count("{}") == 1 for t in templates)
    names, templates = zeroshot.class_list("imagenet-r", Path())
    assert names["n02106662"] == "German Shepherd Dog"  # by the ImageNet challenge's synset list
    assert templates[0].format("x") == open_clip.OPENAI_IMAGENET_TEMPLATES[0]("x") == "a bad photo of a x."


def test_lists_are_clip_benchmarks():
    file = SHARED / "classification/zeroshot_names_and_templates.json"
    if not file.is_file():
        pytest.skip("needs ../shared/data/classification, which is not here")
    theirs = json.loads(file.read_text())
    for ours, key in (("imagenet-1k", "imagenet1k"), ("cifar-10", "cifar10")):
        names, templates = zeroshot.class_list(ours, Path())
        assert list(names.values()) == theirs[key]["classnames"]
        assert [t.format(c="x") for t in theirs[key]["templates"]] == [t.format("x") for t in templates]


def test_real_imagenet_images_get_their_own_names(tmp_path):
    sample = SHARED / "classification/imagenet_sample"
    if not sample.is_dir():
        pytest.skip("needs ../shared/data/classification, which is not here")
    lines = [line.split("\t") for line in (sample / "labels.tsv").read_text().splitlines()[1:]]
    for file, wnid, *_ in lines:
        (tmp_path / "val" / wnid).mkdir(parents=True)
        (tmp_path / "val" / wnid / file).symlink_to(sample / file)
    E = zeroshot.open_set("imagenet-1k", tmp_path)  # the folders are in val/
    index = {Path(image).name: i for image, i in zip(E.images, E.target.tolist(), strict=True)}
    assert index == {file: int(i) for file, _, i, _ in lines} and len(index) == 40
    assert {Path(k).name: v for k, v in named(E).items()} == {file: name for file, *_, name in lines}
    assert "no images of 960 classes" in E.notes[1]


def test_a_missing_folder_shifts_no_label(imagenet_a):
    """ImageFolder would call a goldfinch a stingray."""
    whole = named(zeroshot.open_set("imagenet-a", imagenet_a))
    of_folder = dict(zip(WNIDS_A, ["stingray", "goldfinch", "junco", "American robin"], strict=True))
    assert whole == {image: of_folder[Path(image).parent.name] for image, _ in ImageFolder(imagenet_a).imgs}
    shutil.rmtree(imagenet_a / WNIDS_A[0])
    part = zeroshot.open_set("imagenet-a", imagenet_a)
    assert named(part) == {image: name for image, name in whole.items() if WNIDS_A[0] not in image}
    assert len(part.texts) == 200 and "n01498041, " in part.notes[1]
    assert ImageFolder(imagenet_a).imgs[0][1] == 0 != part.target.min()


def test_folders_that_are_no_class_are_refused(imagenet_a):
    picture(imagenet_a / "n01440764" / "0.png")  # tench: in ImageNet-1K, not in A
    with pytest.raises(ValueError, match="1 folders are no class of imagenet-a: n01440764. Move"):
        zeroshot.open_set("imagenet-a", imagenet_a)
    assert zeroshot.open_set("imagenet-1k", imagenet_a).target[0] == 0
    with pytest.raises(
        ValueError, match="no class folder of eurosat .AnnualCrop, Forest, .*it has n01440764"
    ):
        zeroshot.open_set("eurosat", imagenet_a)
    with pytest.raises(FileNotFoundError, match="--set eurosat=.*absent: no such folder"):
        zeroshot.open_set("eurosat", imagenet_a / "absent")


def test_first_images_of_all_classes_come_first(imagenet_a):
    E = zeroshot.open_set("imagenet-a", imagenet_a, limit=5)
    assert [Path(image).parent.name for image in E.images] == [*WNIDS_A, WNIDS_A[1]]
    assert E.target.tolist() == [0, 1, 2, 3, 1]  # they are the first four of the 200


def test_own_names(tmp_path):
    for folder in ("b b", "a"):
        picture(tmp_path / folder / "0.jpg")
    with pytest.raises(FileNotFoundError, match="names.json is missing, and shapes is none of imagenet-a"):
        zeroshot.open_set("shapes", tmp_path)

    def open_with(names, templates):
        (tmp_path / "names.json").write_text(json.dumps({"names": names, "templates": templates}))
        return zeroshot.open_set("shapes", tmp_path)

    E = open_with({"b b": "a blue one", "a": "a red one", "c": "none"}, ["a {}"])
    assert sorted(named(E).values()) == ["a blue one", "a red one"] and E.texts[2] == "none"
    with pytest.raises(ValueError, match="1 folders are no class of shapes: b b"):
        open_with({"a": "a red one"}, ["a {}"])
    for names, templates in (({}, ["{}"]), ({"a": "x"}, ["none"]), ({"a": 1}, ["{}"]), ({"a": "x"}, [])):
        with pytest.raises(ValueError, match="expected names"):
            open_with(names, templates)
    with pytest.raises(ValueError, match="differ only in"):
        open_with({"b b": "x", "b_b": "y"}, ["{}"])
    with pytest.raises(ValueError, match="names.json is not a names.json: AttributeError"):
        open_with(["a"], ["{}"])


def test_cifar_and_gtsrb_in_their_own_formats(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)  # these are not the real 10,000 images
    base, rng = tmp_path / "cifar" / CIFAR10.base_folder, np.random.default_rng(0)
    base.mkdir(parents=True)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    data, labels = rng.integers(0, 256, (4, 3 * 32 * 32), dtype=np.uint8), [3, 0, 9, 3]
    (base / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": labels}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names[::-1]}))  # its own order
    E = zeroshot.open_set("cifar-10", tmp_path / "cifar")
    assert [E.texts[i] for i in E.target] == ["frog", "truck", "airplane", "frog"]
    pixels = Pictures(E.images, PILToTensor())[1][1]
    assert torch.equal(pixels, torch.from_numpy(data[1]).view(3, 32, 32))

    root = tmp_path / "signs" / "gtsrb"
    for i in range(3):
        picture(root / "GTSRB/Final_Test/Images" / f"{i:05d}.ppm", i)
    rows = "".join(f"{i:05d}.ppm;53;54;6;5;48;49;{c}\n" for i, c in enumerate((14, 0, 42)))
    (root / "GT-final_test.csv").write_text(
        "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n" + rows
    )
    E = zeroshot.open_set("gtsrb", tmp_path / "signs")
    assert E.texts[E.target[0]] == "stop" and E.target.tolist() == [14, 0, 42]
    picture(tmp_path / "folders" / "00014" / "x.ppm")
    picture(tmp_path / "folders" / "2" / "x.ppm")  # also found without the zeros
    assert sorted(zeroshot.open_set("gtsrb", tmp_path / "folders").target.tolist()) == [2, 14]


CAPTIONS = {
    "COCO_val2014_000000000009.jpg": ["one.", "two, three"],
    "COCO_val2014_000000000025.jpg": ["Four"],
}


def caption_files(root: Path) -> dict[str, Path]:
    """The same two images with three captions, in the three formats."""
    karpathy = [
        {"filename": n, "filepath": "val2014", "split": "test", "sentences": [{"raw": c} for c in texts]}
        for n, texts in CAPTIONS.items()
    ]
    karpathy.insert(1, {"filename": "x.jpg", "split": "restval", "sentences": [{"raw": "not this"}]})
    annotations = [{"image_id": i, "caption": c} for i, texts in enumerate(CAPTIONS.values()) for c in texts]
    contents = {
        "karpathy": {"dataset": "coco", "images": karpathy},
        "coco": {
            "images": [{"id": i, "file_name": n} for i, n in enumerate(CAPTIONS)],
            "annotations": annotations[::-1],
        },
        "lavis": [{"image": f"val2014/{n}", "caption": texts} for n, texts in CAPTIONS.items()],
    }
    for name, content in contents.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    return {name: root / f"{name}.json" for name in contents}


@pytest.mark.parametrize("folder", ["val2014/COCO_val2014_", "COCO_val2014_", "val2017/", ""])
def test_three_caption_formats_and_four_layouts(tmp_path, folder):
    for number in (9, 25):
        picture(tmp_path / "coco" / f"{folder}{number:012d}.jpg")
    for name, file in caption_files(tmp_path).items():
        E = zeroshot.open_captions(file, tmp_path / "coco")
        pairs = {(Path(E.images[i]).name[-6:-4], text) for i, text in zip(E.target, E.texts, strict=True)}
        assert pairs == {("09", "one."), ("09", "two, three"), ("25", "Four")}, name
        assert E.name == name.replace("karpathy", "coco") and E.templates == ["{}"]
    assert zeroshot.open_captions(file, tmp_path / "coco", limit=1).texts == ["one.", "two, three"]


def test_bad_caption_files_are_refused(tmp_path):
    file = caption_files(tmp_path)["lavis"]
    picture(tmp_path / "COCO_val2014_000000000009.jpg")
    with pytest.raises(
        ValueError, match="1 of 2 images are not in .*: val2014/COCO_val2014_000000000025.jpg"
    ):
        zeroshot.open_captions(file, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        zeroshot.open_captions(file, tmp_path / "absent")
    for content, why in (
        ([{"image": "a.jpg"}], r"entries\[0\] of 1: caption must be text"),
        ([{"image": "a.jpg", "caption": []}], r"1 of 1 images have no caption: \['a.jpg'\]"),
        ({"images": []}, "holds no images"),
        (
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "b"}]},
            r"annotations\[0\] of 1 \(image_id 2\): unknown image id 2",
        ),
        ("text", "neither NoCaps', COCO's nor Karpathy's"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=why):
            zeroshot.open_captions(file, tmp_path)
