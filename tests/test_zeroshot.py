"""Zero-shot data: labels by folder name, the sets' own formats, caption files; ranks against brute force."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from PIL import Image
from torchvision.datasets import CIFAR10, ImageFolder, cifar
from torchvision.transforms import PILToTensor

import eval_zeroshot
from data import zeroshot

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
    with pytest.raises(ValueError, match="cannot be read: AttributeError"):
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
    pixels = zeroshot.Pictures(E.images, PILToTensor())[1][1]
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


def test_unreadable_images_are_told_by_name(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "c.png", 3)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "d.png").write_text("not an image")
    data = zeroshot.Pictures([str(tmp_path / f"{n}.png") for n in "abcde"], PILToTensor())
    index, images, bad = zeroshot.collate([data[i] for i in range(5)])
    assert index.tolist() == [0, 2] and images.shape == (2, 3, 12, 10) and list(bad) == [1, 3, 4]
    assert "b.png: OSError" in bad[1] and "UnidentifiedImageError" in bad[3] and "FileNotFound" in bad[4]
    index, images, bad = zeroshot.collate([data[1]])
    assert len(index) == 0 and images is None


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
        ([{"image": "a.jpg"}], "KeyError: 'caption'"),
        ([{"image": "a.jpg", "caption": []}], r"1 of 1 images have no caption: \['a.jpg'\]"),
        ({"images": []}, "holds no images"),
        (
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "b"}]},
            "KeyError: 2",
        ),
        ("text", "TypeError"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=why):
            zeroshot.open_captions(file, tmp_path)


@pytest.mark.parametrize("values", ["distinct", "ties", "collapsed"])
def test_ranks_and_recall_are_a_brute_force_count(values):
    """40 images with 5 to 7 captions, in any order; a tie counts against the model."""
    rng = np.random.default_rng(0)
    image_of = rng.permutation(np.repeat(np.arange(40), rng.integers(5, 8, 40)))
    T = len(image_of)
    S = rng.normal(size=(T, 40)).astype(np.float32)
    S[np.arange(T), image_of] += 1
    S = {"distinct": S, "ties": S.round(), "collapsed": 0 * S}[values]
    by_caption, by_image = [], []
    for t in range(T):
        by_caption.append(sum(S[t, i] >= S[t, image_of[t]] for i in range(40) if i != image_of[t]))
    for i in range(40):
        best = max(S[t, i] for t in range(T) if image_of[t] == i)
        by_image.append(sum(S[t, i] >= best for t in range(T) if image_of[t] != i))
    of = torch.from_numpy(image_of)
    ours = eval_zeroshot.ranks_of(torch.from_numpy(S), of, block=7)
    assert ours[0].tolist() == by_caption and ours[1].tolist() == by_image
    scores = eval_zeroshot.recall(torch.from_numpy(S), of)
    assert list(scores) == ["TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10"]
    for K in (1, 5, 10):
        assert scores[f"TR@{K}"].mean().item() == np.mean(np.array(by_image) < K)
        assert scores[f"IR@{K}"].mean().item() == pytest.approx(np.mean(np.array(by_caption) < K), abs=1e-12)
    if values == "collapsed":
        assert not any(score.any() for score in scores.values())


def test_ranks_of_features_hold_also_where_images_and_captions_are_the_same():
    """Blocks of features against loops over the whole product in float64; a third is there twice or more."""
    torch.manual_seed(0)
    image_of = torch.arange(60).repeat_interleave(torch.randint(5, 8, (60,)))[torch.randperm(330)]
    T, f = len(image_of), F.normalize(torch.randn(60, 96), dim=1)
    W = F.normalize(f[image_of] + 1.5 * torch.randn(T, 96), dim=1)
    f[40:], W[::3] = f[:20], W[:1] + 0 * W[::3]  # the last 20 images are the first 20; many captions are one
    S = W.double() @ f.double().T
    by_caption = [int((S[t] >= S[t, i] - 1e-12).sum()) - 1 for t, i in enumerate(image_of)]
    own = torch.zeros_like(S, dtype=torch.bool)
    own[torch.arange(T), image_of] = True
    best = S.masked_fill(~own, -torch.inf).amax(0)
    by_image = ((S >= best - 1e-12) & ~own).sum(0).tolist()
    for block in (17, 60, 512):
        ours = eval_zeroshot.ranks_of(eval_zeroshot.Cosines(W, f), image_of, block)
        assert ours[0].tolist() == by_caption and ours[1].tolist() == by_image
    whole = eval_zeroshot.recall(W @ f.T, image_of)
    for metric, score in eval_zeroshot.recall(eval_zeroshot.Cosines(W, f), image_of).items():
        assert torch.equal(score, whole[metric])


def test_the_similarity_is_never_held_whole():
    seen = []

    class Watched(eval_zeroshot.Cosines):
        def __getitem__(self, at):
            seen.append(super().__getitem__(at))
            return seen[-1]

    eval_zeroshot.recall(Watched(torch.randn(5000, 2), torch.randn(1000, 2)), torch.arange(5000) % 1000)
    assert max(S.numel() for S in seen) <= 512 * 5000  # 10 blocks of captions, 2 of images
    assert sum(S.numel() for S in seen) == 2 * 5000 * 1000


def test_recall_at_all_there_is_is_not_scored():
    scores = eval_zeroshot.recall(torch.eye(6), torch.arange(6))
    assert list(scores) == ["TR@1", "TR@5", "IR@1", "IR@5"] and scores["IR@1"].mean() == 1


def test_accuracy_by_loops():
    """Class 3 of 7 has no images: it is no part of the mean over classes."""
    torch.manual_seed(0)
    target = torch.tensor([0, 0, 0, 1, 2, 2, 4, 5, 6, 6])
    W = torch.randn(7, 8)
    f = W[target] + torch.randn(10, 8)
    W[5] = W[2]  # as ImageNet's two `missile`s: the first of the list is named
    top = eval_zeroshot.classify(f, W)
    scores = eval_zeroshot.accuracy(top, target, 7)
    logits = f @ W.T
    order = [sorted(range(7), key=lambda c: (-logits[i, c].item(), c)) for i in range(10)]
    assert top.tolist() == [o[:5] for o in order]
    right = [o[0] == t for o, t in zip(order, target.tolist(), strict=True)]
    assert 0 < sum(right) and scores["acc1"].tolist() == right
    assert scores["acc5"].tolist() == [t in o[:5] for o, t in zip(order, target.tolist(), strict=True)]
    of_class = {
        c: [r for r, t in zip(right, target.tolist(), strict=True) if t == c] for c in target.tolist()
    }
    expected = np.mean([np.mean(r) for r in of_class.values()])
    assert len(of_class) == 6 and scores["mean per class"].mean().item() == pytest.approx(expected, abs=1e-12)
    assert "acc5" not in eval_zeroshot.accuracy(top[:, :3], target.clamp(max=2), 3)
