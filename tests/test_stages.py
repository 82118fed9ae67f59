"""Both stages end to end, as a user runs and misuses them."""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.ops import box_convert

import backbone as vit
import files
import stage1_heads
import stage2_lora
import tasks
import training
from data import stream
from data.detection import Detection
from data.pose import Pose as Persons
from data.validation import open_items
from tests.stages import ROOT, losses, stage1, stage2


def test_tasks_come_as_often_as_their_probabilities():
    """Within 3 sigma over the paper's 50k steps, and again from the seed alone."""
    names, probs, steps = ["detection", "segmentation", "captioning"], [0.3, 0.3, 0.4], 50_000
    order = stage2_lora.task_order(names, probs, steps, seed=0)
    for task, p in zip(names, probs, strict=True):
        assert abs(order.count(task) - p * steps) < 3 * (p * (1 - p) * steps) ** 0.5
    assert order == stage2_lora.task_order(names, probs, steps, seed=0)
    assert order != stage2_lora.task_order(names, probs, steps, seed=1)


def test_head_lr_ratio_trains_the_heads_too(scenes, head, tmp_path, run, monkeypatch):
    """Table 11. At 0 the heads are not in the optimizer at all, and stay as they are bit for bit."""
    changed, loaded, load = {}, [], tasks.load_head
    monkeypatch.setattr(tasks, "load_head", lambda *a: loaded.append(load(*a)) or loaded[-1])
    before = load_file(head / "detection.safetensors")
    for ratio in (0.0, 0.1):
        out = tmp_path / str(ratio)
        code, *_ = run("stage2_lora", *stage2(scenes, out, head, iters=3, **{"head-lr-ratio": ratio}))
        assert code == 0
        state = torch.load(out / "last.pt")
        changed[ratio] = sorted(state["trained"])
        rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
        assert rates[0] > 0 and rates[1:] == ([pytest.approx(0.1 * rates[0])] if ratio else [])
        assert (out / "detection.safetensors").exists() == (ratio > 0)
        same = [torch.equal(value, before[name]) for name, value in loaded[-1].state_dict().items()]
        assert all(same) if ratio == 0 else not all(same)
    assert len(changed[0.0]) == 12 and set(changed[0.0]) < set(changed[0.1])
    after = load_file(out / "detection.safetensors")
    assert all(not torch.equal(after[name], value) for name, value in before.items() if "class_embed" in name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++")
def test_compiled_blocks_compute_the_same_and_files_keep_their_names(scenes, head, tmp_path, run):
    """Within 1e-4: other roundings of the same sums."""
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        code, *_ = run(
            "stage2_lora", *stage2(scenes, tmp_path / out, head, iters=2, **{"log-every": 1}), *more
        )
        assert code == 0
    plain, compiled = (load_file(tmp_path / out / "lora.safetensors") for out in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_a_non_finite_loss_stops_naming_step_task_and_images(scenes, head, tmp_path, run, monkeypatch):
    from heads.detr import Detr

    loss, calls = Detr.loss, []

    def explode(self, f, y):
        calls.append([t["image_id"] for t in y])
        value, parts = loss(self, f, y)
        return (value * float("nan"), parts) if len(calls) == 6 else (value, parts)

    monkeypatch.setattr(Detr, "loss", explode)
    options = stage2(scenes, tmp_path, head, **{"log-every": 4, "save-every": 4})
    code, _, err = run("stage2_lora", *options)
    assert code == 2
    assert f"not finite at step 6, task detection, images {calls[5]}" in err
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["trained"].values())


SIZES = {
    "detection": {"queries": 7, "layers": [1, 2], "dropout": 0.0},
    "segmentation": {"queries": 7, "layers": [1, 2], "points": 50},
    "captioning": {"dropout": 0.25},
}


@pytest.mark.parametrize("task", ["detection", "segmentation", "captioning", "pose"])
def test_a_head_of_kept_features_is_the_head_that_asks_m_each_time(scenes, tmp_path, run, monkeypatch, task):
    """Of 12 images in 24 positions M sees each once, and none the second time, nor are they read."""
    seen, forward = [], vit.Backbone.forward
    opened, read = [], stream.read_picture
    monkeypatch.setattr(stream, "read_picture", lambda *args: opened.append(args) or read(*args))
    monkeypatch.setattr(
        vit.Backbone, "forward", lambda self, x, valid=None: seen.append(len(x)) or forward(self, x, valid)
    )
    sizes = SIZES.get(task, {})
    changed = {"task": task, "iters": 6, "batch": 4, "size": 56, "image-scale": 1, **sizes}
    options = stage1(scenes, "OUT", **changed, **({"min-count": 1} if task == "captioning" else {}))
    heads, counts, reads = [], [], []
    for name, more in (("asking", []), ("keeping", ["--cache"]), ("again", ["--cache"])):
        seen.clear(), opened.clear()
        more = [*more, tmp_path / "kept"] if more else []
        code, _, err = run("stage1_heads", *[tmp_path / name if x == "OUT" else x for x in options], *more)
        assert code == 0, err
        heads.append(load_file(tmp_path / name / f"{task}.safetensors"))
        counts.append(sum(seen))
        reads.append(len(opened))
    rows = len(Persons(scenes, "train2017").ids) if task == "pose" else 12
    assert counts == [24, rows, 0] and reads[1:] == [rows, 0]
    for head in heads[1:]:
        for name, weight in head.items():
            torch.testing.assert_close(weight, heads[0][name], rtol=1e-4, atol=1e-5)
    header = files.read_header(tmp_path / "keeping" / f"{task}.safetensors", "head")
    assert header["size"] == 56 and sizes.items() <= header["config"].items()
    assert header["M"] == vit.load("eva_mini", "random").fingerprint
    rebuilt = tasks.load_head(tmp_path / "keeping" / f"{task}.safetensors", 192)
    assert all(torch.equal(v, heads[1][k]) for k, v in rebuilt.state_dict().items())


def test_kept_features_of_other_weights_or_images_are_not_taken(scenes, tmp_path, run):
    options = stage1(scenes, "OUT", iters=1, size=56, **{"image-scale": 1}, cache=tmp_path / "kept")
    for k, more in enumerate([[], [], ["--seed", 1], ["--data-fraction", 0.5], ["--size", 70]]):
        assert run("stage1_heads", *[tmp_path / str(k) if x == "OUT" else x for x in options], *more)[0] == 0
        assert len(list((tmp_path / "kept").glob("*.npy"))) == max(1, k)  # --weights random is of --seed


def test_stage_2_can_take_the_words_of_the_head(scenes, tmp_path, run):
    """A head of three words, on data that make others; what it does not know is <unk>."""
    vocabulary = ["<pad>", "a", "red", "tree", "<unk>", "<start>", "<end>"]
    path = tmp_path / "captioning.safetensors"
    tasks.save_head(tasks.find("captioning").Head(192, vocabulary), path, "captioning")
    options = stage2(scenes, tmp_path / "out", path, tasks="captioning", iters=2)
    code, _, err = run("stage2_lora", *options)
    assert code == 2 and "knows 7 words" in err
    code, out, err = run("stage2_lora", *options, "--head-words")
    assert code == 0, err
    stream = tasks.find("captioning").Stream(scenes, "train2017", 0, vocabulary=vocabulary)
    assert stream.classes == vocabulary and set(stream.tokens.tolist()) == {1, 2, 3, 4, 5, 6}


def test_stage_2_wants_the_M_of_the_heads(scenes, tmp_path, run):
    """Whatever file it comes from: here of a whole CLIP; not another of the same size."""
    M, path = vit.load("eva_mini", "random"), tmp_path / "detection.safetensors"
    save_file({f"visual.trunk.{k}": v for k, v in M.vit.state_dict().items()}, tmp_path / "clip.safetensors")
    head = tasks.find("detection").Head(192, Detection(scenes, "train2017").categories)
    tasks.save_head(head, path, "detection", M=M.fingerprint)
    options = stage2(scenes, tmp_path / "out", path, iters=1)
    for weights, refused in (("random", False), (tmp_path / "clip.safetensors", False), ("random", True)):
        more = ["--weights", weights, "--out", tmp_path / "out" / Path(weights).stem]
        code, _, err = run("stage2_lora", *options, *more, *(["--seed", 1, "--resume"] if refused else []))
        assert (code, "was trained on another M" in err) == ((2, True) if refused else (0, False)), err


def test_images_of_a_size_are_those_of_the_evaluation(scenes):
    """The same pixels in training as in evaluation, squashed and not augmented; boxes and masks with them."""
    known = dict(coco=scenes, split="train2017", seed=0, image_scale=1.0, size=70, limit=None, persons=None)
    known |= dict(exclude_images=None, data_fraction=1.0, captions=None, min_count=1, skip_bad_images=False)
    args = argparse.Namespace(**known)
    for task in tasks.NAMES:
        stream, items = tasks.open_stream(task, args), open_items(task, args)
        items.patch = 14
        for row in range(5):
            image, y = stream.read(row, 14)
            again, target = items[row]
            assert torch.equal(image, again) and image.shape == (3, 70, 70)
            assert y["image_id"] == target["image_id"] and y["size"] == target["size"] == (70, 70)
            if task == "detection":
                mine = stream.data.boxes_xyxy[stream.data.first[row] : stream.data.first[row + 1]]
                h, w = y["orig_size"]
                corners = box_convert(y["boxes_cxcywh"], "cxcywh", "xyxy") * torch.tensor([w, h, w, h])
                torch.testing.assert_close(corners, torch.from_numpy(mine), rtol=0, atol=1e-3)
            if task in ("segmentation", "panoptic"):
                whole = np.stack(list(stream.masks(row)))
                shares = y["masks"].float().mean((1, 2)).numpy()
                np.testing.assert_allclose(shares, whole.mean((1, 2)), atol=0.01)


def test_interrupt_is_one_line_and_resumable(scenes, head, tmp_path, run, monkeypatch):
    add = training.Log.add

    def interrupted(self, step, *rest):
        add(self, step, *rest)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Log, "add", interrupted)
    options = stage2(scenes, tmp_path, head, **{"save-every": 2})
    code, _, err = run("stage2_lora", *options)
    assert code == 130 and "Traceback" not in err and "--resume" in err
    monkeypatch.setattr(training.Log, "add", add)
    assert run("stage2_lora", *options, "--resume")[0] == 0


def refusals(scenes, head, tmp: Path) -> list[tuple]:
    one, two = stage1(scenes, tmp / "new"), stage2(scenes, tmp / "new", head)
    absent, square = str(tmp / "absent"), [*one, "--size", 56, "--image-scale", 1]
    return [
        ("stage1_heads", [*one, "--coco", absent], "annotations_trainval2017.zip"),
        ("stage1_heads", [*one, "--weights", absent], "pretrained"),
        ("stage1_heads", [*one, "--model", "resnet18"], "plain ViT"),
        ("stage1_heads", [*one, "--batch", 0], "--batch must be at least 1"),
        ("stage1_heads", [*one, "--iters", 0], "--iters must be at least 1"),
        ("stage1_heads", [*one, "--lr", "nan"], "--lr must be positive"),
        ("stage1_heads", [*one, "--data-fraction", 1.5], "--data-fraction"),
        ("stage1_heads", [*one, "--image-scale", 0], "--image-scale"),
        ("stage1_heads", [*one, "--exclude-images", absent], "--exclude-images"),
        ("stage1_heads", [*one, "--size", 56], "--image-scale has no effect with --size"),
        ("stage1_heads", [*one, "--size", 1, "--image-scale", 1], "--size must be at least 2"),
        ("stage1_heads", [*one, "--cache", absent], "--cache needs --size"),
        (
            "stage1_heads",
            [*square, "--cache", absent, "--skip-bad-images"],
            "--skip-bad-images has no effect",
        ),
        ("stage1_heads", [*one, "--points", 9], "--points has no effect on the head of detection"),
        (
            "stage1_heads",
            [*one, "--task", "pose", "--queries", 9],
            "--queries has no effect on the head of pose",
        ),
        ("stage1_heads", [*one, "--queries", 0], "--queries must be at least 1"),
        ("stage1_heads", [*one, "--layers", 0, 3], "--layers must be at least 1"),
        ("stage1_heads", [*one, "--dropout", 1], "--dropout must be in [0, 1)"),
        ("stage2_lora", [*two, "--head-words"], "--head-words has no effect without captioning"),
        ("stage2_lora", [*two, "--size", 56, "--image-scale", 1], "trained with size None, not 56"),
        ("stage1_heads", [*one, "--task", "captioning", "--captions", absent], "--captions"),
        ("stage1_heads", [*one, "--min-count", 0], "--min-count must be at least 1"),
        ("stage1_heads", [*one, "--out", head], "holds a run"),
        ("stage2_lora", [*two, "--heads", absent], "stage1_heads.py --task detection"),
        ("stage2_lora", [*two, "--probs", 0.5], "sum to 1"),
        ("stage2_lora", [*two, "--probs", 0.5, 0.5], "2 values for 1 --tasks"),
        ("stage2_lora", [*two, "--tasks", "detection", "detection"], "twice"),
        ("stage2_lora", [*two, "--batch", "pose=1"], "--batch pose=1"),
        ("stage2_lora", [*two, "--rank", 0], "--rank"),
        ("stage2_lora", [*two, "--checkpoint-blocks", "some"], "expected auto or a number"),
        ("stage2_lora", [*two, "--no-cls"], "trained with no_cls False, not True"),
        ("stage2_lora", [*two, "--model", "eva_g"], "trained with backbone eva_mini, not eva_g"),
        ("stage2_lora", [*two, "--heads", ROOT / "README.md"], "not one of our head files"),
    ]


def test_bad_options_are_one_line_before_anything_is_loaded_or_written(
    scenes, head, tmp_path, run, monkeypatch
):
    def never(*args, **options):
        raise AssertionError("touched")

    for script, options, says in refusals(scenes, head, tmp_path):
        with monkeypatch.context() as patch:
            if "resnet18" not in options:
                patch.setattr(vit, "load", never)
                patch.setattr(tasks, "open_stream", never)
            code, _, err = run(script, *options)
        assert code == 2 and says in err and err.count("\n") == 1, (options, err)
        assert not (tmp_path / "new").exists()


def test_bad_heads_are_refused_and_nothing_is_written(scenes, real_coco, head, tmp_path, run):
    wide = tmp_path / "wide.safetensors"
    categories = files.read_header(head / "detection.safetensors", "head")["config"]["categories"]
    tasks.save_head(tasks.find("detection").Head(96, categories), wide, "detection")
    for options, says in (
        (stage2(scenes, tmp_path / "new", wide), "width 96, not 192"),
        (stage2(real_coco, tmp_path / "new", head), "knows 14 categories"),
    ):
        code, _, err = run("stage2_lora", *options)
        assert code == 2 and says in err
        assert not (tmp_path / "new").exists()


def test_defaults_are_the_papers(monkeypatch, capsys):
    """Sec. 4.2, for EVA-ViT-G."""
    seen = []
    monkeypatch.setattr(training, "check_options", lambda args: seen.append(args) or 1 / 0)
    for script, options in (
        (stage1_heads, ["--task", "detection"]),
        (stage2_lora, []),
        (stage1_heads, ["--task", "captioning"]),
    ):
        monkeypatch.setattr(sys, "argv", ["script", *options])
        with pytest.raises(ZeroDivisionError):
            script.main()
    one, two, captions = seen
    assert (one.model, one.iters, one.batch, one.lr, one.warmup) == ("eva_g", 150_000, 1, 5e-5, 2000)
    assert (two.model, two.iters, two.lr, two.warmup, two.rank) == ("eva_g", 50_000, 1e-5, 2000, 64)
    assert two.tasks == ["detection", "segmentation", "captioning"] and two.probs == [0.3, 0.3, 0.4]
    assert two.batch == {"detection": 1, "segmentation": 1, "captioning": 8}
    assert (captions.iters, captions.batch, captions.lr) == (100_000, 32, 4e-4)
    assert (two.save_every, two.lora_alpha, two.head_lr_ratio) == (5000, 1.0, 0.0)


def test_lora_blocks_train_alone_and_the_others_stay(scenes, head, tmp_path, run):
    """The control. The file has all blocks, as any other; resumed it ends with the same bits."""

    def part(out, first=2, last=3, **changed) -> list:
        return [*stage2(scenes, tmp_path / out, head, iters=4, **changed), "--lora-blocks", first, last]

    assert run("stage2_lora", *part("a"))[0] == 0
    dW = load_file(tmp_path / "a" / "lora.safetensors")
    tuned = {int(name.split(".")[1]) for name, B in dW.items() if name.endswith("lora_B") and B.any()}
    assert tuned == {2, 3} and len(dW) == 12

    assert run("stage2_lora", *part("b", **{"save-every": 2}))[0] == 0
    (tmp_path / "b" / "previous.pt").replace(tmp_path / "b" / "last.pt")  # as after two steps
    assert run("stage2_lora", *part("b", **{"save-every": 2}), "--resume")[0] == 0
    resumed = load_file(tmp_path / "b" / "lora.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in dW.items())

    for first, last in ((3, 2), (0, 6), (-1, 2)):
        code, _, err = run("stage2_lora", *part("c", first, last))
        assert code == 2 and f"--lora-blocks {first} {last}: M has the blocks 0 to 5" in err


def test_full_tunes_all_of_m_and_no_lora(scenes, head, tmp_path, run):
    """The control. M's file is M's own, tuned, and resumed it ends with the same bits."""

    def full(out, **changed) -> list:
        options = stage2(scenes, tmp_path / out, head, iters=4, lr=1e-4, **changed)
        at = options.index("--rank")  # refused beside --full
        return [*options[:at], *options[at + 2 :], "--full"]

    assert run("stage2_lora", *full("a"))[0] == 0
    assert not list((tmp_path / "a").glob("lora*"))
    tuned = load_file(tmp_path / "a" / "M.safetensors")
    frozen = vit.load("eva_mini", "random", seed=0).vit.state_dict()
    assert tuned.keys() == frozen.keys()
    same = [name for name in tuned if torch.equal(tuned[name], frozen[name])]
    assert not same
    again = vit.load("eva_mini", str(tmp_path / "a" / "M.safetensors"))
    assert all(torch.equal(again.vit.state_dict()[name], value) for name, value in tuned.items())

    stopped = {"save-every": 2}
    assert run("stage2_lora", *full("b", **stopped))[0] == 0
    (tmp_path / "b" / "previous.pt").replace(tmp_path / "b" / "last.pt")  # as after two steps
    (tmp_path / "b" / "M.safetensors").unlink()
    assert run("stage2_lora", *full("b", **stopped), "--resume")[0] == 0
    resumed = load_file(tmp_path / "b" / "M.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in tuned.items())
