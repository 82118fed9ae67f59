"""The demo: its committed model as open_clip and our backbone see it, what it knows, its report and steps."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from pycocotools.cocoeval import Params
from torchvision.ops import box_iou

import backbone as vit
import tasks
from data.pose import person_crop
from data.stream import collate
from data.validation import prepare
from demo import pretrain, report, world

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "demo" / "eva_mini_clip.safetensors"
# What the committed model gets right: of 210 pictures of a thing, 105 signs, 100 scenes and 500 captions
RIGHT = dict(plain=192, sketch=101, rotated=116, noisy=89)
READ = 5
CAPTIONS = 42  # of 60 that name nothing that is not there
THINGS = {"detection": (152, 206), "segmentation": (132, 206)}  # found in these scenes, of how many
PERSONS = (20, 34)  # found in these, of how many
FOUND = {"image to text": [72, 89, 93], "text to image": [223, 361, 415]}  # at 1, 5 and 10


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The committed model, its transform and its tokenizer, by open_clip alone, from another folder."""
    vit.register_models()
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    try:
        vit.register_models()
        open_clip.add_model_config(ROOT / "demo" / "eva_mini_clip.json")
        model, _, preprocess = open_clip.create_model_and_transforms("eva_mini_clip", str(WEIGHTS))
        yield model.eval(), preprocess, open_clip.get_tokenizer("eva_mini_clip")
    finally:
        os.chdir(here)


def test_the_files_are_small():
    heads = (ROOT / "demo" / "heads").glob("*.safetensors")
    assert WEIGHTS.stat().st_size <= 12e6
    assert sum(path.stat().st_size for path in (WEIGHTS, *heads)) <= 40e6


@torch.no_grad()
def test_open_clips_tower_and_ours_are_the_same(clip):
    backbone = vit.load("eva_mini.px112", str(WEIGHTS))
    torch.manual_seed(0)
    images = torch.randn(2, 3, 112, 112)
    trunk = clip[0].visual.trunk
    assert trunk.pos_embed.shape == (1, 65, 192)
    theirs, ours = trunk.forward_features(images), backbone(images)
    torch.testing.assert_close(ours.cls, theirs[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.grid.flatten(2).transpose(1, 2), theirs[:, 1:], atol=1e-5, rtol=1e-4)
    assert ours.cls.std() > 0.1


def reopened(picture: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(world.encode(picture)))


def named(clip, pictures: list[Image.Image], names: list[str], templates) -> list[str]:
    """The likeliest of `names` for each picture, by open_clip alone."""
    model, preprocess, tokenize = clip
    classifier = open_clip.build_zero_shot_classifier(model, tokenize, names, templates)
    f = model.encode_image(torch.stack([preprocess(reopened(p)) for p in pictures]), normalize=True)
    return [names[i] for i in (f @ classifier).argmax(1).tolist()]


@torch.no_grad()
@pytest.mark.parametrize("variant", world.VARIANTS)
def test_it_knows_the_classes(clip, variant):
    """To the image; chance is 1 in 14."""
    pictures, things = zip(*(world.thing_picture((20, i), variant) for i in range(210)), strict=True)
    told = named(clip, pictures, world.THINGS, world.TEMPLATES)
    assert sum(name == t.name for name, t in zip(told, things, strict=True)) == RIGHT[variant]


@torch.no_grad()
def test_it_reads_signs(clip):
    """To the sign; chance is 1 in 50."""
    sign, n = world.THINGS.index("sign"), len(world.THINGS)
    drawn = [world.thing_picture((21, sign + n * i), "plain") for i in range(150)]
    pictures, things = zip(*[(p, t) for p, t in drawn if t.word in world.COMMON][:105], strict=True)
    told = named(clip, pictures, world.COMMON, pretrain.SAID)
    assert sum(word == t.word for word, t in zip(told, things, strict=True)) == READ


@torch.no_grad()
def test_it_finds_pictures_and_captions(clip):
    """To the image, in a gallery of 100; chance is 1 in 100."""
    model, preprocess, tokenize = clip
    images, texts = [], []
    for image_id in range(100):
        rng = np.random.default_rng((1, image_id))
        scene = world.scene(rng, 112)
        images.append(preprocess(reopened(scene.image)))
        texts += world.sentences(rng, scene)
    f = model.encode_image(torch.stack(images), normalize=True)
    t = model.encode_text(tokenize(texts), normalize=True)
    own = torch.arange(len(texts)) // 5
    s = f @ t.T  # (100, 500)
    to_text = [own[s.topk(k).indices].eq(torch.arange(100)[:, None]).any(1) for k in (1, 5, 10)]
    to_image = [s.T.topk(k).indices.eq(own[:, None]).any(1) for k in (1, 5, 10)]
    found = {"image to text": to_text, "text to image": to_image}
    assert {title: [int(r.sum()) for r in right] for title, right in found.items()} == FOUND


def answered(task: str) -> tuple[torch.nn.Module, list[dict], list[world.Scene]]:
    """The committed head, what it answers on 60 scenes that no one trained on, and the scenes."""
    backbone = vit.load("eva_mini.px112", str(WEIGHTS))
    head = tasks.load_head(ROOT / "demo" / "heads" / f"{task}.safetensors", backbone.dim)
    samples, scenes = [], [world.scene(np.random.default_rng((2, i)), 112) for i in range(60)]
    for image_id, scene in enumerate(scenes):
        pixels = torch.from_numpy(np.array(reopened(scene.image))).permute(2, 0, 1)
        image, target = prepare(pixels, task, 14, square=112)
        samples.append((image, {"image_id": image_id, **target}))
    images, valid, y = collate(samples, 14, backbone.mean, backbone.std)
    with torch.no_grad():
        return head, head.predict(backbone(images, valid), y), scenes


def test_its_head_captions_what_is_there():
    """To the caption: how many of 60 name things, and only such that are in the scene."""
    head, answers, scenes = answered("captioning")
    assert head.fc.weight.dtype == torch.float32
    there = [{thing.name for thing in scene.things} for scene in scenes]
    named = [{*answer["caption"].split()} & {*world.THINGS} for answer in answers]
    assert sum(bool(n) and n <= t for n, t in zip(named, there, strict=True)) == CAPTIONS


@pytest.mark.parametrize("task", THINGS)
def test_its_heads_find_what_is_there(task):
    """To the thing: how many have an answer, half sure, of their name and with an IoU of a half or more."""
    head, answers, scenes = answered(task)
    names, found = [c["name"] for c in head.config["categories"]], 0
    for answer, scene in zip(answers, scenes, strict=True):
        for thing in scene.things:
            mine = (answer["scores"] >= 0.5) & (answer["labels"] == names.index(thing.name))
            if task == "detection":
                overlap = box_iou(answer["boxes_xyxy"][mine], torch.tensor([thing.box]).float())
            else:
                mask, masks = torch.from_numpy(thing.mask), answer["masks"][mine]
                overlap = (masks & mask).sum((1, 2)) / (masks | mask).sum((1, 2))
            found += bool((overlap >= 0.5).any())
    assert (found, sum(len(scene.things) for scene in scenes)) == THINGS[task]


@torch.no_grad()
def test_its_head_finds_joints():
    """To the person: how many of 60 scenes have an OKS of a half or more, by COCO's formula."""
    backbone = vit.load("eva_mini.px112", str(WEIGHTS))
    head = tasks.load_head(ROOT / "demo" / "heads" / "pose.safetensors", backbone.dim)
    deviation, found, persons = 2 * Params("keypoints").kpt_oks_sigmas, 0, 0
    for image_id in range(60):
        scene = world.scene(np.random.default_rng((2, image_id)), 112)
        image = torch.from_numpy(np.array(reopened(scene.image))).permute(2, 0, 1)
        for person in (a for a in world.annotate(scene) if a.get("num_keypoints")):
            crop, known = person_crop(image, person["bbox"], 14, square=112)
            sample = crop, {"image_id": image_id, **known}
            x, valid, y = collate([sample], 14, backbone.mean, backbone.std)
            at = head.predict(backbone(x, valid), y)[0]["keypoints"][:, :2].numpy()
            points = np.array(person["keypoints"]).reshape(-1, 3)
            d2 = np.square(at - points[:, :2]).sum(1)
            oks = np.exp(-d2 / (2 * person["area"] * deviation**2))[points[:, 2] > 0].mean()
            found, persons = found + (oks >= 0.5), persons + 1
    assert (found, persons) == PERSONS


def test_alt_text_names_a_part_and_no_positions():
    """What makes the pretraining coarse: one to three things, and never where they are."""
    fewer = 0
    for i in range(200):
        rng = np.random.default_rng(i)
        scene = world.scene(rng, 96)
        text = pretrain.sentence(rng, scene.things, list(scene.stuff))
        text = re.sub(r" that says \w+", "", text)
        assert not any(word in text for word in ("left", "right", "above", "below", "behind", "front"))
        named = text.count(" and ") + 1
        assert named <= 3 and (scene.things == [] or named <= len(scene.things))
        fewer += named < len(scene.things)
    assert fewer > 80


def test_pictures_are_mixed_as_asked():
    """A marked thing is named as marked, a word as itself; the parts are those that were asked for."""
    kinds, n = Counter(), 300
    for i in range(n):
        picture, texts = pretrain.sample(i, 0, things=0.3, words=0.25, marked=0.2, bare=0.5)
        assert picture.shape == (128, 128, 3) and len(texts) == pretrain.SENTENCES
        texts = [re.sub("^(a picture of|a photo of|an image of) ", "", text) for text in texts]
        words = {re.sub("^(the word|a sign that says) ", "", text) for text in texts}
        if all(text.endswith("marked in red") for text in texts):
            kinds["marked"] += 1
            assert len({text.split()[-4] for text in texts if "says" not in text} & set(world.THINGS)) <= 1
            red = (picture[..., 0] > 180) & (picture[..., 1:] < 90).all(2)
            assert red.sum() > 30
        elif len(words) == 1 and " " not in (word := words.pop()):
            kinds["word"] += 1
            assert word in world.COMMON or word.isdigit()
    assert 0.15 < kinds["marked"] / n < 0.25 and 0.2 < kinds["word"] / n < 0.32


def test_a_patch_embedding_as_a_product_is_the_convolution():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 8, 14, 14)
    x = torch.randn(2, 3, 56, 42)
    expected = conv(x)
    conv.__class__ = pretrain.Patches
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)


def test_an_interrupted_pretraining_goes_on(tmp_path, monkeypatch):
    """After 2 of 3 steps: the same weights and log as without the interruption, but for the seconds."""
    common = ["--pictures", "32", "--batch", "16", "--coarse", "1", "--decay", "1", "--save-every", "1"]
    common += ["--tests", "14", "--steps", "3"]

    def run(folder, *options):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out", str(tmp_path / folder), *common, *options])
        pretrain.main()
        lines = (tmp_path / folder / "log.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    whole = run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again", ignore=shutil.ignore_patterns("*.pt", "log*"))
    save, calls = torch.save, []

    def stopping(*args):
        save(*args)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt  # the state is in a temporary file; the log is a line ahead

    monkeypatch.setattr(torch, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("again")
    monkeypatch.setattr(torch, "save", save)
    assert run("again", "--resume") == whole and len(whole) == 3
    files = [(tmp_path / folder / "eva_mini_clip.safetensors").read_bytes() for folder in ("whole", "again")]
    assert files[0] == files[1]


def test_a_crop_is_the_window_it_says():
    """Channels that tell the row and the column: their means are the middle of the window."""
    places = np.arange(128, dtype=np.uint8)
    pictures = np.zeros((6, 128, 128, 3), np.uint8)
    pictures[..., 0], pictures[..., 1] = places[:, None], places
    cut = pretrain.crop(pictures, np.random.default_rng(5), 112, lambda x: x * 255)  # (6, 3, 112, 112)
    rng = np.random.default_rng(5)
    window = rng.integers(109, 129)
    corners = torch.from_numpy(rng.integers(0, 129 - window, (6, 2)))
    torch.testing.assert_close(
        cut[:, :2].mean((2, 3)), (corners + (window - 1) / 2).float(), atol=0.3, rtol=0
    )
    assert len(corners.unique()) > 3


def test_report_has_every_row_and_its_error(tmp_path):
    rows = {0: (50.0, 53.0), 1: (50.0, 54.0), 2: (50.0, 55.0)}
    for seed, (before, after) in rows.items():
        row = dict(
            set="fonts", metric="accuracy", n=210, before=before, after=after, difference=after - before
        )
        alone = dict(
            set="val", metric="top-1", n=9, before=40.0, after=None, difference=None, low=None, high=None
        )
        for name, content in (("ocr", {**row, "low": 1.0, "high": 5.0}), ("goi", alone)):
            (tmp_path / f"seed{seed}" / name).mkdir(parents=True)
            (tmp_path / f"seed{seed}" / name / "result.json").write_text(json.dumps({"rows": [content]}))
    figure = tmp_path / "figures" / "attention" / "one.png"
    figure.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4), (9, 8, 7)).save(figure)
    (tmp_path / "times.tsv").write_text("The world\t7\nStage 2\t30\n")
    parts = report.sections(tmp_path)
    text, html = report.markdown(parts, tmp_path), report.page(parts)
    # differences 3, 4, 5: mean 4, standard error 1 / sqrt(3)
    expected = ["ocr", "fonts", "accuracy", "210", "50.0", "54.0", "+4.00", "± 0.58 (3 seeds)"]
    assert f"| {' | '.join(expected)} | +2.5" in text
    assert "| goi | val | top-1 | 9 | 40.0 | - | - | - |" in text
    assert "| sum | 37 |" in text and "![one](figures/attention/one.png)" in text
    for cell in expected:
        assert f"<td>{cell}</td>" in html
    assert "data:image/png;base64,iVBOR" in html and 'src="figures' not in html
    for seed in (1, 2):
        (tmp_path / f"seed{seed}" / "ocr" / "result.json").unlink()
    assert "+1.0 .. +5.0 (95%, items)" in report.markdown(report.sections(tmp_path), tmp_path)


def test_report_shows_words_of_each_outcome(tmp_path, monkeypatch):
    """Two sets of pictures, a word of each outcome in the first, one right in both in the second."""
    rows, names = [], []
    for name, read in (
        ("fonts", [("cat", "cat"), ("dog", "cat"), ("cat", "dog"), ("", "x")]),
        ("blur", [("Cat!", "cat")]),
    ):
        folder = tmp_path / "world" / "words" / "test" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (20, 8)).save(folder / "a.png")
        (folder / "gt.txt").write_text("a.png\tcat\n" * len(read))
        for i, (before, after) in enumerate(read, 1):
            rows.append(dict(image_id=f"{name}/{i:09d}", label="cat", before=before, after=after))
    (tmp_path / "seed0" / "ocr").mkdir(parents=True)
    (tmp_path / "seed0" / "ocr" / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    title = report.plt.Axes.set_title
    monkeypatch.setattr(report.plt.Axes, "set_title", lambda *a, **k: names.append(a[1]) or title(*a, **k))
    parts = report.sections(tmp_path)
    assert ("picture", tmp_path / "figures" / "words" / "words.png", "words") in parts
    told = [name.split("\n") for name in names]
    assert told == [
        ["cat | cat", "(right in both, fonts)"],
        ["Cat! | cat", "(right in both, blur)"],
        ["dog | cat", "(right after, fonts)"],
        ["cat | dog", "(right before, fonts)"],
        [" | x", "(right in neither, fonts)"],
    ]


def test_the_first_picture_is_attention_above_boxes_of_the_second_scene(tmp_path):
    for kind, name, size, color in (
        ("attention", "2", (50, 20), "red"), ("predict", "2_detection", (100, 30), "blue"),
        ("predict", "1_detection", (10, 10), "white"), ("attention", "1", (10, 10), "white"),
    ):  # fmt: skip
        (tmp_path / "figures" / kind).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(tmp_path / "figures" / kind / f"{name}.png")
    report.draw_first(tmp_path, width=200)
    picture = np.asarray(Image.open(tmp_path / "first.jpg"))
    assert picture.shape == (80 + 60, 200, 3)
    assert (picture[5, 5] > [200, -1, -1]).all() and (picture[-5, -5] > [-1, -1, 200]).all()
    assert picture[5, 5, 2] < 50 and picture[-5, -5, 0] < 50


def demo(*arguments, **environment) -> subprocess.CompletedProcess:
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "runs/demo.sh", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PATH": path, **environment},
    )  # fmt: skip


STUB = r"""#!/usr/bin/env bash
# In the place of python: notes the call and makes what it would; calls are interrupted from the STOP-th on
echo "$*" >> "$CALLS"
[ "$STOP" -gt 0 ] && [ "$(wc -l < "$CALLS")" -ge "$STOP" ] && trap 'exit 130' EXIT
case $1 in demo/world.py) mkdir -p "$2/coco/val2017" && touch "$2"/coco/val2017/{1,2,3,4}.jpg ;; esac
while [ $# -gt 1 ]; do [ "$1" = --out ] && break; shift; done
out=${2:-/dev/null}
[ "$out" = /dev/null ] && exit
mkdir -p "$out" && cd "$out" && task=$(basename "$out")
touch {result.json,log.jsonl} {lora,captioning,$task}.safetensors curves.png 4.png 4_captioning.png
"""
STOPPED = ["stage1_heads.py", "eval_heads.py", "eval_ocr.py"]


def test_demo_goes_on_where_it_was_interrupted(tmp_path):
    """Nothing that was done is repeated, and the step that was interrupted is called again as it was."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def calls(name, *stops, jobs=1):
        log = tmp_path / f"{name}.txt"
        for stop in stops:
            done = demo(tmp_path / name, PATH=path, CALLS=str(log), STOP=str(stop), JOBS=str(jobs), SEEDS="2")
            assert done.returncode == (130 if stop else 0), done.stderr
            assert ("goes on from here" in done.stderr) == bool(stop)
        lines = log.read_text().replace(str(tmp_path / name), "OUT").splitlines()
        return lines, [
            line.split("\t")[0] for line in (tmp_path / name / "times.tsv").read_text().splitlines()
        ]

    whole, steps = calls("whole", 0)
    assert [whole[i].split()[0] for i in (1, 5, 12)] == STOPPED
    again, steps_again = calls("again", 2, 7, 15, 0, 0)  # the last time only the report is to be made
    assert again == whole[:2] + whole[1:6] + whole[5:13] + whole[12:] + whole[-1:]
    assert steps_again == steps and len(set(steps)) == len(whole) - 1
    trained = [line for line in whole if line.startswith(("stage", "eval_ocr"))]
    assert len(trained) == 5 and all("--resume --save-every 50" in line for line in trained)
    beside, steps_beside = calls("beside", 0, jobs=2)
    assert sorted(beside) == sorted(whole) and sorted(steps_beside) == sorted(steps)
    stopped, _ = calls("stopped", 5, 0, jobs=2)  # what runs beside the one that stops is stopped with it
    assert {*stopped} == {*whole}


def test_demo_trains_heads_where_asked(tmp_path):
    """By runs/heads.sh, three of them, on a world of their own; stage 2 goes through these, in fp16."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)
    log, path = tmp_path / "calls.txt", f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = demo(tmp_path / "out", PATH=path, CALLS=str(log), STOP="0", HEADS="train", JOBS="1")
    assert done.returncode == 0, done.stderr
    lines = log.read_text().replace(str(tmp_path / "out"), "OUT").splitlines()
    assert "demo/world.py OUT/heads/world --train 24000 --words 64" in lines
    trained = [line.split()[2] for line in lines if line.startswith("stage1_heads.py")]
    assert sorted(trained) == ["captioning", "captioning", "detection", "segmentation"]
    halves = [line.split()[-1] for line in lines if line.startswith("demo/miniature.py half")]
    assert sorted(halves) == [f"OUT/heads/half/{task}.safetensors" for task in sorted({*trained})]
    (second,) = [line for line in lines if line.startswith("stage2_lora.py")]
    assert "--heads OUT/heads/half " in second


def test_demo_leaves_what_is_not_its_own_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = demo(tmp_path)
    assert done.returncode == 2 and "nothing was changed" in done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "version").write_text("another")
    assert demo(tmp_path).returncode == 2
    done = demo(tmp_path / "thesis.txt" / "out")
    assert done.returncode == 2 and "cannot write" in done.stderr
    done = demo(tmp_path / "new", SEEDS="many")
    assert done.returncode == 2 and "SEEDS" in done.stderr and not (tmp_path / "new").exists()
    done = demo(tmp_path / "new", HEADS=str(tmp_path / "none"))
    assert done.returncode == 2 and "HEADS" in done.stderr and not (tmp_path / "new").exists()
