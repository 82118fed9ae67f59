"""Time and memory of LoRA on q and v, beside the frozen ViT (the floor), peft and the authors' dense update.

    python benchmarks/lora.py

All variants run forward and backward down to the input tokens, interleaved, in one process; the floor trains
nothing. (a) is a ViT of depth 12 and width 768 with 4 x 257 tokens, (b) one block of EVA-ViT-G with 1,370
tokens. Memory is what autograd keeps between forward and backward. The ratios are of medians over the rounds;
`quartiles` are of the ratio within each round, `best` is the ratio of the fastest runs, `others` is the share
of the CPU time that other processes took: with more than a few percent the ratios mean little. (c) is (b) in
bf16; `added` adds the update to an h that is rounded already, as peft and the release do. `separate` is ours
where q, k and v are Linear modules of their own, as in transformers, beside the same without LoRA.

`gain` is how much of an update arrives: the projection of its effect in 16 bit on its effect in fp32, of the
same weights, for B of three sizes; at a layer, and, with its standard error over images of 33 random tokens,
after EVA-ViT-G's 40 random blocks and norm. `change` is the whole change in 16 bit as a multiple of the true
one: 1 is no noise. It comes of roundings that the two runs do not share, and averages out.
"""

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a lora.py too

import lora
from backbone import Backbone

# The allocator keeps what is freed: else page faults of large tensors swamp what is measured here
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
CASES = {  # sizes of the ViT, batch, tokens
    "a": (dict(embed_dim=768, depth=12, num_heads=12), 4, 257),  # 224 x 224 and [CLS]
    "b": (dict(embed_dim=1408, depth=1, num_heads=16, mlp_ratio=6144 / 1408), 1, 1370),  # 518 x 518 and [CLS]
}
STDS = (0.003, 0.01, 0.04)  # of B; that of W is 0.03
TARGETS = {  # no more than
    "a: time, ours / floor": 1.10,
    "a: time, ours / peft": 1.03,
    "a: time, ours / release": 1 / 1.15,
    "a: time, separate / its floor, over ours / floor": 1.03,
    "a: memory, ours / floor": 1.12,
    "b: time, ours / floor": 1.05,
    "c: time, ours / floor": 1.05,
    "recomputing: memory a block / (B, N, D)": 1.0,
}


class Release(nn.Module):
    """The authors' update: B A as a dense (3 D, D) matrix, built on every call, for a second product with x.

    As loralib's MergedLinear builds it: a 1-d convolution of A by B in two groups, then zero rows for k.
    """

    def __init__(self, layer: lora.LoRALinear):
        super().__init__()
        self.weight, self.scale = layer.weight, layer.alpha / layer.rank
        self.lora_A, self.lora_B = (nn.Parameter(p.detach().clone()) for p in (layer.lora_A, layer.lora_B))
        rows = torch.tensor([True, False, True]).repeat_interleave(layer.in_features)  # (3 D,) q and v
        self.register_buffer("rows", rows)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight)  # (B, N, 3 D)
        delta = F.conv1d(self.lora_A[None], self.lora_B[..., None], groups=2)[0]  # (2 D, D)
        dense = delta.new_zeros(self.weight.shape)  # (3 D, D)
        dense[self.rows] = delta
        h += x @ dense.T * self.scale
        return h


def added(layer: lora.LoRALinear, x: Tensor) -> Tensor:
    """The update of a fused qkv added to an h that is rounded already."""
    if not layer.on:
        return F.linear(x, layer.weight)
    a = F.linear(x, layer.lora_A.to(x.dtype)) * (layer.alpha / layer.rank)
    halves = zip(a.chunk(2, -1), layer.lora_B.to(x.dtype).chunk(2), strict=True)
    q, v = (F.linear(u, b) for u, b in halves)
    return F.linear(x, layer.weight) + torch.cat([q, torch.zeros_like(q), v], -1)


def variants(vit: Eva, rank: int) -> dict[str, Eva]:
    """The frozen ViT, and copies of it with LoRA as we, peft and the authors add it; B is noise, not zero."""
    ours, with_peft, release = (copy.deepcopy(vit) for _ in range(3))
    lora.attach(ours, rank)
    for block in (*with_peft.blocks, *release.blocks):
        block.attn.qkv_bias_separate = True  # else timm reads qkv.weight and never calls what is in its place
    # peft cannot leave out k: rank r on all of qkv, which has as many parameters as rank r on q and on v
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=1, target_modules=["qkv"]), with_peft)
    for name, p in (*ours.named_parameters(), *with_peft.named_parameters()):
        if "lora_B" in name:
            nn.init.normal_(p)
    for block, block_of_ours in zip(release.blocks, ours.blocks, strict=True):
        block.attn.qkv = Release(block_of_ours.attn.qkv)
    models = {"floor": vit, "ours": ours, "peft": with_peft, "release": release}
    models |= {"separate floor": separated(vit), "separate": lora.attach(separated(vit), rank)}
    parameters = lora.parameters(models["separate"])
    for name, value in lora.as_in(parameters, lora.parameters(ours)).items():
        parameters[name].data.copy_(value)
    return models


def separated(vit: Eva) -> Eva:
    """A copy with q_proj, k_proj and v_proj in the place of qkv, whose biases are zeros."""
    vit = copy.deepcopy(vit)
    for block in vit.blocks:
        weights, block.attn.qkv = block.attn.qkv.weight.chunk(3), None
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True):
            linear = nn.Linear(*weight.T.shape, bias=False).requires_grad_(False)
            linear.weight.copy_(weight)
            setattr(block.attn, name, linear)
    return vit


def forward(vit: Eva, x: Tensor) -> Tensor:
    for block in vit.blocks:
        x = block(x)
    return x


def step(vit: Eva, x: Tensor, grad: Tensor) -> Tensor:
    x.grad = None
    vit.zero_grad()
    out = forward(vit, x)
    out.backward(grad)
    return out.detach()


def check(models: dict[str, Eva], x: Tensor, grad: Tensor) -> dict[str, float]:
    """LoRA has an effect, every A and B gets a gradient, ours and the release compute the same."""
    out = {name: step(model, x, grad) for name, model in models.items()}
    for name, model in models.items():
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        missing = [n for n, g in trained.items() if g is None or not g.any()]
        assert not missing, f"{name}: no gradient for {missing[:3]}"
        assert "floor" in name or difference(out[name], out["floor"]) > 1e-3, f"{name} has no effect"
    ours, release = (dict(models[name].named_parameters()) for name in ("ours", "release"))
    found = {
        "output": max(difference(out[name], out["ours"]) for name in ("release", "separate")),
        "gradients": max(difference(release[n].grad, p.grad) for n, p in ours.items() if p.requires_grad),
    }
    # 1e-4: float32 sums in other orders give about 1e-6, a wrong scale or row gives 1e-2 and more
    assert max(found.values()) < 1e-4, f"ours and the release differ: {found}"
    return found


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def kept_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Storage that autograd keeps for the backward pass of run(), each counted once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()  # its graph holds what is counted: no address is used twice
    del out
    return sum(size for address, size in kept.items() if address not in own)


def recomputing(depth: int, rank: int, recompute: bool) -> tuple[int, int]:
    """Bytes kept by eva_mini of another depth with LoRA, two images; bytes of one (B, N, D)."""
    backbone = Backbone("eva_mini")
    backbone.vit.blocks = nn.ModuleList(copy.deepcopy(backbone.vit.blocks[0]) for _ in range(depth))
    lora.attach(backbone.vit, rank)
    backbone.recompute = depth if recompute else 0
    images = torch.randn(2, 3, 224, 224)
    return kept_bytes(backbone, lambda: backbone(images).grid), 4 * 2 * 257 * backbone.dim


def half_variants(vit: Eva, rank: int) -> dict[str, Eva]:
    """The frozen ViT in bf16, with LoRA as we add it, and with `added`."""
    models = {"floor": vit, "ours": copy.deepcopy(vit), "added": copy.deepcopy(vit)}
    for name in ("ours", "added"):
        for layer in lora.layers(lora.attach(models[name], rank)).values():
            nn.init.normal_(layer.lora_B)
            layer.forward = partial(added, layer) if name == "added" else layer.forward
    return models


def projection(applied: Tensor, true: Tensor) -> tuple[float, float]:
    """The gain, and its standard error over the images, the first dimension."""
    products = (applied * true).flatten(1).sum(1), (true * true).flatten(1).sum(1)  # (B,), (B,)
    gain = products[0].sum() / products[1].sum()
    return gain.item(), ((products[0] - gain * products[1]).norm() / products[1].sum()).item()


@torch.no_grad()
def gains(blocks: int, images: int, rank: int) -> list[dict]:
    """Of bf16 and fp16, each size of B, ours and `added`: the gain at the first layer and at the end."""
    torch.manual_seed(0)
    vit = Eva(patch_size=14, num_classes=0, global_pool="token", **{**CASES["b"][0], "depth": blocks}).eval()
    for name, p in vit.requires_grad_(False).named_parameters():
        nn.init.normal_(p, std=0.03 if p.ndim > 1 else 0.1) if "norm" not in name else None
    found = list(lora.layers(lora.attach(vit, rank)).values())
    B = [torch.randn(layer.lora_B.shape) for layer in found]
    rows = []

    def features(x: Tensor, std: float) -> tuple[Tensor, Tensor]:
        for layer, b in zip(found, B, strict=True):
            layer.lora_B.copy_(std * b)
        lora.switch(vit, on=std > 0)
        return found[0](x).float(), vit.norm(forward(vit, x)).float()

    def frozen(dtype: torch.dtype) -> None:
        for p in (*vit.parameters(), *vit.buffers()):
            p.data = p.data if p.requires_grad else p.data.to(dtype)

    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        frozen(dtype)
        frozen(torch.float32)  # the reference has the same weights and tokens
        x, changes = torch.randn(images, 33, vit.embed_dim).to(dtype), {}
        plain = features(x.float(), 0)
        true = {std: [f - p for f, p in zip(features(x.float(), std), plain, strict=True)] for std in STDS}
        frozen(dtype)
        plain = features(x, 0)
        for how in ("ours", "added"):
            for layer in found:
                layer.forward = (
                    partial(added, layer) if how == "added" else partial(type(layer).forward, layer)
                )
            for std in STDS:
                change = [f - p for f, p in zip(features(x, std), plain, strict=True)]
                changes[how, std] = [projection(c, t) for c, t in zip(change, true[std], strict=True)]
                changes[how, std] += [(change[1].norm() / true[std][1].norm()).item()]
        for (how, std), (layer, end, size) in changes.items():
            rows.append(
                dict(type=name, B=std, how=how, layer=layer[0], end=end[0], error=end[1], change=size)
            )
    return rows


def interleaved(runs: dict[str, Callable], reps: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each run in each round, and the share of the CPU time that other processes took meanwhile.

    Rounds begin with a run each in turn; the first is not counted.
    """
    names, seconds = list(runs), {name: [] for name in runs}
    for r in range(reps + 1):
        if r == 1:
            start, (all_start, own_start) = time.perf_counter(), cpu_seconds()
        for i in range(len(names)):
            name = names[(r + i) % len(names)]
            begin = time.perf_counter()
            runs[name]()
            if r > 0:
                seconds[name].append(time.perf_counter() - begin)
    all_end, own_end = cpu_seconds()
    others = (all_end - all_start) - (own_end - own_start)
    return seconds, max(0.0, others / (time.perf_counter() - start) / os.cpu_count())


def cpu_seconds() -> tuple[float, float]:
    """CPU time so far of all that runs on this machine (Linux; stolen time included), and of this process."""
    stat = Path("/proc/stat")
    ticks = [int(n) for n in stat.read_text().split("\n")[0].split()[1:9]] if stat.exists() else [0] * 8
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), time.process_time()  # 3, 4: idle


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = f"{os.cpu_count()} x {models[0]}" if models else platform.processor()
    return f"{cpu}, load {os.getloadavg()[0]:.1f} at the start"


def print_rows(case: str, seconds: dict[str, list[float]], others: float, kept: dict[str, int]) -> None:
    """A row of the table for each variant; the first is the floor."""
    median = {name: statistics.median(s) for name, s in seconds.items()}
    for name, s in seconds.items():
        rounds = [t / floor for t, floor in zip(s, seconds["floor"], strict=True)]
        low, _, high = statistics.quantiles(rounds, n=4)
        print(
            f"| {case} | {name} | {1e3 * median[name]:.0f} | {median[name] / median['floor']:.3f} "
            f"| {low:.3f} to {high:.3f} | {min(s) / min(seconds['floor']):.3f} | {others:.0%} "
            f"| {kept[name] / 2**20:.1f} | {kept[name] / kept['floor']:.3f} |"
        )


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reps", type=int, default=9, help="rounds (at least 2) to take medians over")
    p.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    p.add_argument("--blocks", type=int, default=40, help="of the gain's network (EVA-ViT-G: 40)")
    p.add_argument("--images", type=int, default=64, help="of 33 tokens, for the gain")
    p.add_argument("--rank", type=int, default=64, help="r of LoRA (Sec. 3.2: 64)")
    args = p.parse_args()

    # --- setup
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    header = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": machine(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "threads": args.threads,
        "reps": args.reps,
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
    }
    print(*(f"{name}: {value}" for name, value in header.items()), sep=" | ", end="\n\n")

    # --- loop: (a) and (b)
    ratios, results = {}, {}
    print("| case | variant | ms, median | / floor | quartiles | best | others | MiB kept | / floor |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case, (sizes, B, N) in CASES.items():
        vit = Eva(patch_size=14, num_classes=0, global_pool="token", **sizes).requires_grad_(False)
        models = variants(vit, args.rank)
        x = torch.randn(B, N, vit.embed_dim, requires_grad=True)  # (B, N, D)
        grad = torch.randn(B, N, vit.embed_dim)
        agreement = check(models, x, grad)
        kept = {name: kept_bytes(model, partial(forward, model, x)) for name, model in models.items()}
        runs = {name: partial(step, model, x, grad) for name, model in models.items()}
        seconds, others = interleaved(runs, args.reps)
        print_rows(case, seconds, others, kept)
        median = {name: statistics.median(s) for name, s in seconds.items()}
        for name in ("floor", "peft", "release"):
            ratios[f"{case}: time, ours / {name}"] = median["ours"] / median[name]
            ratios[f"{case}: memory, ours / {name}"] = kept["ours"] / kept[name]
        separate = median["separate"] / median["separate floor"]
        fused = ratios[f"{case}: time, ours / floor"]
        ratios[f"{case}: time, separate / its floor, over ours / floor"] = separate / fused
        results[case] = {"ms": {n: [round(1e3 * t, 1) for t in s] for n, s in seconds.items()}, "bytes": kept}
        results[case] |= {"others": others, "release - ours, relative": agreement}

    # --- loop: (c) one block in bf16
    sizes, B, N = CASES["b"]
    vit = Eva(patch_size=14, num_classes=0, global_pool="token", **sizes).requires_grad_(False).bfloat16()
    models = half_variants(vit, args.rank)
    x = torch.randn(B, N, vit.embed_dim, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(B, N, vit.embed_dim, dtype=torch.bfloat16)
    seconds, others = interleaved({n: partial(step, m, x, grad) for n, m in models.items()}, args.reps)
    kept = {name: kept_bytes(model, partial(forward, model, x)) for name, model in models.items()}
    print_rows("c", seconds, others, kept)
    ratios["c: time, ours / floor"] = statistics.median(seconds["ours"]) / statistics.median(seconds["floor"])
    results["c"] = {"ms": {n: [round(1e3 * t, 1) for t in s] for n, s in seconds.items()}, "bytes": kept}

    # --- loop: how much of the update arrives in 16 bit
    results["gain"] = gains(args.blocks, args.images, args.rank)
    print(f"\n| type | B | | gain, layer | gain, {args.blocks} blocks | change |\n|---|---|---|---|---|---|")
    for r in results["gain"]:
        end = f"{r['end']:.3f} ± {r['error']:.3f}"
        print(f"| {r['type']} | {r['B']} | {r['how']} | {r['layer']:.3f} | {end} | {r['change']:.1f} |")

    # --- loop: recomputing the blocks
    print("\n| depth | KiB kept | recomputing | a block more | / (B, N, D) |\n|---|---|---|---|---|")
    before, growth = None, []
    for depth in (2, 4, 8):
        plain, _ = recomputing(depth, args.rank, recompute=False)
        kept, one = recomputing(depth, args.rank, recompute=True)
        if before:
            growth.append((kept - before[1]) / (depth - before[0]))
        more = f"{growth[-1]:,.0f} B | {growth[-1] / one:.4f}" if before else "|"
        print(f"| {depth} | {plain / 1024:,.0f} | {kept / 1024:,.0f} | {more} |")
        before = depth, kept
    ratios["recomputing: memory a block / (B, N, D)"] = max(growth) / one

    # --- save
    print("\n| | measured | at most | |\n|---|---|---|---|")
    for name, most in TARGETS.items():
        print(f"| {name} | {ratios[name]:.3f} | {most:.3f} | {'met' if ratios[name] <= most else 'MISSED'} |")
    print("\n" + json.dumps({**header, "ratios": ratios, "targets": TARGETS, **results}))


if __name__ == "__main__":
    main()
