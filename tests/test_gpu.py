"""What only a GPU shows; skipped without CUDA. By hand, on one GPU or more: `pytest tests/test_gpu.py -s`.

The last test prints the table that benchmarks/README.md has a place for.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lora
import tasks
from backbone import load
from training import minimize, sharded_adamw

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
ROOT = Path(__file__).resolve().parents[1]
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"detection": (1, 672, 672), "segmentation": (1, 1022, 1022), "captioning": (8, 252, 252)}  # Sec. 4.2
SMALL = ["--model", "eva_mini", "--weights", "random", "--image-scale", "0.33", "--warmup", "0"]


def script(name: str, *options, ranks: int = 1, code: int = 0) -> str:
    """Runs NAME.py under torchrun; what it printed. Its exit code must be 0, or not, as `code` is."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*torchrun, f"{name}.py", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert bool(done.returncode) == bool(code), done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def heads(scenes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("heads")
    for task in SIZES:
        options = [*SMALL, "--task", task, "--coco", scenes, "--min-count", 1, "--batch", 2, "--iters", 20]
        script("stage1_heads", *options, "--lr", 1e-3, "--out", out / task)
    return out


def stage2(scenes, heads, out, *more) -> list:
    options = [*SMALL, "--heads", heads, "--coco", scenes, "--min-count", 1, "--batch", 2, "--lr", 1e-3]
    return [*options, "--rank", 8, "--lora-alpha", 8, "--iters", 24, "--save-every", 8, "--out", out, *more]


def losses(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.endswith("/loss")} for line in lines]


def gain(out: torch.Tensor, base: torch.Tensor, true: torch.Tensor) -> float:
    """The projection of the change out - base on the true change."""
    change, true = (out.double() - base.double()).flatten(), true.double().flatten()
    return float(change @ true / (true @ true))


# --- precision


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("std", [0.003, 0.01, 0.04])
def test_dW_is_not_lost_in_the_rounding_of_what_it_is_added_to(dtype, std):
    """At the layer, at EVA-ViT-G's width: 0.98 of the update arrives."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(1408, 3 * 1408, device="cuda")
    torch.nn.init.normal_(linear.weight, std=0.03)
    x = torch.randn(4, 257, 1408, device="cuda")
    attention = torch.nn.Module()
    attention.qkv = linear.to(TYPES[dtype]).requires_grad_(False)
    layer = lora.LoRALinear(attention.qkv, rank=64, alpha=1.0, blocks=3, updated=(0, 2))
    with torch.no_grad():
        layer.lora_B.normal_(std=std)
    x = x.to(TYPES[dtype])
    with torch.no_grad(), torch.autocast("cuda", TYPES[dtype]):
        after = layer(x)
        layer.on = False
        before = layer(x)
    true = x.double() @ layer.delta().double().T
    assert gain(after, before, true) >= 0.98


@pytest.mark.parametrize("dtype", TYPES)
def test_dW_arrives_at_the_end_of_the_network(dtype):
    """EVA-ViT-G, 40 blocks of random weights: the features' change in 16 bit lies along the one in fp32.

    In bf16 the roundings' noise is several times the change; over 64 images it averages out.
    """
    changes = {}
    images = torch.randn(64, 3, 224, 224, generator=torch.Generator().manual_seed(1)).cuda()
    for kind in (torch.float32, TYPES[dtype]):
        backbone = load("eva_g", "random", TYPES[dtype], "cuda").to(kind)  # the same weights in both
        torch.manual_seed(2)  # and the same A and B
        lora.attach(backbone.vit, rank=64)
        for name, p in lora.parameters(backbone.vit).items():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(p, std=0.04)
        with torch.no_grad(), torch.autocast("cuda", kind, enabled=kind != torch.float32):
            after = backbone(images).grid
            lora.switch(backbone.vit, on=False)
            changes[kind] = (after - backbone(images).grid).flatten().double()
    true, seen = changes[torch.float32], changes[TYPES[dtype]]
    projection, cosine = float(seen @ true / (true @ true)), float(torch.cosine_similarity(seen, true, 0))
    print(f"\n{dtype}: gain at the end {projection:.3f}, cosine {cosine:.3f}")
    assert 0.9 < projection < 1.1


@pytest.mark.parametrize("dtype", TYPES)
def test_both_stages_train_in_16_bit(scenes, heads, tmp_path, dtype):
    options = [*SMALL, "--task", "detection", "--coco", scenes, "--batch", 2, "--iters", 20, "--lr", 1e-3]
    script("stage1_heads", *options, "--backbone-dtype", dtype, "--log-every", 10, "--out", tmp_path / "one")
    first, last = (line["detection/loss"] for line in losses(tmp_path / "one"))
    assert last < first
    script("stage2_lora", *stage2(scenes, heads, tmp_path / "two"), "--backbone-dtype", dtype)
    B = [v for k, v in torch.load(tmp_path / "two" / "last.pt")["trained"].items() if k.endswith("lora_B")]
    assert len(B) == 6 and all(b.abs().max() > 0 for b in B)


@pytest.mark.parametrize("dtype", TYPES)
def test_full_fine_tuning_moves_most_weights(scenes, heads, tmp_path, dtype):
    more = ["--tasks", "captioning", "--full", "--backbone-dtype", dtype]
    options = stage2(scenes, heads, tmp_path, *more)
    at = options.index("--rank")
    del options[at : at + 4]  # --rank and --lora-alpha are refused beside --full
    script("stage2_lora", *options)
    start = load("eva_mini", "random", device="cuda").vit.state_dict()
    moved = [(v.cpu() != start[k].cpu()).float().mean() for k, v in
             torch.load(tmp_path / "last.pt")["trained"].items() if k.endswith("weight")]  # fmt: skip
    assert torch.stack(moved).mean() > 0.9


# --- runs


def test_a_resumed_run_continues(scenes, heads, tmp_path):
    """Not to the bit: atomics on a GPU add in any order."""
    script("stage2_lora", *stage2(scenes, heads, tmp_path / "whole"))
    script("stage2_lora", *stage2(scenes, heads, tmp_path / "parts", "--log-every", 8))
    for name in ("last.pt", "previous.pt"):
        state = torch.load(tmp_path / "parts" / name)
        assert state["step"] in (16, 24)
    (tmp_path / "parts" / "previous.pt").replace(tmp_path / "parts" / "last.pt")
    script("stage2_lora", *stage2(scenes, heads, tmp_path / "parts", "--resume"))
    a, b = (torch.load(tmp_path / name / "last.pt")["trained"] for name in ("whole", "parts"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0.05, atol=1e-3)


def test_compiled_blocks_train(scenes, heads, tmp_path):
    script("stage2_lora", *stage2(scenes, heads, tmp_path, "--compile", "--tasks", "detection"))


def test_evaluation_compares(scenes, heads, tmp_path):
    script("stage2_lora", *stage2(scenes, heads, tmp_path / "visft"))
    options = ["--model", "eva_mini", "--weights", "random", "--image-scale", 0.33, "--coco", scenes]
    options += ["--task", "detection", "--head", heads, "--compare", tmp_path / "visft" / "lora.safetensors"]
    script("eval_heads", *options, "--out", tmp_path / "eval", ranks=min(2, GPUS))
    rows = json.loads((tmp_path / "eval" / "result.json").read_text())["rows"]
    assert all(row["before"] is not None for row in rows if row["metric"] == "box AP")


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_a_save_opens_no_context_on_another_ranks_gpu(scenes, heads, tmp_path):
    """nvidia-smi lists a process once for each GPU that it has a context on."""
    more = ["--iters", 4000, "--save-every", 20]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(GPUS)]
    command = [*torchrun, "stage2_lora.py", *map(str, stage2(scenes, heads, tmp_path, *more))]
    running = subprocess.Popen(command, cwd=ROOT)
    try:
        end = time.monotonic() + 300
        while not (tmp_path / "previous.pt").exists() and time.monotonic() < end:
            time.sleep(1)
        query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
        pids = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    finally:
        running.terminate()
        running.wait()
    assert len(pids) == len(set(pids)) == GPUS


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_a_bad_image_of_one_rank_ends_all(scenes, heads, tmp_path):
    folder = tmp_path / "coco"
    subprocess.run(["cp", "-r", scenes, folder], check=True)
    picture = sorted((folder / "train2017").iterdir())[0]
    picture.write_bytes(picture.read_bytes()[:200])
    begin = time.monotonic()
    said = script("stage2_lora", *stage2(folder, heads, tmp_path / "out"), ranks=2, code=2)
    assert "cannot be decoded" in said and time.monotonic() - begin < 120


# --- full size


def test_time_and_memory_at_the_papers_sizes():
    """A step of each task and stage with eva_g of random weights, beside what memory.py computes."""
    backbone = load("eva_g", "random", torch.bfloat16, "cuda")
    lora.attach(backbone.vit, rank=64)
    rows = []
    for task, (B, h, w) in SIZES.items():
        classes = [{"id": i, "name": str(i)} for i in range(80)]
        if task == "captioning":
            classes = ["<pad>", *map(str, range(9486)), "<unk>", "<start>", "<end>"]
        head = tasks.find(task).Head(backbone.dim, classes).cuda()
        for stage in (1, 2):
            trained = list(head.train().requires_grad_().parameters())
            if stage == 2:
                head.eval().requires_grad_(False)
                trained = list(lora.parameters(backbone.vit).values())
            seconds, peak = steps(backbone, head, trained, task, (B, h, w), stage)
            rows.append(f"| {task} | {stage} | {B} x {h} x {w} | {1000 * seconds:.0f} | {peak / 1e9:.1f} |")
    columns = "| task | stage | images | ms a step | peak GB |\n| --- | --- | --- | --- | --- |"
    print(f"\n{torch.cuda.get_device_name()}, bf16, all blocks recomputed\n\n{columns}", *rows, sep="\n")


def steps(backbone, head, trained: list, task: str, shape: tuple, stage: int) -> tuple[float, int]:
    """Median seconds of a step after some to warm up, and the most memory."""
    from torch.distributed import HashStore, init_process_group, is_initialized

    if not is_initialized():
        init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    B, h, w = shape
    images = torch.randn(B, 3, h, w, device="cuda")
    y = [target(task, h, w) for _ in range(B)]
    optimizer = sharded_adamw([{"params": trained}])
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    backbone.recompute, times = len(backbone.vit.blocks), []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.set_grad_enabled(stage == 2), torch.autocast("cuda", torch.bfloat16):
            f = backbone(images)
        minimize(head.loss(f, y)[0], optimizer, scaler)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[3:])[2], torch.cuda.max_memory_allocated()


def target(task: str, h: int, w: int, objects: int = 7) -> dict:
    known = {"image_id": 0, "size": (h, w), "padded_size": (h, w), "orig_size": (h, w)}
    if task == "captioning":
        return {**known, "tokens": torch.tensor([9488, *range(1, 12), 9489], device="cuda")}
    labels = torch.arange(objects, device="cuda")
    if task == "segmentation":
        masks = torch.rand(objects, h, w, device="cuda") > 0.5
        return {**known, "labels": labels, "masks": masks}
    return {**known, "labels": labels, "boxes_cxcywh": torch.full((objects, 4), 0.5, device="cuda")}
