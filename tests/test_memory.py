"""How much a step of stage 2 keeps and sends: recomputed blocks, and the account of benchmarks/memory.py."""

import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import backbone as vit
import lora
import tasks

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # after the root, for lora
import memory

CATEGORIES = [{"id": i, "name": str(i)} for i in range(80)]
SIZES = {"detection": 672, "segmentation": 1024}  # px at --image-scale 1


def tuned(**changed) -> vit.Backbone:
    """eva_mini with LoRA that has an effect."""
    backbone = vit.load("eva_mini", "random", **changed)
    torch.manual_seed(0)
    for name, p in lora.parameters(lora.attach(backbone.vit, rank=4)).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p)
    return backbone


def step(backbone: vit.Backbone, images: torch.Tensor) -> tuple[int, int, list[torch.Tensor]]:
    """Bytes alive after the forward pass, their peak, and the gradients."""
    trained = lora.parameters(backbone.vit).values()
    with memory.LiveBytes() as live:
        f = backbone(images)
        kept = live.now
        torch.autograd.backward(f.grid.square().mean())
    gradients = [p.grad for p in trained]
    for p in trained:
        p.grad = None
    return kept, live.peak, gradients


def test_recomputing_one_more_block_keeps_less_and_gives_the_same_gradients():
    backbone, images = tuned(), torch.randn(1, 3, 112, 98)
    steps = []
    for blocks in range(7):
        backbone.recompute = blocks
        steps.append(step(backbone, images))
    kept = [k for k, *_ in steps]
    saved = [a - b for a, b in zip(kept, kept[1:], strict=False)]
    assert min(saved) > 0 and max(saved) < 1.2 * min(saved)  # the first block's input needs no gradient
    for *_, gradients in steps[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, steps[0][2], strict=True))


def test_auto_recomputes_as_few_blocks_as_the_memory_asks(monkeypatch):
    """On tokens of which a block keeps most: then what is counted on 1,024 of them foretells the step."""
    monkeypatch.setattr(vit, "HEAD_PER_TOKEN", 0)
    backbone, images = tuned(), torch.randn(2, 3, 448, 448)
    B, N = 2, 1025
    backbone.recompute = 6
    least = step(backbone, images)[1]
    backbone.recompute = None
    chosen = []
    for memory_of_step in (0, least // 2, 1.5 * least, 2 * least, 3 * least, 10 * least):
        backbone.memory = memory_of_step
        chosen.append(backbone.fewest_blocks(B, N))
        if chosen[-1] < 6:
            assert step(backbone, images)[1] <= memory_of_step
    assert chosen[:2] == [6, 6] and chosen[-1] == 0
    assert chosen == sorted(chosen, reverse=True) and len(set(chosen)) > 3
    assert backbone.fewest_blocks(B, N // 4) == 0  # smaller images have room


def allocator_peak(prof: profile) -> int:
    """The most bytes that torch's CPU allocator had given out at a time since profiling began."""
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("task, scale, blocks", [("detection", 0.5, 6), ("segmentation", 0.25, 0)])
def test_the_account_is_the_allocators_peak_of_a_real_run(
    real_coco, tmp_path, run, monkeypatch, task, scale, blocks
):
    """Within 10%: stage2_lora.py itself, all that it loads and computes, against shapes alone."""
    head = tasks.find(task).Head(192, CATEGORIES)
    monkeypatch.setattr(
        tasks, "check_classes", lambda *_: None
    )  # those of the data, whatever they are called
    tasks.save_head(head, tmp_path / f"{task}.safetensors", task)
    options = ["--model", "eva_mini", "--weights", "random", "--coco", real_coco, "--image-scale", scale]
    options += ["--heads", tmp_path, "--tasks", task, "--workers", 0, "--iters", 2, "--out", tmp_path / "out"]
    seen, loss = [], type(head).loss

    def noted(self, f, y):
        seen.append((y[0]["padded_size"], len(y[0]["labels"])))
        return loss(self, f, y)

    monkeypatch.setattr(type(head), "loss", noted)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as real:
        code, *_ = run("stage2_lora", *options, "--checkpoint-blocks", blocks)
    assert code == 0 and len(seen) == 2
    monkeypatch.undo()
    same = dict(blocks=blocks, dtype=torch.float32, loaded=(task,))
    peaks = [memory.account("eva_mini", task, size=s, targets=n, **same)["peak"] for s, n in seen]
    assert max(peaks) == pytest.approx(allocator_peak(real), rel=0.1)


def test_the_memory_of_a_step_does_not_know_how_many_heads_were_trained_before():
    """A head that has no turn costs its weights; more ranks, less of AdamW's state; nothing else changes."""
    same = dict(model="eva_mini", task="detection", size=(112, 112), dtype=torch.float32)
    one = memory.account(**same, loaded=("detection",))
    three = memory.account(**same, world=4)
    assert three["T"] > 2 * one["T"]
    assert three["peak"] - three["T"] - three["trained"] == one["peak"] - one["T"] - one["trained"]
    assert 5 * one["trained"] == 8 * three["trained"]  # 4 (weights) + 4 (gradients) + 8 / ranks bytes
    assert all(three[k] == one[k] for k in ("M", "batch", "kept in M", "kept in T", "transient", "flops"))


def test_ranks_exchange_the_gradients_and_weights_of_lora_and_a_few_numbers():
    """A real step of two processes with eva_mini: nothing of M or T."""
    calls = memory.communication()
    assert calls["parameters"] == 6 * 64 * (2 * 192 + 2 * 192)
    assert calls["parameters"] <= sum(calls["all_reduce"]) <= calls["parameters"] + 8
    assert sum(calls["broadcast"]) == calls["parameters"]
