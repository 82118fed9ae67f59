"""Algorithm 3 with T_o = grounded object identification (Table 4): a linear probe on [CLS] of the frozen ViT.

The paper's comparison (M3IT's coco-goi; 8 GPUs, eva_g), and one on a laptop that is built from COCO:

    torchrun --nproc_per_node 8 eval_goi.py --train coco-goi/train.jsonl --val coco-goi/val.jsonl \\
        --compare out/visft/lora_005000.safetensors
    python eval_goi.py --model eva_mini --weights random --coco coco --size 112

Which object of the picture is meant is drawn into it as a red box. Writes OUT/result.json, OUT/objects.jsonl
(the five likeliest classes of each) and the features, OUT/features/*.npy, which a later run with the same
weights, dW, pictures and sizes reads back (ranks on several machines need --cache on a file system of all).
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluation
import feature_cache
import files
from backbone import add_backbone_options, check_backbone_options, open_backbone
from ranks import launch, start

# Of the probe; not in the paper. Of the rates, the one with the least loss on a tenth of the training part
LRS, BATCH, WEIGHT_DECAY = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], 256, 1e-4


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--train", metavar="JSONL", help="M3IT's coco-goi/train.jsonl")
    add("--val", metavar="JSONL", help="M3IT's coco-goi/val.jsonl")
    add("--coco", metavar="DIR", help="in their place: boxes drawn into COCO's train2017 and val2017")
    add("--epochs", type=int, default=30, help="of the probe (Sec. 4.3: 30)")
    add("--size", type=int, default=224, help="side in px that pictures are squashed to (the backbone's 224)")
    add("--strict", action="store_true", help="refuse a JSONL with an unusable line; else they are counted")
    add("--cache", metavar="DIR", help="where features are kept (default: OUT/features)")
    evaluation.add_options(p, out="out/goi", batch=64)
    add_backbone_options(p)  # --model, --weights, --no-cls, --imagenet-norm
    args = p.parse_args()
    variants = check_options(args)

    # --- setup
    ranks = start(args, p)

    # --- data
    from data import goi  # torchvision: a second that --help need not wait

    size = (args.size, args.size)
    if args.coco:
        splits = "train2017", "val2017"
        train, val = (goi.BoxedCoco(args.coco, split, size, args.seed, args.limit) for split in splits)
        if train.names != val.names:
            raise ValueError(f"--coco {args.coco}: train2017 and val2017 have unlike categories")
    else:
        train = goi.Records(args.train, size, strict=args.strict, limit=args.limit)
        val = goi.Records(args.val, size, train.names, args.strict, args.limit)
    classes = "COCO's 80" if train.names == goi.COCO_NAMES else f"{len(train.names)} named by the data"
    notes = [*train.notes, *val.notes, f"classes: {classes}"]
    if len(train) < 2:
        raise ValueError(f"{notes[0]}: too few to train on and to choose a learning rate")
    ranks.say(*notes)

    # --- model
    backbone = open_backbone(args, ranks)
    if not backbone.has_cls or args.size % backbone.patch:
        raise ValueError(f"--model {args.model}: needs [CLS], and --size a multiple of {backbone.patch}")
    set_M = evaluation.attach(backbone.vit, args)

    of_cls = dict(backbone=backbone, ranks=ranks, take=lambda f: f.cls, shape=(backbone.dim,))
    features = partial(feature_cache.features, args, **of_cls)

    # --- loop
    R_o, lrs = {}, {}  # Alg. 3, line 1: initialize results list R_o
    for variant in variants:
        set_M(variant)  # M(x), or M(x; dW*)
        f_train = features(train, variant=variant)
        T_o, lrs[variant] = probe(f_train, train.labels, len(train.names), args, ranks.device)
        # Alg. 3, line 2: for x in E_o(x)
        f = features(val, variant=variant)  # Alg. 3, line 3: extract feature f* = M(x; dW*)
        R_o[variant] = rank_classes(T_o, f, ranks.device)  # Alg. 3, line 4: predicting R_o = [R_o, T_o(f*)]

    # --- save
    # Alg. 3, line 6: accumulate results: Metric(E_o(y), R_o) on E_o
    hits = {variant: ranked == val.labels[:, None] for variant, ranked in R_o.items()}  # (n, 5) each
    scores = {k: {variant: hit[:, :k].any(1) for variant, hit in hits.items()} for k in (1, 5)}
    rows = [evaluation.result_row("val", f"top-{k}", score) for k, score in scores.items()]
    if ranks.rank == 0:
        columns = ["Model", "Params", "Iters", "Top-1 Acc", "Top-5 Acc"]
        lines = [[*evaluation.model_columns(args, v, backbone.vit), *(r[v] for r in rows)] for v in variants]
        print(evaluation.table(columns, lines), evaluation.rows_table(rows), sep="\n")
        write_objects(Path(args.out) / "objects.jsonl", val, R_o)
    result = {
        "table": "Table 4: grounded object identification, %",
        "data": "COCO's instances with boxes drawn in, not M3IT" if args.coco else "M3IT's coco-goi layout",
        "classes": train.names,
        "rows": rows,
        "notes": notes,
        "protocol": {
            "picture": "box drawn in, RGB, squashed by bicubic interpolation, the backbone's normalization",
            "feature": "[CLS] after the final norm, standardized over the training part",
            "probe": f"linear, AdamW, cosine, {args.epochs} epochs, batch {BATCH}",
            "learning_rate": lrs,
            "learning_rates_tried": LRS,
        },
    }
    evaluation.write_result(args, result, [args.weights, args.lora])


def check_options(args: argparse.Namespace) -> list[str]:
    """Refuse what cannot work before anything is loaded; returns the variants to score, in order."""
    variants = evaluation.check_options(args)
    check_backbone_options(args)
    if args.epochs < 1 or args.size < 1:
        raise ValueError(f"--epochs and --size must be at least 1, got {args.epochs} and {args.size}")
    if args.no_cls:
        raise ValueError("--no-cls: the probe reads [CLS], so there must be one")
    if bool(args.coco) == bool(args.train or args.val) or bool(args.train) != bool(args.val):
        raise ValueError("give --train JSONL and --val JSONL (M3IT's), or --coco DIR")
    for path in filter(None, (args.train, args.val)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path} (M3IT's data/classification/coco-goi)")
    args.cache = args.cache or str(Path(args.out) / "features")
    return variants


# --- T_o


class Probe(nn.Module):
    """T_o: a linear classifier of features standardized by the training part's mean and deviation, (D,)."""

    def __init__(self, mean: Tensor, deviation: Tensor, classes: int):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.linear = nn.Linear(len(mean), classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, f: Tensor) -> Tensor:
        return self.linear((f - self.mean) / self.deviation)


def probe(f: np.ndarray, labels: np.ndarray, classes: int, args, device) -> tuple[nn.Module, float]:
    """T_o on all of f, with the learning rate that is best on a tenth held out at first, and that rate.

    Best by its loss: how many of a few hundred pictures are right is too noisy to tell two rates apart.
    """
    f, labels = (torch.from_numpy(np.array(a)).to(device) for a in (f, labels))
    order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(f))).to(device)
    held, rest = order.tensor_split([max(1, len(f) // 10)])
    tried = fit(f[rest], labels[rest], classes, LRS, args.epochs, args.seed)
    losses = [F.cross_entropy(T_o(f[held]), labels[held]).item() for T_o in tried]
    lr = LRS[int(np.argmin(losses))]
    return fit(f, labels, classes, [lr], args.epochs, args.seed)[0], lr


def fit(f: Tensor, labels: Tensor, classes: int, lrs: list[float], epochs: int, seed: int) -> list[Probe]:
    """A probe for each learning rate, side by side on the same batches. f: (n, D); labels: (n,)"""
    mean = f.mean(0)
    x = f - mean  # (n, D)
    deviation = ((x * x).sum(0) / (len(x) - 1)).sqrt().clamp(min=1e-6)  # torch's std is slow along rows
    x /= deviation
    probes = [Probe(mean, deviation, classes).to(f.device) for _ in lrs]
    groups = [{"params": T.parameters()} for T in probes]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    rng, per_epoch = np.random.default_rng(seed), -(-len(f) // BATCH)
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            order = torch.from_numpy(rng.permutation(len(f))).to(f.device)
        rows = order[step % per_epoch * BATCH :][:BATCH]
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / (epochs * per_epoch)))
        weight, bias = (torch.cat([getattr(T.linear, n) for T in probes]) for n in ("weight", "bias"))
        logits = F.linear(x[rows], weight, bias).view(-1, classes)  # (b L, C), the L probes of a row together
        target = labels[rows].repeat_interleave(len(lrs))
        loss = F.cross_entropy(logits, target, reduction="sum") / len(rows)  # the probes' sum, each its mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [T.requires_grad_(False) for T in probes]


@torch.no_grad()
def rank_classes(T_o: Probe, f: np.ndarray, device) -> np.ndarray:
    """The five likeliest classes of each, best first: (n, 5), or fewer columns if there are fewer classes."""
    logits = T_o(torch.from_numpy(np.array(f)).to(device))  # (n, C)
    return logits.topk(min(5, logits.shape[1])).indices.cpu().numpy()


def write_objects(path: Path, val, R_o: dict[str, np.ndarray]) -> None:
    """A line per picture: where it is, its class, and the likeliest classes of each variant."""
    lines = []
    for i, label in enumerate(val.labels):
        ranked = {variant: [val.names[k] for k in classes[i]] for variant, classes in R_o.items()}
        lines.append(json.dumps({**val.where(i), "label": val.names[label], **ranked}) + "\n")
    files.write(path, "".join(lines))


if __name__ == "__main__":
    launch(main)
