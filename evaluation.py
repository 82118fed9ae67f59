"""What every evaluation (Algorithm 3) shares: options, M with and without dW, ranks' shares, the result.

    --lora none        M as it was pretrained                        variants: before
    --lora FILE        M with dW*                                    variants: after
    --compare FILE     both, on the same items in the same order     variants: before, after

A difference of tenths of a point is only worth reading if it is paired: `paired` gives it with an interval.
"""

import argparse
import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist
from scipy.stats import binomtest
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import common
import lora

# --- options


def add_options(p: argparse.ArgumentParser, out: str, batch: int) -> None:
    """The options of every evaluation; `out` and `batch` are defaults."""
    add, which = p.add_argument, p.add_mutually_exclusive_group()
    which.add_argument("--lora", default="none", metavar="FILE|none", help="score M with this dW, or without")
    which.add_argument("--compare", metavar="FILE", help="score without and with this dW, paired")
    add("--out", default=out, help="folder for result.json and all else that this run writes")
    add("--batch", type=int, default=batch, help="per process")
    add("--limit", type=int, help="only the first N items of each set; marks the result as partial")
    add("--workers", type=int, default=4, help="loader processes per rank (0 = none)")
    add("--seed", type=int, default=0, help="of whatever is trained or drawn")
    types = "type of the frozen models (auto: bf16 on GPUs that have it, else fp16; CPU: fp32)"
    add("--backbone-dtype", choices=["auto", *common.DTYPES], default="auto", help=types)


def add_backbone_options(p: argparse.ArgumentParser) -> None:
    """For evaluations of the bare vision model: which one."""
    add = p.add_argument
    add("--model", default="eva_g", help="eva_g, eva_e (Table 2), eva_mini, or the name of any timm ViT")
    add("--weights", help="a file, `pretrained` or `random` (default: weights/MODEL.safetensors)")
    add("--no-cls", action="store_true", help="no [CLS] in the sequence (the authors' release)")
    add("--imagenet-norm", action="store_true", help="ImageNet's mean and std (the release), not the model's")


def check_options(args: argparse.Namespace) -> list[str]:
    """Refuse what cannot work before anything is loaded. Returns the variants to score, in order.

    Leaves the LoRA file, or None, in args.lora. Raises ValueError, FileNotFoundError.
    """
    for name, least in dict(batch=1, limit=1, workers=0, seed=0).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    args.lora = args.compare or (None if args.lora == "none" else args.lora)
    if hasattr(args, "weights"):
        args.weights = args.weights or f"weights/{args.model}.safetensors"
        common.check_weights(args.weights)
    if args.lora:
        tuned = lora.read_header(args.lora).get("backbone")
        if tuned and tuned != getattr(args, "model", tuned):
            raise ValueError(f"{args.lora} was tuned on {tuned}, not on --model {args.model}")
    return ["before", "after"] if args.compare else ["after" if args.lora else "before"]


def attach(vit: nn.Module, args: argparse.Namespace) -> Callable[[str], None]:
    """Load dW, if any, into M; returns a function that makes M the `before` or the `after` it is told."""
    if args.lora:
        lora.load(vit, args.lora)
    return lambda variant: lora.switch(vit, on=variant == "after") and None


# --- items


def loader(items: Dataset, args: argparse.Namespace, ranks: common.Ranks, collate=None) -> DataLoader:
    """This rank's share, items rank, rank + world, ...: each once over all ranks, nothing doubled to pad."""
    return DataLoader(
        Subset(items, range(ranks.rank, len(items), ranks.world)),
        args.batch,
        collate_fn=collate,
        num_workers=args.workers,
        pin_memory=ranks.device.type == "cuda",
        worker_init_fn=_ignore_interrupt,
    )


def _ignore_interrupt(_) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle


def gather(mine: dict) -> dict:
    """Every rank's {item: answer} together, in the items' order, on every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    joined = {item: answer for part in parts for item, answer in part.items()}
    assert len(joined) == sum(map(len, parts)), "an item was answered on two ranks"
    return dict(sorted(joined.items()))


def check_images(expected, found) -> None:
    """Raises ValueError naming images that have no prediction, and predictions for images not in the set."""
    for what, ids in (
        ("have no prediction", [i for i in expected if i not in found]),
        ("are predicted for, but are not in the annotations", [i for i in found if i not in expected]),
    ):
        if ids:
            raise ValueError(
                f"{len(ids)} images {what}: {', '.join(map(str, ids[:5]))}{', ...' * (len(ids) > 5)}"
            )


# --- what it says


def paired(before, after, seed: int = 0, resamples: int = 10_000) -> dict:
    """Mean scores of the same n items before and after, and the difference with its 95% interval.

    before, after: (n,) scores. Interval: percentiles of a paired bootstrap over items; p: McNemar's exact
    test (two-sided binomial over the items that changed) if the scores are 0 or 1, else None.
    Raises ValueError if the two are not of the same items.
    """
    before, after = (np.asarray(x, np.float64) for x in (before, after))
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"not the same items before and after: {before.shape} and {after.shape} scores")
    values, counts = np.unique(after - before, return_counts=True)
    n, rng = len(before), np.random.default_rng(seed)
    # To draw n items is to draw how often each value occurs; in parts, as the values may be many
    parts = [rng.multinomial(n, counts / n, size=100) @ values / n for _ in range(resamples // 100)]
    low, high = np.percentile(np.concatenate(parts), [2.5, 97.5])
    p = None
    if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        gained, lost = int((after > before).sum()), int((after < before).sum())
        p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    means = dict(before=before.mean(), after=after.mean(), difference=(after - before).mean())
    return {**{k: float(v) for k, v in means.items()}, "low": float(low), "high": float(high), "p": p, "n": n}


def table(columns: list[str], rows: list[list]) -> str:
    """Markdown; floats with two decimals, None as a dash."""
    cells = [["-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in r] for r in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_result(args: argparse.Namespace, result: dict, files: list[str | None]) -> None:
    """OUT/result.json: the result, every option, the command, versions, and the hashes of `files`."""
    if dist.get_rank() > 0:
        return
    hashes = {str(f): sha256(f) for f in files if f and Path(f).is_file()}
    content = {"partial": args.limit is not None, **result, "options": vars(args), "sha256": hashes}
    path = Path(args.out) / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.tmp")
    part.write_text(json.dumps({**content, **common.provenance()}, indent=1, default=str))
    part.replace(path)
    print(f"{path}{' (partial: --limit)' if args.limit else ''}", flush=True)


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
