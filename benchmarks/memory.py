"""What a step of stage 2 needs at full size, with no GPU and no weights: memory, arithmetic, communication.

    python benchmarks/memory.py                        # eva_g and eva_e, a minute on a CPU; markdown, then JSON
    python benchmarks/memory.py --models eva_g --blocks 0 --batch 4

The step of the scripts (backbone, LoRA, head, loss, backward) runs on torch's fake tensors, which have shapes
but no values, while every storage that is made or dropped is counted, and every matrix product. So its figures
are COMPUTED, from the code itself. Values stand in where the code looks at them: the matcher pairs as many as
it would, and every caption is as long as COCO's mean. tests/test_memory.py holds the peak against what the
allocator gives out in a real run of stage2_lora.py, at a small size. What it cannot see: the CUDA context (some
0.5 GB), workspaces inside kernels, and what the caching allocator loses to fragments.

The bytes that cross between ranks are MEASURED in a step of two gloo processes, and computed for more.
"""

import argparse
import contextlib
import json
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a lora.py too

import backbone as vit
import common
import heads
import lora
from heads.matching import Matches

SIZES = {  # batch, side in pixels at most: what data/ makes with the paper's options and patches of 14
    "detection": (1, 672),
    "segmentation": (1, 1022),
    "captioning": (8, 252),
}
PROBS = {"detection": 0.3, "segmentation": 0.3, "captioning": 0.4}  # Sec. 4.2
WORDS = 13  # of a caption and its <end>; COCO's mean is 10.5 words and a full stop
GB = 1e9


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that the code under it has alive, their peak, and floating point operations."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, out)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@contextlib.contextmanager
def shapes_only():
    """Tensors without values, on a CPU that casts as a GPU's autocast does; what stands in for values."""

    def all_pairs(costs: list[Tensor]) -> Matches:
        shape = costs[0].shape[0], sum(min(cost.shape[1:]) for cost in costs)  # (L, M)
        return Matches(*(torch.empty(shape, dtype=torch.long) for _ in Matches._fields))

    def all_of_it(t: Tensor, as_tuple: bool) -> tuple[Tensor, ...]:
        return tuple(torch.empty(t.numel(), dtype=torch.long) for _ in t.shape)

    def in_float32(x: Tensor, *rest) -> Tensor:  # on a GPU, autocast has LayerNorm so
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *rest)

    layer_norm = F.layer_norm
    with (
        mock.patch("heads.detr.hungarian", all_pairs),
        mock.patch("heads.mask2former.hungarian", all_pairs),
        mock.patch.object(Tensor, "nonzero", all_of_it),
        mock.patch("torch.nn.functional.layer_norm", in_float32),
        FakeTensorMode(),
    ):
        yield


def build(model: str, rank: int) -> tuple[vit.Backbone, dict[str, nn.Module]]:
    """The ViT as stage 2 has it and a frozen head for each task, on the meta device."""
    categories = [{"id": i, "name": str(i)} for i in range(80)]
    vocabulary = ["<pad>", *map(str, range(9486)), "<unk>", "<start>", "<end>"]  # as many as the release
    with torch.device("meta"):
        backbone = vit.Backbone(model)
        lora.attach(backbone.vit, rank)
        classes = {task: vocabulary if task == "captioning" else categories for task in SIZES}
        task_heads = {task: heads.HEADS[task](backbone.dim, c) for task, c in classes.items()}
    return backbone, {task: head.requires_grad_(False).eval() for task, head in task_heads.items()}


def materialize(module: nn.Module, frozen: torch.dtype) -> list[Tensor]:
    """Under shapes_only: put the module on the CPU, its frozen floats in this type; all that it holds."""

    def cpu(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=frozen if t.is_floating_point() and not t.requires_grad else t.dtype)

    module._apply(cpu)
    return [*module.parameters(), *module.buffers()]


def batch_of(task: str, batch: int, side: int, targets: int) -> tuple[Tensor, list[dict]]:
    one = {"image_id": 0, "size": (side, side), "padded_size": (side, side)}
    if task == "captioning":
        one["tokens"] = torch.zeros(WORDS + 1, dtype=torch.long)
    else:
        one["labels"] = torch.zeros(targets, dtype=torch.long)
    if task == "detection":
        one["boxes_cxcywh"] = torch.zeros(targets, 4)
    if task == "segmentation":
        one["masks"] = torch.zeros(targets, side, side, dtype=torch.bool)
    return torch.zeros(batch, 3, side, side), [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in one.items()} for _ in range(batch)
    ]


def account(
    model: str,
    task: str,
    blocks: int | None = None,
    batch: int | None = None,
    side: int | None = None,
    rank: int = 64,
    targets: int = 20,
    dtype: torch.dtype = torch.bfloat16,
    world: int = 1,
    tasks: tuple[str, ...] = tuple(SIZES),
) -> dict[str, int]:
    """Bytes of one step of stage 2 by what they are for, their peak, and its floating point operations.

    blocks: recomputed in the backward pass (None: all); tasks: whose heads are loaded
    """
    batch, side = batch or SIZES[task][0], side or SIZES[task][1]
    backbone, task_heads = build(model, rank)
    backbone.recompute = len(backbone.vit.blocks) if blocks is None else blocks
    found, live = {}, LiveBytes()

    def since(name: str, before: int) -> int:
        found[name] = live.now - before
        return live.now

    with shapes_only():
        weights = materialize(backbone, dtype)
        trained = list(lora.parameters(backbone.vit).values())
        own = sum(4 * p.numel() for p in trained)
        with live:
            for t in weights:
                live.add(t)
            now = since("M", own)
            for name in tasks:
                for t in materialize(task_heads[name], torch.float32):
                    live.add(t)
            since("T", now)
            # LoRA; its gradients, always there as DDP's buckets; AdamW's two moments, this rank's share
            found["trained"] = own + own + 2 * own // world
            for p in trained:
                p.grad = torch.zeros_like(p)
            moments = torch.empty(2 * own // world // 4)
            now = live.now
            images, y = batch_of(task, batch, side, targets)
            now = since("batch", now)

            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                f = backbone(images)
            now = since("kept in M", now)
            loss, _ = task_heads[task].loss(f, y)
            now = since("kept in T", now)
            loss.backward()
    del moments
    return found | {"transient": live.peak - now, "peak": live.peak, "flops": live.flops}
