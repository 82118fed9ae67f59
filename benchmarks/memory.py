"""What a step of stage 2 needs at full size, with no GPU and no weights: memory, arithmetic, communication.

    python benchmarks/memory.py          # eva_g and eva_e, a minute or two on a CPU; markdown, then JSON
    python benchmarks/memory.py --models eva_g --blocks 0 --batch 4

The step of the scripts (backbone, LoRA, head, loss, backward) runs on torch's fake tensors, which have shapes
but no values, while every storage that is made or dropped is counted, and every matrix product. So its
figures are COMPUTED, from the code itself. Values stand in where the code looks at them: the matcher pairs as
many as it would, and every caption has COCO's mean length. tests/test_memory.py holds the peak against what
the allocator gives out in a real run of stage2_lora.py, at a small size. What it cannot see: the CUDA context
(some 0.5 GB), workspaces inside kernels, and what the caching allocator loses to fragments.

The bytes that cross between ranks are MEASURED in a step of two gloo processes, and computed for more.
"""

import argparse
import contextlib
import json
import sys
import tempfile
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
import lora
import tasks
import training
from heads.matching import Matches
from ranks import DTYPES

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
        heads = {task: tasks.find(task).Head(backbone.dim, c) for task, c in classes.items()}
    return backbone, {task: head.requires_grad_(False).eval() for task, head in heads.items()}


def materialize(module: nn.Module, frozen: torch.dtype) -> list[Tensor]:
    """Under shapes_only: put the module on the CPU, its frozen floats in this type; all that it holds."""

    def cpu(t: Tensor) -> Tensor:
        return torch.empty(
            t.shape, dtype=frozen if t.is_floating_point() and not t.requires_grad else t.dtype
        )

    module._apply(cpu)
    return [*module.parameters(), *module.buffers()]


def batch_of(task: str, batch: int, size: tuple[int, int], targets: int) -> tuple[Tensor, list[dict]]:
    """What the data give, with zeros for values. size: (h, w) in pixels; targets: of each image."""
    one = {"image_id": 0, "size": size, "padded_size": size}
    if task == "captioning":
        one["tokens"] = torch.zeros(WORDS + 1, dtype=torch.long)
    else:
        one["labels"] = torch.zeros(targets, dtype=torch.long)
    if task == "detection":
        one["boxes_cxcywh"] = torch.zeros(targets, 4)
    if task == "segmentation":
        one["masks"] = torch.zeros(targets, *size, dtype=torch.bool)
    y = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in one.items()} for _ in range(batch)]
    return torch.zeros(batch, 3, *size), y


def account(
    model: str,
    task: str,
    blocks: int | None = None,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    rank: int = 64,
    targets: int = 20,
    dtype: torch.dtype = torch.bfloat16,
    world: int = 1,
    loaded: tuple[str, ...] = tuple(SIZES),
) -> dict[str, int]:
    """Bytes of one step of stage 2 by what they are for, their peak, and its floating point operations.

    blocks: recomputed in the backward pass (None: all); loaded: the tasks whose heads are
    """
    batch, size = batch or SIZES[task][0], size or (SIZES[task][1],) * 2
    backbone, heads = build(model, rank)
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
            for name in loaded:
                for t in materialize(heads[name], torch.float32):
                    live.add(t)
            since("T", now)
            # LoRA; its gradients, always there as DDP's buckets; AdamW's two moments, this rank's share
            found["trained"] = own + own + 2 * own // world
            for p in trained:
                p.grad = torch.zeros_like(p)
            moments = torch.empty(2 * own // world // 4)
            now = live.now
            images, y = batch_of(task, batch, size, targets)
            now = since("batch", now)

            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                f = backbone(images)
            now = since("kept in M", now)
            loss, _ = heads[task].loss(f, y)
            now = since("kept in T", now)
            loss.backward()
    del moments
    return found | {"transient": live.peak - now, "peak": live.peak, "flops": live.flops}


# --- communication


def sent_in_a_step(rank: int, world: int, folder: str) -> None:
    """One rank of a step of stage 2 with eva_mini and detection; rank 0 writes what torch's profiler saw."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_num_threads(1)
    backbone = vit.load("eva_mini", "random")
    trained = list(lora.parameters(lora.attach(backbone.vit, rank=64)).values())
    M = training.parallel(backbone, torch.device("cpu"))
    head = tasks.find("detection").Head(backbone.dim, [{"id": 1}])
    head.requires_grad_(False).eval()
    optimizer = training.sharded_adamw([{"params": trained}])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    images, y = batch_of("detection", 1, (112, 112), targets=2)
    for _ in range(3):  # DDP sorts its buckets in the second
        with torch.profiler.profile(record_shapes=True) as seen:
            training.minimize(head.loss(M(images), y)[0], optimizer, scaler)
    if rank == 0:
        calls = {"parameters": sum(p.numel() for p in trained)}
        for event in seen.events():
            if event.name.startswith("gloo:"):
                values = sum(torch.Size(shape).numel() for shape in event.input_shapes)
                calls.setdefault(event.name.removeprefix("gloo:"), []).append(values)
        Path(folder, "sent.json").write_text(json.dumps(calls))
    dist.barrier()
    del M
    dist.destroy_process_group()


def communication(world: int = 2) -> dict:
    """The numbers of fp32 values of each all-reduce and broadcast of a step, and of the parameters."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(sent_in_a_step, (world, folder), nprocs=world)
        return json.loads(Path(folder, "sent.json").read_text())


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["eva_g", "eva_e"], help="as --model of the stages")
    p.add_argument("--blocks", nargs="+", type=int, default=[-1, 0], help="recomputed blocks (-1: all)")
    p.add_argument("--batch", type=int, help="images of each task (default: 1 / 1 / 8)")
    p.add_argument("--rank", type=int, default=64, help="r of LoRA (Sec. 3.2: 64)")
    p.add_argument("--targets", type=int, default=20, help="objects of each image (COCO: 7 on average)")
    p.add_argument("--ranks", type=int, default=8, help="over which AdamW's state is spread (Sec. 4.2: 8)")
    p.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the frozen ViT")
    p.add_argument("--tflops", nargs="+", type=float, default=[50, 400], help="speeds to assume, TFLOP/s")
    p.add_argument(
        "--link", type=float, default=25.0, help="GB/s that each GPU sends (25: a 200 Gbit/s port)"
    )
    args = p.parse_args()

    # --- loop: memory and arithmetic
    print(f"COMPUTED, torch {torch.__version__}; {vars(args)}\n")
    columns = ("M", "T", "trained", "batch", "kept in M", "kept in T", "transient", "peak")
    print("| model | task | recomputed |", *(f"{c}, GB |" for c in columns), "TFLOP |")
    print("|---" * (len(columns) + 4) + "|")
    results, options = {}, dict(rank=args.rank, targets=args.targets, world=args.ranks)
    for model in args.models:
        for blocks in args.blocks:
            for task in SIZES:
                found = account(
                    model,
                    task,
                    None if blocks < 0 else blocks,
                    args.batch,
                    dtype=DTYPES[args.dtype],
                    **options,
                )
                results[f"{model} {task} {blocks}"] = found
                cells = [f"{found[c] / GB:.2f} |" for c in columns]
                name = "all" if blocks < 0 else blocks
                print(f"| {model} | {task} | {name} |", *cells, f"{found['flops'] / 1e12:.1f} |", flush=True)

    print(
        "\n| model | recomputed | TFLOP of the mean step |",
        *(f"5,000 steps at {t:g} TFLOP/s |" for t in args.tflops),
    )
    print("|---" * (3 + len(args.tflops)) + "|")
    for model in args.models:
        for blocks in args.blocks:
            mean = sum(PROBS[task] * results[f"{model} {task} {blocks}"]["flops"] for task in SIZES) / 1e12
            cells = [f"{5000 * mean / t / 60:.0f} min |" for t in args.tflops]
            print(f"| {model} | {'all' if blocks < 0 else blocks} | {mean:.1f} |", *cells)

    # --- loop: communication
    calls = communication()
    reduced, sent = sum(calls["all_reduce"]), sum(calls["broadcast"])
    print(f"\nMEASURED at 2 ranks, fp32 values that a step exchanges: {calls}\n")
    print("| model | ranks | all-reduced, MB | broadcast, MB | a GPU sends, MB | ms |")
    print("|---|---|---|---|---|---|")
    for model in args.models:
        size = results[f"{model} detection {args.blocks[0]}"]["trained"] / (2 + 2 / args.ranks) / 1e6
        for n in (2, 8, 64, 512):
            # A ring: every rank passes on (n - 1) / n of the sum twice, and each shard's owner's once
            each = size * (n - 1) / n * (2 + 1)
            print(f"| {model} | {n} | {size:.1f} | {size:.1f} | {each:.1f} | {each / args.link:.1f} |")
    results["communication"] = {**calls, "all-reduced / parameters": reduced / calls["parameters"]}
    results["communication"]["broadcast / parameters"] = sent / calls["parameters"]
    print("\n" + json.dumps({**vars(args), **results}))


if __name__ == "__main__":
    main()
