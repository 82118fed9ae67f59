"""Both stages on real images: they learn, and three tasks take turns, in one process and in two."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import backbone as vit
import files
import lora
import stage2_lora
import tasks
from data.detection import Detection
from data.stream import batches
from ranks import Ranks
from tests.stages import stage1, stage2


@torch.no_grad()
def mean_loss(coco_folder: Path, backbone, head) -> float:
    """Over twenty fixed samples of the ten images that the stages below train on."""
    stream = Detection(coco_folder, "train2017", seed=0, scale=0.2, fraction=0.2)
    ranks = Ranks(0, 1, torch.device("cpu"), torch.float32)
    samples = itertools.islice(batches(stream, 1, backbone, ranks), 20)
    return sum(head.loss(backbone(images, valid), y)[0].item() for images, valid, y in samples) / 20


def test_both_stages_learn_on_real_images(real_coco, tmp_path, run, monkeypatch):
    """50 real images. The loss falls in both; stage 1 leaves M, stage 2 leaves M and T bit-equal."""
    made, keep = {}, vit.load
    monkeypatch.setattr(vit, "load", lambda *a, **k: made.setdefault(len(made), keep(*a, **k)))
    options = dict(iters=50, warmup=5, lr=5e-4, batch=2, **{"log-every": 10, "data-fraction": 0.2})
    code, out, _ = run("stage1_heads", *stage1(real_coco, tmp_path / "one", **options))
    assert code == 0 and "465 boxes, 5 crowd" in out and "commit" in out
    head_file = tmp_path / "one" / "detection.safetensors"
    header = files.read_header(head_file, "head")
    assert header["config"]["dim"] == 192 and header["config"]["categories"][79]["name"] == "toothbrush"
    assert (header["backbone"], header["step"]) == ("eva_mini", 50)
    frozen_head = load_file(head_file)

    # a large rate: the ViT is random and the run short
    options.update(lr=1e-2, rank=16, **{"lora-alpha": 16})
    code, *_ = run("stage2_lora", *stage2(real_coco, tmp_path / "two", tmp_path / "one", **options))
    assert code == 0

    untouched = keep("eva_mini", "random", seed=0)
    torch.manual_seed(0)
    fresh_head = tasks.find("detection").Head(192, header["config"]["categories"]).eval()
    trained_head = tasks.load_head(head_file, 192)
    tuned = keep("eva_mini", "random", seed=0)
    assert lora.load(tuned.vit, tmp_path / "two" / "lora.safetensors")["backbone"] == "eva_mini"
    initial = mean_loss(real_coco, untouched, fresh_head)
    after_one = mean_loss(real_coco, untouched, trained_head)
    after_two = mean_loss(real_coco, tuned, trained_head)
    assert after_one < 0.8 * initial and after_two < 0.98 * after_one

    for used in (made[0], made[1]):
        state = used.state_dict()
        for name, value in untouched.state_dict().items():
            assert torch.equal(state[name], value)
    assert all(torch.equal(v, frozen_head[k]) for k, v in load_file(head_file).items())
    fresh = vit.Backbone("eva_mini")
    torch.manual_seed(0)
    before = lora.parameters(lora.attach(fresh.vit, rank=16))
    for name, value in load_file(tmp_path / "two" / "lora.safetensors").items():
        if name.endswith("lora_B"):
            assert value.abs().max() > 0
        elif name.startswith("blocks.0."):
            assert (value - before[name]).abs().max() > 0


def test_three_tasks_on_real_images_in_one_process_and_two(real_coco, tmp_path, run, run_ranks):
    """As the paper runs it; stopped in between, and split over two ranks. Panoptic on its two real images."""
    tiny = {"iters": 1, "image-scale": 0.1, "min-count": 3, "warmup": 0, "seed": 18}  # so M is one
    options = stage1(real_coco, tmp_path / "p", **tiny, split="val2017")
    code, *_ = run("stage1_heads", *options, "--task", "panoptic")
    header = files.read_header(tmp_path / "p" / "panoptic.safetensors", "head")
    assert code == 0 and header["task"] == "panoptic"
    names, made = ["detection", "segmentation", "captioning"], tmp_path / "h"
    for task in names:
        code, *_ = run("stage1_heads", *stage1(real_coco, made / task, **tiny), "--task", task)
        assert code == 0
    header = files.read_header(made / "captioning" / "captioning.safetensors", "head")
    assert {"a", "man"} < set(header["config"]["vocabulary"])

    # With this seed each task has its turn before and after the stop
    together = {**tiny, "tasks": names, "iters": 6, "log-every": 1, "save-every": 3}
    batch = ["detection=2", "segmentation=2", "captioning=4"]
    options = stage2(real_coco, tmp_path / "a", made, **together, batch=batch)
    assert run("stage2_lora", *options)[0] == 0
    last = tmp_path / "a" / "last.pt"
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "previous.pt", tmp_path / "b" / "last.pt")  # as if killed after step 3
    options = stage2(real_coco, tmp_path / "b", made, **together, batch=batch)
    assert run("stage2_lora", *options, "--resume")[0] == 0
    whole, parts = (torch.load(path)["trained"] for path in (last, tmp_path / "b" / "last.pt"))
    assert whole and all(torch.equal(value, parts[name]) for name, value in whole.items())

    halves = ["detection=1", "segmentation=1", "captioning=2"]
    options = stage2(real_coco, tmp_path / "two", made, **together, batch=halves)
    codes, outs = run_ranks(2, "stage2_lora", *options)
    assert codes == [0, 0], outs
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("a", "two")
    )
    order = stage2_lora.task_order(names, [0.3, 0.3, 0.4], 6, seed=18)
    assert set(order[:3]) == set(order[3:]) == set(names)
    for task, a, b in zip(order, one, two, strict=True):
        assert f"{task}/loss" in a and a.keys() == b.keys()  # one and the same task on all ranks
        close = 0.1 if task == "segmentation" else 2e-3  # its loss reads points drawn on each rank
        assert a[f"{task}/loss"] == pytest.approx(b[f"{task}/loss"], rel=close)

    other = stage2(real_coco, tmp_path / "c", made, **{**together, "min-count": 4})
    code, _, err = run("stage2_lora", *other)
    assert code == 2 and "--min-count" in err and not (tmp_path / "c").exists()
