"""Pictures: attention against its formula by hand, what is drawn against the answer, the script as used."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as TF

import backbone as vit
import lora
import tasks
import visualize
from data.pose import mirror
from files import read_picture

MINI = ("--model", "eva_mini.px112", "--weights", "random")


def by_hand(backbone: vit.Backbone, images: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) of [CLS] in the last block, from the weights of q and k (with dW added in)."""
    block, seen = backbone.vit.blocks[-1], []
    hook = block.norm1.register_forward_hook(lambda *call: seen.append(call[2]))
    backbone(images)
    hook.remove()
    x, layer, D = seen[0], block.attn, backbone.dim
    W = layer.qkv.weight.clone()
    if isinstance(layer.qkv, lora.LoRALinear):
        r = len(layer.qkv.lora_A) // 2
        A, B, scale = layer.qkv.lora_A, layer.qkv.lora_B, layer.qkv.alpha / r
        W[:D] += scale * B[:D] @ A[:r]
    bias_q = layer.q_bias if layer.q_bias is not None else layer.qkv.bias[:D]
    q = (x[:, :1] @ W[:D].T + bias_q).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
    k = (x @ W[D : 2 * D].T).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (B, heads, 1, N)
    return weights[:, :, 0, 1:]


@pytest.fixture
def tuned(tmp_path):
    """A LoRA file that changes eva_mini.px112 visibly."""
    backbone = vit.load("eva_mini.px112", "random")
    lora.attach(backbone.vit, rank=4, alpha=4)
    torch.manual_seed(1)
    for name, value in lora.parameters(backbone.vit).items():
        if name.endswith("lora_B"):
            nn.init.normal_(value, std=0.3)
    lora.save(backbone.vit, tmp_path / "lora.safetensors", backbone="eva_mini.px112")
    return tmp_path / "lora.safetensors"


@torch.no_grad()
def test_attention_is_the_softmax_of_the_last_layer(tuned):
    backbone = vit.load("eva_mini.px112", "random")
    for block in backbone.vit.blocks:  # fresh weights hardly attend to anything
        block.attn.qkv.weight.mul_(8)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 112, 84)
    plain, expected = visualize.cls_attention(backbone, images), by_hand(backbone, images)
    assert plain.shape == (2, 3, 8, 6) and plain.std() > 1e-3
    torch.testing.assert_close(plain.flatten(2), expected, atol=1e-6, rtol=1e-4)
    lora.load(backbone.vit, tuned)
    after = visualize.cls_attention(backbone, images)
    torch.testing.assert_close(after.flatten(2), by_hand(backbone, images), atol=1e-6, rtol=1e-4)
    assert (after - plain).abs().max() > 1e-3
    assert backbone.vit.blocks[-1].attn.fused_attn  # left as it was found
    assert not backbone.vit.blocks[-1].attn.attn_drop._forward_hooks


def test_attention_as_used(run, scenes, tuned, tmp_path):
    pictures = sorted((scenes / "val2017").glob("*.jpg"))[:2]
    code, out, _ = run(
        "visualize", "attention", *pictures, *MINI, "--compare", tuned, "--out", tmp_path / "both"
    )
    assert code == 0 and out.count(".png") == 2
    code, *_ = run(
        "visualize", "attention", scenes / "val2017", "--limit", 2, *MINI, "--out", tmp_path / "plain"
    )
    assert code == 0
    for picture in pictures:
        both, plain = (np.load(tmp_path / which / f"{picture.stem}.npz") for which in ("both", "plain"))
        assert both["before"].shape == (3, 8, 8) and set(plain) == {"before"}
        np.testing.assert_array_equal(both["before"], plain["before"])
        assert np.abs(both["after"] - both["before"]).max() > 1e-4
        with Image.open(tmp_path / "both" / f"{picture.stem}.png") as image:
            assert np.asarray(image).std() > 10
    code, _, err = run("visualize", "attention", *pictures, *MINI, "--no-cls")
    assert code == 2 and "no [CLS]" in err


def test_what_is_drawn_is_what_was_answered():
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    boxes = torch.tensor([[2.0, 3, 10, 20], [5, 5, 30, 9], [0, 0, 4, 4]])
    answer = {"scores": torch.tensor([0.9, 0.6, 0.4]), "labels": torch.tensor([1, 0, 1]), "boxes_xyxy": boxes}
    axis = plt.figure().add_subplot()
    assert visualize.draw_objects(axis, answer, categories, 0.5) == "2 at 0.5 or more, the best 0.90"
    drawn = [(*r.get_xy(), r.get_x() + r.get_width(), r.get_y() + r.get_height()) for r in axis.patches]
    assert drawn == [tuple(box) for box in boxes[:2].tolist()]
    assert [text.get_text() for text in axis.texts] == ["dog 0.90", "cat 0.60"]

    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    answer = {"scores": torch.tensor([0.9, 0.1, 0.1]), "labels": torch.tensor([0, 0, 0]), "masks": masks}
    axis = plt.figure().add_subplot()
    visualize.draw_objects(axis, answer, categories, 0.5)
    (tint,) = axis.images
    np.testing.assert_array_equal(np.asarray(tint.get_array())[..., 3] > 0, masks[0])

    axis = plt.figure().add_subplot()
    segments = torch.tensor([[7, 7, 0], [7, 9, 9]])
    infos = [{"id": 7, "category_id": 2}, {"id": 9, "category_id": 1}]
    visualize.draw_segments(axis, {"segments": segments, "segments_info": infos}, categories)
    for tint, segment in zip(axis.images, (7, 9), strict=True):
        np.testing.assert_array_equal(np.asarray(tint.get_array())[..., 3] > 0, segments == segment)
    assert [text.get_text() for text in axis.texts] == ["dog", "cat"]
    plt.close("all")


def test_a_caption_is_drawn_with_a_map_for_each_word(run, scenes, tmp_path, monkeypatch):
    """The captioner's own, having learned one sentence; also behind an <unk>, which captions leave out."""
    backbone = vit.load(MINI[1], "random")
    picture = sorted((scenes / "val2017").glob("*.jpg"))[0]
    pixels = TF.resize(read_picture(picture), [70, 70], antialias=True)
    f = backbone(TF.normalize(TF.to_dtype(pixels, scale=True), backbone.mean, backbone.std)[None])
    vocabulary = ["<pad>", "red", "star", "on", "grass", "<unk>", "<start>", "<end>"]
    torch.manual_seed(0)
    head = tasks.find("captioning").Head(192, vocabulary).eval()
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        head.loss(f, [{"tokens": torch.tensor([6, 1, 5, 2, 3, 4, 7])}])[0].backward()
        optimizer.step()
    tasks.save_head(head, tmp_path / "captioning.safetensors", "captioning", backbone=MINI[1])

    drawn, finish = [], visualize.finish
    monkeypatch.setattr(visualize, "finish", lambda axes, out: drawn.append(axes) or finish(axes, out))
    options = ("--heads", tmp_path, "--tasks", "captioning", "--image-scale", 0.25, "--out", tmp_path)
    code, out, err = run("visualize", "predict", picture, *MINI, *options)
    assert code == 0 and f"{picture.stem}_captioning.png" in out, err
    ((axes,),) = drawn
    assert [axis.get_title() for axis in axes] == ["before", "red", "<unk>", "star", "on", "grass"]
    (answer,) = head.predict(f, [{"image_id": 0}])
    assert answer["attention"].std(0).max() > 1e-4  # not the same for every word
    for axis, weights in zip(axes[1:], answer["attention"], strict=False):
        np.testing.assert_allclose(axis.images[1].get_array(), weights, atol=1e-6)


def test_predictions_as_used(run, scenes, tuned, tmp_path):
    categories = [{"id": 1, "name": "person", "isthing": True}, {"id": 101, "name": "sky", "isthing": False}]
    (tmp_path / "heads").mkdir()
    for task in ("detection", "segmentation", "panoptic"):
        torch.manual_seed(0)
        head = tasks.find(task).Head(192, categories)
        tasks.save_head(head, tmp_path / "heads" / f"{task}.safetensors", task, backbone="eva_mini.px112")
    picture = sorted((scenes / "val2017").glob("*.jpg"))[0]
    options = (
        "--heads",
        tmp_path / "heads",
        *MINI,
        "--compare",
        tuned,
        "--image-scale",
        0.167,
        "--sure",
        0.1,
    )
    three = ("--tasks", "detection", "segmentation", "panoptic")
    code, out, _ = run("visualize", "predict", picture, *options, *three, "--out", tmp_path / "p")
    assert code == 0 and out.count(".png") == 3
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == [
        f"{picture.stem}_{task}.png" for task in ("detection", "panoptic", "segmentation")
    ]


def test_keypoints_as_used(run, scenes, tmp_path):
    """Boxes of --persons by the number in a picture's name; without them the whole picture is one."""
    content = json.loads((scenes / "annotations" / "person_keypoints_val2017.json").read_text())
    names = content["categories"][0]["keypoints"]
    categories = [{"id": 1, "name": "person", "keypoints": names, "mirror": mirror(names)}]
    tasks.save_head(tasks.find("pose").Head(192, categories), tmp_path / "pose.safetensors", "pose")
    first, second = sorted((scenes / "val2017").glob("*.jpg"))[:2]
    boxes = [{"image_id": int(first.stem), "bbox": [1, 2, 30, 40], "score": s} for s in (0.5, 0.25)]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    options = (*MINI, "--heads", tmp_path, "--tasks", "pose", "--image-scale", 0.5, "--sure", 0)
    for place in ((), ("--persons", tmp_path / "boxes.json")):
        code, out, err = run("visualize", "predict", first, second, *options, *place, "--out", tmp_path / "p")
        assert code == 0 and out.count("_pose.png") == 2, err
    pixels = torch.zeros(3, 50, 60, dtype=torch.uint8)
    (tmp_path / "holiday.png").write_bytes(first.read_bytes())
    code, _, err = run("visualize", "predict", tmp_path / "holiday.png", *options, *place)
    assert code == 2 and "this name is none" in err
    persons = visualize.read_persons(tmp_path / "boxes.json")
    (_, half), (_, quarter) = visualize.crops(pixels, first, persons, 14, 0.5)
    assert (half["score"], quarter["score"]) == (0.5, 0.25)
    assert half["crop_cxcywh"][:2].tolist() == [16, 22]  # the middle of the box
    assert visualize.crops(pixels, second, persons, 14, 0.5) == []
    ((_, whole),) = visualize.crops(pixels, second, None, 14, 0.5)
    assert whole["crop_cxcywh"][:2].tolist() == [30, 25] and whole["score"] == 1


def test_what_is_drawn_of_persons_is_what_was_answered():
    names = ["nose", "left_eye", "right_eye", "left_ear"]
    keypoints = torch.tensor([[10.0, 9, 0.9], [12, 8, 0.8], [8, 8, 0.1], [14, 9, 0.7]])
    axis = plt.figure().add_subplot()
    told = visualize.draw_persons(axis, [{"keypoints": keypoints}], names, 0.5)
    assert told == "3 keypoints at 0.5 or more, 1 persons"
    lines = {tuple(map(tuple, line.get_xydata().tolist())) for line in axis.lines}
    assert lines == {((12, 8), (14, 9)), ((10, 9), (12, 8))}  # eye to ear, nose to eye
    assert axis.collections[0].get_offsets().tolist() == [[10, 9], [12, 8], [14, 9]]
    plt.close("all")


def test_curves_as_used(run, tmp_path):
    log = tmp_path / "visft" / "log.jsonl"
    log.parent.mkdir()
    lines = [{"step": s, "lr": 1e-3, "detection/loss": 9.0 - s, "detection/grad_norm": 1.0} for s in (1, 2)]
    log.write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "segmentation/loss": 2.0}])
    )
    code, *_ = run("visualize", "curves", log, log, "--out", tmp_path / "out")
    assert code == 0 and (tmp_path / "out" / "curves.png").is_file()
    log.write_text('{"step": 1}\n')
    code, _, err = run("visualize", "curves", log, "--out", tmp_path / "out")
    assert code == 2 and "no loss in it" in err


def test_curves_show_the_speed_of_the_logs_that_tell_it(run, tmp_path):
    lines, heights = (
        [{"step": s, "detection/loss": 3.0, "seconds": 2.0 / s, "waiting": 0.25} for s in (1, 2)],
        [],
    )
    for name, logged in (("old", [{"step": 1, "detection/loss": 3.0}]), ("new", lines)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
        logs = [tmp_path / had / "log.jsonl" for had in ("old", name)]
        assert run("visualize", "curves", *logs, "--out", tmp_path / name)[0] == 0
        heights.append(plt.imread(tmp_path / name / "curves.png").shape[0])
    assert heights[1] > heights[0]  # a row more
    figure, axis = plt.subplots()
    visualize.draw_speed(axis, lines)
    seconds, share = (one.lines[0].get_ydata() for one in figure.axes)
    plt.close(figure)
    assert list(seconds) == [2.0, 1.0] and list(share) == [0.25, 0.25]


def test_wrong_places_and_options_are_named(run, tmp_path, tuned):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    for options, says in (
        (["attention", tmp_path / "empty", *MINI], "no such picture"),
        (["attention", tmp_path / "nowhere.jpg", *MINI], "nowhere.jpg"),
        (["attention", tmp_path / "text.png", *MINI], "cannot be decoded"),
        (["attention", tmp_path / "text.png", *MINI, "--size", 100], "multiple of the patch, 14"),
        (["attention", tmp_path / "text.png", *MINI, "--limit", 0], "--limit must be at least 1"),
        (["attention", tmp_path / "text.png", "--model", "eva_mini", "--lora", tuned], "no backbone weights"),
        (
            ["attention", tmp_path / "text.png", "--model", "eva_mini", *MINI[2:], "--lora", tuned],
            "was tuned on",
        ),
        (["predict", tmp_path / "text.png", *MINI, "--heads", tmp_path], "no detection head"),
        (["curves", tmp_path / "log.jsonl"], "no log at"),
    ):
        code, _, err = run("visualize", *options)
        assert code == 2 and says in err and err.count("\n") == 1, (options, err)


def test_a_picture_is_never_overwritten_and_two_of_one_name_give_two(tmp_path, run):
    rng = np.random.default_rng(0)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.fromarray(rng.integers(0, 255, (56, 56, 3), np.uint8)).save(tmp_path / folder / "a.png")
    before = (tmp_path / "one" / "a.png").read_bytes()
    common = ["--model", "eva_mini", "--weights", "random", "--size", 56]
    code, _, err = run("visualize", "attention", tmp_path / "one", *common, "--out", tmp_path / "one")
    assert code == 2 and "would be overwritten" in err and (tmp_path / "one" / "a.png").read_bytes() == before
    both = [tmp_path / "one" / "a.png", tmp_path / "two" / "a.png"]
    assert run("visualize", "attention", *both, *common, "--out", tmp_path / "out")[0] == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["one_a.npz", "one_a.png", "two_a.npz", "two_a.png"]
    maps = [np.load(tmp_path / "out" / f"{name}_a.npz")["before"] for name in ("one", "two")]
    assert not np.array_equal(*maps)
